"""adapter_dpvr.py: side branches as PEFT adapters on a stock LLaVA and on DPVR, saved, switched and taken off."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from adapters import SAVED_KEYS, generate, logits, save_trained, shaken, without_prefix
from conftest import IMAGE_TOKEN_ID, make_llava
from peft import PeftModel, get_peft_model
from reference import Prompts
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, DynamicCache, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from adapter_dpvr import DpvrConfig
from hub_dpvr import save_adapter
from modeling_dpvr import DpvrLlavaForConditionalGeneration
from versions_dpvr import LINE_4

PLANS = [
    {"routing": "late_fusion"},
    {"routing": "late_fusion", "num_fusion_layers": 2},
    {"routing": "late_fusion", "fusion_layers": [2]},
    {"routing": "late_fusion", "num_side_layers": 2},
    {"routing": "kv_substitution"},
    {"routing": "persistent_context"},
    {"routing": "text_only"},
]
PLAN_FIELDS = ("routing", "split_layer", "num_side_layers", "num_fusion_layers", "fusion_layers", "side_branch_init")


@pytest.fixture
def prompts() -> dict[str, torch.Tensor]:
    """Three rows, padded on the left: an image in the middle, two images, none."""
    return Prompts([[1, 2], [2, 0, 1], [3]], padding_side="left").inputs


@pytest.fixture
def saved(tmp_path) -> Path:
    """A saved adapter at split 2 whose side branch is far from where it started."""
    save_trained(tmp_path / "adapter", seed=1)
    return tmp_path / "adapter"


# -- the same model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_an_adapter_on_stock_llava_computes_what_dpvr_does_bit_for_bit(llava, prompts, plan):
    fields = {"split_layer": 2, **plan}
    expected = logits(DpvrLlavaForConditionalGeneration.from_llava(make_llava(), **fields), prompts)
    assert torch.equal(logits(get_peft_model(llava, DpvrConfig(**fields)), prompts), expected)


def test_it_generates_with_a_cache_what_dpvr_does_and_what_it_does_without(saved, prompts):
    model = PeftModel.from_pretrained(make_llava(), saved)
    answers = generate(model, prompts)
    assert answers == generate(model, prompts, use_cache=False)
    dpvr = DpvrLlavaForConditionalGeneration.from_llava(make_llava(), split_layer=2)
    dpvr.load_side_branch(without_prefix(saved))
    assert answers == generate(dpvr, prompts)
    with model.disable_adapter():
        assert answers != generate(model, prompts) == generate(make_llava(), prompts)


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "num_beams": 2},
        pytest.param(
            {"prefill_chunk_size": 3}, marks=pytest.mark.skipif(LINE_4, reason="transformers 4 splits no pictures")
        ),
        {"prompt_lookup_num_tokens": 2, "eos_token_id": 39},
    ],
    ids=str,
)
def test_on_stock_llava_too_every_way_to_decode_gives_the_same_answers(saved, prompts, options):
    model = PeftModel.from_pretrained(make_llava(), saved)
    if "prompt_lookup_num_tokens" in options:  # for one row alone
        prompts = Prompts([[1, 6]]).inputs
    plain = {name: value for name, value in options.items() if name in ("num_beams", "eos_token_id")}
    answers = generate(model, prompts, **plain)
    assert generate(model, prompts, **options) == answers
    assert generate(model, prompts, **options) == answers  # transformers 4 uses a static cache again


@torch.no_grad()
def test_a_cache_does_not_go_on_when_the_adapter_is_disabled_or_enabled(saved, prompts):
    model, token = PeftModel.from_pretrained(make_llava(), saved), torch.full((3, 1), 9)
    cache = model(**prompts, use_cache=True).past_key_values
    with model.disable_adapter():
        with pytest.raises(ValueError, match="This cache was filled under the layer plan .* new cache"):
            model(input_ids=token, past_key_values=cache)
        cache = model(**prompts, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="This cache was filled under the layer plan .* new cache"):
        model(input_ids=token, past_key_values=cache)


def test_an_adapter_fits_stock_llava_and_dpvr_alike_in_both_directions(saved, tmp_path, prompts):
    on_stock = logits(PeftModel.from_pretrained(make_llava(), saved), prompts)
    dpvr = DpvrLlavaForConditionalGeneration.from_llava(make_llava(), split_layer=3, num_side_layers=2)
    assert torch.equal(logits(PeftModel.from_pretrained(dpvr, saved), prompts), on_stock)

    made_on_dpvr = DpvrLlavaForConditionalGeneration.from_llava(make_llava(), split_layer=1)
    shaken(get_peft_model(made_on_dpvr, DpvrConfig(split_layer=2)), seed=5).save_pretrained(tmp_path / "other")
    assert set(load_file(tmp_path / "other" / "adapter_model.safetensors")) == SAVED_KEYS
    save_trained(tmp_path / "same", seed=5)
    models = [PeftModel.from_pretrained(make_llava(), tmp_path / name) for name in ("other", "same")]
    assert torch.equal(*(logits(model, prompts) for model in models))


def test_the_side_branch_of_a_dpvr_model_is_saved_as_an_adapter_for_stock_llava(tmp_path, prompts):
    dpvr = DpvrLlavaForConditionalGeneration.from_llava(make_llava(), split_layer=2, num_side_layers=2)
    dpvr.freeze_base()
    shaken(dpvr)
    with pytest.raises(ValueError, match="does not know it: set config.base_model_name_or_path"):
        save_adapter(dpvr, tmp_path / "adapter")
    dpvr.config.base_model_name_or_path = "me/llava"
    save_adapter(dpvr, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "me/llava"
    adapted = PeftModel.from_pretrained(make_llava(), tmp_path / "adapter")
    assert torch.equal(logits(adapted, prompts), logits(dpvr, prompts))
    adapted.save_pretrained(tmp_path / "by_peft")
    ours, its = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("adapter", "by_peft"))
    assert ours.items() <= its.items() and set(PLAN_FIELDS) < set(ours)


# -- saved and loaded -------------------------------------------------------------------------------------------------


def test_it_saves_the_side_branch_and_nothing_else_and_comes_back(saved, prompts):
    assert {file.name for file in saved.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert set(load_file(saved / "adapter_model.safetensors")) == SAVED_KEYS
    expected = shaken(get_peft_model(make_llava(), DpvrConfig(split_layer=2)), seed=1)
    assert torch.equal(logits(PeftModel.from_pretrained(make_llava(), saved), prompts), logits(expected, prompts))


def test_it_loads_from_a_subfolder_for_training_and_with_little_memory(saved, prompts):
    expected = logits(PeftModel.from_pretrained(make_llava(), saved), prompts)
    in_subfolder = PeftModel.from_pretrained(make_llava(), saved.parent, subfolder=saved.name, is_trainable=True)
    assert {name for name, p in in_subfolder.named_parameters() if p.requires_grad} == {
        key.replace("side_branch.", "side_branch.default.") for key in SAVED_KEYS
    }
    lean = PeftModel.from_pretrained(make_llava(), saved, low_cpu_mem_usage=True)
    assert torch.equal(logits(in_subfolder, prompts), expected) and torch.equal(logits(lean, prompts), expected)


def test_every_field_of_its_config_has_help_and_comes_back(tmp_path):
    fields = {"split_layer": 1, "fusion_layers": [2, 3], "side_branch_init": "identity", "num_side_layers": 2}
    save_trained(tmp_path, seed=0, **fields)
    config = DpvrConfig.from_pretrained(tmp_path)
    assert config.num_hidden_layers == 4 and {name: vars(config)[name] for name in fields} == fields
    own = set(DpvrConfig.__dataclass_fields__) - set(DpvrConfig.__mro__[1].__dataclass_fields__)
    assert own and all(DpvrConfig.__dataclass_fields__[name].metadata["help"] for name in own)


# -- switched, disabled, taken off ------------------------------------------------------------------------------------


def test_disabled_it_is_vanilla_bit_for_bit_and_unloaded_the_very_same_model(llava, saved, prompts):
    inner, expected = llava.model, logits(llava, prompts)
    model = PeftModel.from_pretrained(llava, saved)
    adapted = logits(model, prompts)
    with model.disable_adapter():
        assert torch.equal(logits(model, prompts), expected)
    assert torch.equal(logits(model, prompts), adapted) and not torch.equal(adapted, expected)
    assert model.unload() is llava and llava.model is inner
    assert torch.equal(logits(llava, prompts), expected)
    assert set(llava.state_dict()) == set(make_llava().state_dict())


def test_a_second_side_branch_may_be_loaded_switched_to_and_deleted(saved, tmp_path, prompts):
    save_trained(tmp_path / "second", seed=2, split_layer=1, num_fusion_layers=2)
    expected = [
        logits(PeftModel.from_pretrained(make_llava(), folder), prompts) for folder in (saved, tmp_path / "second")
    ]
    model = PeftModel.from_pretrained(make_llava(), saved, adapter_name="first")
    model.load_adapter(tmp_path / "second", adapter_name="second")
    assert torch.equal(logits(model, prompts), expected[0])
    model.set_adapter("second")
    assert torch.equal(logits(model, prompts), expected[1])
    with pytest.raises(ValueError, match="are side branches, and one runs at a time"):
        model.base_model.set_adapter(["first", "second"])
    model.delete_adapter("first")
    assert torch.equal(logits(model, prompts), expected[1])
    assert not any(".first." in name for name in model.state_dict())
    with pytest.raises(ValueError, match="unload"):
        model.merge_and_unload()


# -- trained ----------------------------------------------------------------------------------------------------------


def test_only_the_active_side_branch_is_trained_and_learns(llava, prompts):
    model = get_peft_model(llava, DpvrConfig(split_layer=2))
    model.add_adapter("second", DpvrConfig(split_layer=1))
    labels = prompts["input_ids"].masked_fill(prompts["attention_mask"] == 0, -100)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model(**prompts, labels=labels).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert trained == {key.replace("side_branch.", "side_branch.default.") for key in SAVED_KEYS}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == trained


def test_a_branch_in_float32_runs_on_a_base_in_bfloat16(saved, prompts):
    inputs = {**prompts, "pixel_values": prompts["pixel_values"].bfloat16()}
    model = get_peft_model(make_llava(dtype=torch.bfloat16), DpvrConfig(split_layer=2))
    dtypes = {p.dtype for name, p in model.named_parameters() if "side_branch" in name}
    assert dtypes == {torch.float32} and logits(model, inputs).dtype == torch.bfloat16
    expected = DpvrLlavaForConditionalGeneration.from_llava(make_llava(dtype=torch.bfloat16), split_layer=2)
    torch.testing.assert_close(logits(model, inputs), logits(expected, inputs), atol=0.2, rtol=0.05)
    assert len(generate(model, inputs)) == 3


def test_at_7b_it_trains_the_papers_202_million_parameters(capsys):
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336
    )
    text = LlamaConfig(vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
        model = get_peft_model(llava, DpvrConfig(split_layer=18))
    model.print_trainable_parameters()
    printed = capsys.readouterr().out
    assert "trainable params: 202,383,360" in printed and "trainable%: 2.78" in printed, printed


# -- one implementation, two ways in ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "top_k": 3}])
@pytest.mark.parametrize("use_cache", [True, False])
def test_beams_and_samples_on_stock_llava_are_dpvrs(saved, options, use_cache):
    """Rows with unlike numbers of images, whose pixels stay with their rows."""
    rows = Prompts([[1, 2], [2, 0, 1], [3], [1, 0, 2, 1]], padding_side="left").inputs
    dpvr = DpvrLlavaForConditionalGeneration.from_llava(make_llava(), split_layer=2)
    dpvr.load_side_branch(without_prefix(saved))
    answers = []
    for model in (PeftModel.from_pretrained(make_llava(), saved), dpvr):
        torch.manual_seed(0)
        answers.append(generate(model, rows, use_cache=use_cache, num_return_sequences=2, **options))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("disabled", [False, True])
@pytest.mark.parametrize("new_pixels_only", [False, True])
def test_a_second_picture_may_come_with_the_cache_of_the_first(saved, new_pixels_only, disabled):
    model, first, second = PeftModel.from_pretrained(make_llava(), saved), Prompts([[1, 2]]), Prompts([[2, 1]], seed=1)
    with model.disable_adapter() if disabled else nullcontext():
        cache = DynamicCache()
        answer = generate(model, first.inputs, past_key_values=cache)
        ids = torch.cat([torch.tensor(answer), second.inputs["input_ids"]], dim=1)
        pictures = torch.cat([first.images[0], second.images[0]])
        whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        expected = generate(model, {**whole, "pixel_values": pictures})
        pictures = second.images[0] if new_pixels_only else pictures
        assert generate(model, {**whole, "pixel_values": pictures}, past_key_values=cache) == expected


def test_a_prompt_that_ends_in_a_picture_is_refused_unless_the_adapter_is_off(saved):
    model, inputs = PeftModel.from_pretrained(make_llava(), saved), Prompts([[2, 0]]).inputs
    with pytest.raises(ValueError, match="The prompt ends in an image.* put text after"):
        generate(model, inputs)
    with model.disable_adapter():
        generate(model, inputs)


@pytest.mark.parametrize("side", ["left", "right"])
def test_all_ways_to_the_loss_leave_out_images_and_what_follows_them(saved, side):
    """The adapter's forward, DPVR's, and a trainer's own forward that projects by itself."""
    batch = Prompts([[1, 3], [2, 0, 2]], side)
    labels = batch.inputs["input_ids"].masked_fill(batch.inputs["attention_mask"] == 0, -100)
    adapted = PeftModel.from_pretrained(make_llava(), saved)
    dpvr = DpvrLlavaForConditionalGeneration.from_llava(make_llava(), split_layer=2)
    dpvr.load_side_branch(without_prefix(saved))
    kept = labels.clone()
    for row, ids in zip(kept, batch.inputs["input_ids"], strict=True):
        marks = (ids == IMAGE_TOKEN_ID).tolist()
        row[[mark or (at > 0 and marks[at - 1]) for at, mark in enumerate(marks)]] = -100
    with torch.no_grad():
        predicted = dpvr(**batch.inputs).logits[:, :-1][kept[:, 1:] != -100]
        expected = torch.nn.functional.cross_entropy(predicted, kept[:, 1:][kept[:, 1:] != -100])
        for model in (adapted, dpvr):
            assert model(**batch.inputs, labels=labels).loss.item() == pytest.approx(expected.item(), abs=1e-6)
    for model in (adapted, dpvr):
        head = model.get_base_model() if model is adapted else model
        seen = {}
        head.forward = lambda *args, seen=seen, **kwargs: seen.update(kwargs)
        model(**batch.inputs, labels=labels)
        assert torch.equal(seen["labels"], kept)
