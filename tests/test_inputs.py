"""Bad input: a clear ValueError that names both sides, before any work."""

import pytest
import torch
from conftest import IMAGE_TOKEN_ID, TOKENS_PER_IMAGE
from transformers import LlamaConfig

from configuration_dpvr import DpvrLlavaConfig
from modeling_dpvr import DpvrLlavaForConditionalGeneration

IMAGE = [IMAGE_TOKEN_ID] * TOKENS_PER_IMAGE


@pytest.fixture(params=["late_fusion", "none"])
def model(request, llava) -> DpvrLlavaForConditionalGeneration:
    return DpvrLlavaForConditionalGeneration.from_llava(llava, split_layer=2, routing=request.param)


def ids(*tokens: int) -> torch.Tensor:
    return torch.tensor([tokens])


def pixels(count: int = 1) -> torch.Tensor:
    return torch.zeros(count, 3, 8, 8, dtype=torch.float64)


def test_image_tokens_without_pixels_are_refused(model):
    with pytest.raises(ValueError, match=r"has 4 image tokens \(id 7\), and 0 images came with it: make both"):
        model(input_ids=ids(1, *IMAGE, 9))


def test_pixels_without_an_image_token_are_refused(model):
    with pytest.raises(ValueError, match=r"has 0 image tokens \(id 7\), and 2 images came with it: make both"):
        model(input_ids=ids(1, 9), pixel_values=pixels(2))


@pytest.mark.parametrize("num_tokens", [3, 5, 8])
def test_counts_of_image_tokens_and_features_that_differ_are_refused(llava, num_tokens):
    model = DpvrLlavaForConditionalGeneration.from_llava(llava, split_layer=2)
    with pytest.raises(ValueError, match=rf"have \[{num_tokens}\] image tokens, but 1 images of \[4\] tokens have 4"):
        model(input_ids=ids(1, *[IMAGE_TOKEN_ID] * num_tokens, 9), pixel_values=pixels())


def test_an_image_split_over_two_rows_is_refused(llava):
    model = DpvrLlavaForConditionalGeneration.from_llava(llava, split_layer=2)
    rows = torch.tensor([[1, *IMAGE[:3], 9, 9], [1, *IMAGE, IMAGE_TOKEN_ID]])
    with pytest.raises(ValueError, match=r"rows have \[3, 5\] image tokens, but 2 images of \[4\] tokens have 8: use"):
        model(input_ids=rows, pixel_values=pixels(2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_pixels_that_are_not_finite_are_refused(model, bad):
    values = pixels()
    values[0, 1, 2, 3] = bad
    with pytest.raises(ValueError, match="1 of 192 pixel_values are NaN or infinite: check the picture"):
        model(input_ids=ids(1, *IMAGE, 9), pixel_values=values)


def test_pixels_of_a_wrong_shape_are_refused(model):
    with pytest.raises(ValueError, match=r"shape \(1, 1, 3, 8, 8\), but \(images, channels, height, width\)"):
        model(input_ids=ids(1, *IMAGE, 9), pixel_values=pixels()[None])


def test_an_attention_mask_of_a_wrong_shape_is_refused(llava):
    model = DpvrLlavaForConditionalGeneration.from_llava(llava, split_layer=2)
    with pytest.raises(ValueError, match=r"has the shape \(1, 5\), but .* is \(1, 6\): pass"):
        model(input_ids=ids(1, *IMAGE, 9), pixel_values=pixels(), attention_mask=torch.ones(1, 5))


def test_embeddings_with_image_marks_get_the_logits_and_loss_of_ids(model):
    input_ids = ids(1, *IMAGE, 9, 10)
    images, labels = pixels() + 0.1, torch.where(input_ids == IMAGE_TOKEN_ID, -100, input_ids)
    by_ids = model(input_ids=input_ids, pixel_values=images, labels=labels)
    embeds = model.get_input_embeddings()(input_ids)
    by_embeds = model(inputs_embeds=embeds, pixel_values=images, labels=labels)
    assert torch.equal(by_ids.logits, by_embeds.logits) and torch.equal(by_ids.loss, by_embeds.loss)


def test_a_tuple_comes_back_where_it_is_asked_for(model):
    inputs = {"input_ids": ids(1, *IMAGE, 9), "pixel_values": pixels()}
    assert torch.equal(model(**inputs, return_dict=False)[0], model(**inputs).logits)


def test_a_cache_is_made_in_evaluation_and_not_in_training(llava):
    model = DpvrLlavaForConditionalGeneration.from_llava(llava, split_layer=2)
    inputs = {"input_ids": ids(1, *IMAGE, 9), "pixel_values": pixels()}
    assert model.eval()(**inputs).past_key_values is not None
    assert model.train()(**inputs).past_key_values is None


def test_both_or_neither_of_ids_and_embeddings_are_refused(model):
    with pytest.raises(ValueError, match="Neither of input_ids and inputs_embeds came: pass exactly one"):
        model(pixel_values=pixels())
    with pytest.raises(ValueError, match="Both of input_ids and inputs_embeds came: pass exactly one"):
        model(input_ids=ids(1), inputs_embeds=model.get_input_embeddings()(ids(1)))


def test_attention_maps_are_refused_where_layers_differ_and_given_where_they_do_not(llava):
    llava.set_attn_implementation("eager")
    model = DpvrLlavaForConditionalGeneration.from_llava(llava, split_layer=2)
    inputs = {"input_ids": ids(1, *IMAGE, 9), "pixel_values": pixels()}
    with pytest.raises(ValueError, match="output_attentions is not supported .* set_routing"):
        model(**inputs, output_attentions=True)
    model.set_routing("none")
    assert len(model(**inputs, output_attentions=True).attentions) == 4


def test_gradient_checkpointing_is_refused(llava):
    model = DpvrLlavaForConditionalGeneration.from_llava(llava, split_layer=2).train()
    with pytest.raises(ValueError, match="does not support"):
        model.gradient_checkpointing_enable()
    model.model.language_model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="is on and not supported: set gradient_checkpointing=False"):
        model(input_ids=ids(1, *IMAGE, 9), pixel_values=pixels())


def test_a_routing_that_needs_a_side_branch_is_refused_without_one(llava):
    model = DpvrLlavaForConditionalGeneration.from_llava(llava, split_layer=2, routing="text_only", num_side_layers=0)
    with pytest.raises(ValueError, match="num_side_layers is 0, but routing 'late_fusion' needs"):
        model.set_routing("late_fusion")
    assert model.config.routing == "text_only"


def test_an_image_token_outside_the_vocabulary_is_refused():
    text = LlamaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48)
    with pytest.raises(ValueError, match="image_token_id is 32000, but the vocabulary has 40 tokens: set it"):
        DpvrLlavaForConditionalGeneration(DpvrLlavaConfig(text_config=text, split_layer=2))


