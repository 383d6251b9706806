"""Every routing on every family of models: see family_checks.py."""

import json

import pytest
import torch
import transformers
from families import FAMILIES, PRESENT, VISION_START, make, make_prompts
from family_checks import CHECKS, RECORD, cells, plans, with_adapter
from peft import get_peft_model
from transformers import CONFIG_MAPPING

import self_check_dpvr
import stream_arguments_dpvr
from adapter_dpvr import DpvrConfig
from decoders_dpvr import check_decoder
from self_check_dpvr import TESTED_MODELS
from twins_dpvr import RoutedLayer
from versions_dpvr import cache_in, cache_name


@pytest.mark.parametrize("name, check", cells())
def test_the_method_holds_on_every_family(name, check):
    function, allowed = CHECKS[check]
    assert function(name) <= allowed


def test_the_record_has_every_family_and_check_of_this_release_and_nothing_beyond_what_is_allowed():
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    if transformers.__version__ not in record:
        pytest.skip("the record was not made with this release")
    found = record[transformers.__version__]["largest_difference"]
    assert {(name, check) for name, checks in found.items() for check in checks} == set(cells())
    assert all(found[name][check] <= CHECKS[check][1] for name, check in cells())


# -- what no plan can be made for -------------------------------------------------------------------------------------


def config_of(name: str, **text_fields):
    config = make(name, torch.float32).config
    for field, value in text_fields.items():
        setattr(config.get_text_config(), field, value)
    return config


@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("qwen3_vl", {"split_layer": 1}, "after each of its first 2 layers .DeepStack.: choose 2 or more"),
        ("gemma3", {"split_layer": 2}, "'full_attention' first occurs in layer 2 .* choose 3 or more"),
        ("qwen3_5", {"split_layer": 3}, "'full_attention' first occurs in layer 3 .* choose 4 or more"),
        ("qwen3_5", {"split_layer": 4, "fusion_layers": [5, 7]}, r"names \[5\], which are recurrent"),
        ("qwen3_5", {"split_layer": 4, "num_fusion_layers": 3}, "2 layers of attention follow the split"),
        ("internvl", {"split_layer": 6}, "split_layer is 6, but this decoder has 6 layers"),
        ("internvl", {"split_layer": 2, "side_branch_mlp": "dense"}, "cannot build a layer with one MLP in place"),
        ("internvl", {"split_layer": 2, "side_branch_mlp": "none"}, "side_branch_mlp is 'none': choose one of copy"),
    ],
)
def test_a_plan_that_a_decoder_cannot_run_is_refused_before_anything_is_changed(name, fields, message):
    if name not in PRESENT:
        pytest.skip("this release does not have the family")
    model = make(name, torch.float32)
    before = dict(model.state_dict())
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, DpvrConfig(**fields))
    assert model.state_dict().keys() == before.keys() and type(model.model).__name__ == type(make(name).model).__name__


def test_a_decoder_whose_layers_share_keys_or_that_reads_by_cross_attention_is_refused():
    with pytest.raises(ValueError, match="last 2 layers of this decoder use the keys and values of earlier layers"):
        check_decoder(config_of("internvl", num_kv_shared_layers=2), 3)
    mllama = CONFIG_MAPPING["mllama"]()
    with pytest.raises(ValueError, match="'mllama' reads images by cross-attention"):
        check_decoder(mllama, 3)


@pytest.mark.parametrize("name", [name for name in ("gemma3", "qwen3_5") if name in PRESENT])
def test_a_static_cache_is_refused_where_windows_or_states_have_sizes_of_their_own(name):
    model = with_adapter(name, dtype=torch.float32, **plans(name)[0])
    inputs, _ = make_prompts(name, model.base_model.model, [[3, 4]])
    with pytest.raises(ValueError, match="A static cache is not supported under a layer plan with layers of"):
        model.generate(**inputs, max_new_tokens=2, cache_implementation="static")


