"""What is saved is loadable, and what is loaded is what was saved: files of adapters and side branches."""

import pytest
import torch
from conftest import make_llava
from peft import PeftModel, get_peft_model
from reference import Prompts, make_dpvr

from adapter_dpvr import DpvrConfig
from hub_dpvr import save_adapter
from modeling_dpvr import DpvrLlavaForConditionalGeneration


@pytest.mark.parametrize("whole", [True, False])
def test_a_side_branch_that_holds_no_numbers_is_refused_by_name(whole, tmp_path):
    make_llava(dtype=torch.float32).save_pretrained(tmp_path / "base")
    model = DpvrLlavaForConditionalGeneration.from_pretrained(tmp_path / "base", split_layer=2)
    with torch.no_grad():
        model.side_branch[0].self_attn.o_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "saved", side_branch_only=not whole)
    with pytest.raises(ValueError, match="side_branch.0.self_attn.o_proj.weight' are NaN or infinite"):
        DpvrLlavaForConditionalGeneration.from_pretrained(tmp_path / "saved")


def train(model: torch.nn.Module, weight: torch.nn.Parameter) -> None:
    optimizer = torch.optim.SGD([weight], lr=0.1)
    weight.grad = torch.ones_like(weight)
    optimizer.step()


@pytest.mark.parametrize("changed", ["projector", "decoder layer", "tower", "frozen again", "embeddings resized"])
def test_a_side_branch_is_not_saved_alone_if_what_it_stands_on_was_changed(changed, tmp_path):
    make_llava(dtype=torch.float32).save_pretrained(tmp_path / "base")
    model = DpvrLlavaForConditionalGeneration.from_pretrained(tmp_path / "base", split_layer=2)
    if changed == "embeddings resized":
        model.resize_token_embeddings(48)
    else:
        part = {"decoder layer": model.model.language_model.layers[1], "tower": model.model.vision_tower}
        train(model, next(part.get(changed, model.model.multi_modal_projector).parameters()))
        model.requires_grad_(changed != "frozen again")
    with pytest.raises(ValueError, match="of the base were changed since it was loaded, such as 'model"):
        model.save_pretrained(tmp_path / "side", side_branch_only=True)
    assert not (tmp_path / "side").exists()
    model.save_pretrained(tmp_path / "whole")
    again = DpvrLlavaForConditionalGeneration.from_pretrained(tmp_path / "whole").state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in model.state_dict().items())


def test_a_trained_side_branch_is_saved_alone_also_after_a_move_to_another_dtype(tmp_path):
    make_llava(dtype=torch.float32).save_pretrained(tmp_path / "base")
    model = DpvrLlavaForConditionalGeneration.from_pretrained(tmp_path / "base", split_layer=2).to(torch.bfloat16)
    train(model, model.side_branch[0].self_attn.q_proj.weight)
    model.save_pretrained(tmp_path / "side", side_branch_only=True)
    again = DpvrLlavaForConditionalGeneration.from_pretrained(tmp_path / "side", dtype=torch.bfloat16)
    trained = model.side_branch[0].self_attn.q_proj.weight
    assert torch.equal(again.side_branch[0].self_attn.q_proj.weight, trained)


@pytest.mark.parametrize("option", [{"max_shard_size": "1KB"}, {"variant": "fp16"}])
def test_an_option_with_which_a_side_branch_could_not_be_loaded_is_refused_by_name(option, tmp_path):
    make_llava(dtype=torch.float32).save_pretrained(tmp_path / "base")
    model = DpvrLlavaForConditionalGeneration.from_pretrained(tmp_path / "base", split_layer=2)
    with pytest.raises(ValueError, match=f"{next(iter(option))}=.* does not go with side_branch_only=True"):
        model.save_pretrained(tmp_path / "side", side_branch_only=True, **option)
    assert not (tmp_path / "side").exists()


def test_a_plan_that_was_switched_to_is_saved_without_the_layers_of_another(tmp_path):
    make_llava(dtype=torch.float32).save_pretrained(tmp_path / "base")
    model = DpvrLlavaForConditionalGeneration.from_pretrained(tmp_path / "base", split_layer=2, fusion_layers=[2])
    for routing, layers in (("kv_substitution", None), ("none", [2]), ("late_fusion", [2])):
        model.set_routing(routing)
        model.save_pretrained(tmp_path / routing)
        save_adapter(model, tmp_path / f"{routing}_adapter")
        again = DpvrLlavaForConditionalGeneration.from_pretrained(tmp_path / routing)
        assert again.config.layer_plan() == model.config.layer_plan() and again.config.fusion_layers == layers
        assert DpvrConfig.from_pretrained(str(tmp_path / f"{routing}_adapter")).fusion_layers == layers
    other = DpvrLlavaForConditionalGeneration.from_pretrained(tmp_path / "none", routing="kv_substitution")
    assert other.config.fusion_layers is None
    with pytest.raises(ValueError, match="fusion_layers is .2., but with routing 'text_only' no layer"):
        DpvrLlavaForConditionalGeneration.from_pretrained(tmp_path / "none", routing="text_only", fusion_layers=[2])


@pytest.mark.parametrize("option", [{"max_shard_size": "10KB"}, {"variant": "fp16"}])
def test_a_whole_model_is_loaded_from_shards_and_variants(option, tmp_path):
    model = make_dpvr(dtype=torch.float32)
    model.save_pretrained(tmp_path, **option)
    where = {"variant": option["variant"]} if "variant" in option else {}
    again = DpvrLlavaForConditionalGeneration.from_pretrained(tmp_path, **where).state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in model.state_dict().items())


def test_embeddings_that_peft_saved_with_an_adapter_are_loaded_with_it(tmp_path):
    model = get_peft_model(make_llava(), DpvrConfig(split_layer=2))
    with torch.no_grad():
        model.get_input_embeddings().weight[9] = 7.0
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    again = PeftModel.from_pretrained(make_llava(), str(tmp_path))
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)


@torch.no_grad()
@pytest.mark.parametrize("adapter", [False, True])
def test_beams_may_start_from_embeddings_and_pictures(adapter):
    model = make_dpvr()
    if adapter:
        model = get_peft_model(make_llava(), DpvrConfig(split_layer=2)).eval()
        model.generation_config.eos_token_id = None
    batch = Prompts([[3, 1, 2], [2, 2]])
    ids = batch.inputs["input_ids"]
    embeds = model.get_input_embeddings()(ids)
    search = {"num_beams": 3, "do_sample": False, "max_new_tokens": 3}
    want = model.generate(**batch.inputs, **search)[:, ids.shape[1] :]
    others = {name: value for name, value in batch.inputs.items() if name != "input_ids"}
    assert torch.equal(model.generate(inputs_embeds=embeds, **others, **search), want)