def test_flash_attention_is_refused_with_the_way_out(llava, tmp_path):
    llava.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="attn_implementation is 'flash_attention_2', .*: use 'sdpa'"):
        DpvrLlavaForConditionalGeneration.from_pretrained(
            tmp_path, split_layer=2, attn_implementation="flash_attention_2"
        )
    llava.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation is 'flash_attention_2', .*: use 'sdpa'"):
        DpvrLlavaForConditionalGeneration.from_llava(llava, split_layer=2)


def test_a_decoder_of_another_family_or_with_a_sliding_window_is_refused():
    with pytest.raises(ValueError, match="of type 'gpt2': use a LLaVA with one of llama, mistral, qwen2"):
        DpvrLlavaForConditionalGeneration(
            DpvrLlavaConfig(text_config={"model_type": "gpt2", "num_hidden_layers": 4}, split_layer=2)
        )
    mistral = {"model_type": "mistral", "num_hidden_layers": 4, "sliding_window": 16, "vocab_size": 32001}
    with pytest.raises(ValueError, match="sliding_window=16, .*: set it to None"):
        DpvrLlavaForConditionalGeneration(DpvrLlavaConfig(text_config=mistral, split_layer=2))


def test_unknown_fields_of_from_llava_are_refused(llava):
    with pytest.raises(ValueError, match="does not know spilt: the DPVR fields are routing, split_layer"):
        DpvrLlavaForConditionalGeneration.from_llava(llava, spilt=2)


def test_generating_from_a_prompt_that_ends_in_an_image_is_refused_under_a_routing(model):
    inputs = {"input_ids": ids(1, 9, *IMAGE), "pixel_values": pixels(), "max_new_tokens": 1}
    if model.config.routing == "none":
        assert model.generate(**inputs).shape == (1, 7)
    else:
        with pytest.raises(ValueError, match="The prompt ends in an image.* put text after"):
            model.generate(**inputs)


def test_a_label_right_after_an_image_is_left_out_of_the_loss_under_a_routing(model):
    input_ids = ids(1, *IMAGE, 9, 10)
    every_text = torch.where(input_ids == IMAGE_TOKEN_ID, -100, input_ids)
    only_after_text = every_text.clone()
    only_after_text[0, 5] = -100
    losses = [
        model(input_ids=input_ids, pixel_values=pixels(), labels=labels).loss
        for labels in (every_text, only_after_text)
    ]
    assert torch.equal(*losses) == (model.config.routing != "none")