@pytest.mark.skipif("qwen3_5" not in PRESENT, reason="this release does not have the family")
@torch.no_grad()
def test_recurrent_layers_do_not_go_on_with_rows_that_would_be_padded_in_the_middle():
    model = with_adapter("qwen3_5", dtype=torch.float32, **plans("qwen3_5")[0])
    inputs, _ = make_prompts("qwen3_5", model.base_model.model, [[3, 9, 4], [9, 4]])
    ids, mask, base = inputs["input_ids"], inputs["attention_mask"], model.base_model.model
    positions, cut = torch.arange(ids.shape[1]).expand(3, 2, -1), int((ids[0] == VISION_START).nonzero()[1])
    grids = inputs["image_grid_thw"]
    pieces = inputs["pixel_values"].split(grids.prod(1).tolist())
    first = {"pixel_values": pieces[0], "image_grid_thw": grids[:1]}
    second = {"pixel_values": torch.cat(pieces[1:]), "image_grid_thw": grids[1:]}
    out = base(input_ids=ids[:, :cut], attention_mask=mask[:, :cut], position_ids=positions[..., :cut], **first)
    chunk = {"input_ids": ids[:, cut:], "position_ids": positions[..., cut:], "attention_mask": mask, **second}
    with pytest.raises(ValueError, match="which recurrent layers cannot do: run the rows one by one"):
        base(**chunk, **{cache_name(type(base).forward): cache_in(out)})


# -- a model that nobody tried ----------------------------------------------------------------------------------------


def test_the_tested_models_are_those_of_the_table():
    assert {family.model_type for family in FAMILIES.values()} | {"dpvr_llava"} == set(TESTED_MODELS)


@pytest.mark.parametrize("name", PRESENT)
def test_an_untested_model_is_tried_once_and_passes_if_the_method_runs_on_it(name, monkeypatch):
    monkeypatch.setattr(self_check_dpvr, "TESTED_MODELS", ())
    model = with_adapter(name, dtype=torch.float32, **plans(name)[0])
    owner = model.base_model.model.model
    inputs, _ = make_prompts(name, model.base_model.model, [[3, 4]])
    with torch.no_grad():
        model(**inputs)
    assert vars(owner)["_routing_was_checked"]


@pytest.mark.parametrize("place", ["keys", "positions"])
def test_an_untested_model_on_which_the_method_fails_is_an_error(place, monkeypatch):
    monkeypatch.setattr(self_check_dpvr, "TESTED_MODELS", ())
    if place == "keys":  # as if the layer's keys did not come from the states that it is given
        taken = RoutedLayer.keys_and_values
        monkeypatch.setattr(RoutedLayer, "keys_and_values", lambda *args: tuple(2 * t for t in taken(*args)))
    else:  # as if the layer got its positions under a name that is not known
        monkeypatch.delitem(stream_arguments_dpvr.TOKEN_AXES, "position_embeddings")
    model = with_adapter("internvl", dtype=torch.float32, **plans("internvl")[0])
    inputs, _ = make_prompts("internvl", model.base_model.model, [[3, 4]])
    message = "The method does not run on InternVLModel" if place == "keys" else "shape|size|must match"
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError), match=message):
        model(**inputs)


# -- mixtures of experts ----------------------------------------------------------------------------------------------


def test_a_dense_mlp_in_place_of_experts_starts_as_attention_alone_and_has_far_fewer_weights():
    fields = {"split_layer": 3, "routing": "kv_substitution"}
    dense = get_peft_model(make("qwen3_vl_moe"), DpvrConfig(**fields, side_branch_mlp="dense"))
    copied = get_peft_model(make("qwen3_vl_moe"), DpvrConfig(**fields))
    layer = dense.base_model.model.model.side_branch["default"][0]
    source = dense.base_model.model.model.language_model.layers[3]
    assert torch.equal(layer.self_attn.k_proj.weight, source.self_attn.k_proj.weight)
    assert float(layer.mlp.down_proj.weight.detach().abs().max()) == 0.0
    assert dense.get_nb_trainable_parameters()[0] < copied.get_nb_trainable_parameters()[0]
    inputs, _ = make_prompts("qwen3_vl_moe", dense.base_model.model, [[3, 4]])
    assert dense(**inputs).logits.isfinite().all()
