"""The config: the layer plan of every routing, and the contradictions it refuses."""

import json

import pytest
from transformers import LlamaConfig

from configuration_dpvr import AUTO_MAP, DpvrLlavaConfig

TEXT = LlamaConfig(num_hidden_layers=6, hidden_size=32, num_attention_heads=4, intermediate_size=48)


def plan(**fields) -> str:
    """The plan of a six-layer decoder as letters, with a bar at the split."""
    return str(DpvrLlavaConfig(text_config=TEXT, **fields).layer_plan())


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"split_layer": 2}, "oo|...c"),
        ({"split_layer": 2, "num_fusion_layers": 2}, "oo|..oc"),
        ({"split_layer": 2, "num_fusion_layers": 4}, "oo|oooc"),
        ({"split_layer": 5}, "ooooo|c"),
        ({"split_layer": 2, "fusion_layers": [2, 4]}, "oo|c.c."),
        ({"split_layer": 2, "fusion_layers": [5]}, "oo|...c"),
        ({"split_layer": 2, "routing": "kv_substitution"}, "oo|cccc"),
        ({"split_layer": 2, "routing": "persistent_context"}, "oo|rrrr"),
        ({"split_layer": 2, "routing": "text_only"}, "oo|...."),
        ({"split_layer": 2, "routing": "text_only", "num_side_layers": 0}, "oo|...."),
        ({"routing": "none"}, "oooooo|"),
    ],
)
def test_every_routing_has_its_layer_plan(fields, expected):
    assert plan(**fields) == expected


def test_the_default_is_the_papers_recipe_for_7b():
    config = DpvrLlavaConfig()
    assert (config.routing, config.split_layer, config.num_side_layers, config.num_fusion_layers) == (
        "late_fusion",
        18,
        1,
        1,
    )
    assert config.layer_plan().modes == ("joint",) * 18 + ("text",) * 13 + ("context",)


@pytest.mark.parametrize(
    ("fields", "came", "needed"),
    [
        ({"split_layer": 6}, "split_layer is 6, but this decoder has 6 layers", "choose 1 to 5"),
        ({"split_layer": 0}, "split_layer is 0, but this decoder has 6 layers", "the same share here is 3"),
        ({"split_layer": True}, "split_layer is True", "choose 1 to 5"),
        ({"split_layer": 2, "num_fusion_layers": 5}, "num_fusion_layers is 5, but 4 layers follow", "choose 1 to 4"),
        ({"split_layer": 2, "num_fusion_layers": 0}, "num_fusion_layers is 0", "routing='text_only'"),
        ({"split_layer": 3, "fusion_layers": [2, 4]}, "fusion_layers is [2, 4]", "from split_layer=3 to 5"),
        ({"split_layer": 3, "fusion_layers": [6]}, "fusion_layers is [6]", "from split_layer=3 to 5"),
        ({"split_layer": 3, "fusion_layers": []}, "fusion_layers is []", "routing='text_only'"),
        ({"split_layer": 3, "fusion_layers": 4}, "fusion_layers is 4", "list layers of this range"),
        ({"split_layer": 3, "fusion_layers": [5, 4]}, "fusion_layers is [5, 4]", "ascending order, as [4, 5]"),
        ({"split_layer": 3, "fusion_layers": [4, 4]}, "fusion_layers is [4, 4]", "once, in ascending order, as [4]"),
        (
            {"split_layer": 2, "fusion_layers": [4, 5], "num_fusion_layers": 3},
            "num_fusion_layers is 3, but fusion_layers lists 2 layers",
            "leave the other out",
        ),
        ({"split_layer": 2, "routing": "late"}, "routing is 'late'", "choose one of late_fusion, persistent_context"),
        ({"split_layer": 2, "side_branch_init": "zeros"}, "side_branch_init is 'zeros'", "choose one of split_layer"),
        (
            {"split_layer": 2, "num_side_layers": 0},
            "num_side_layers is 0, but routing 'late_fusion' needs 1 to 6",
            "routing='text_only'",
        ),
        (
            {"split_layer": 2, "num_side_layers": -1, "routing": "text_only"},
            "num_side_layers is -1",
            "needs 0 to 6, the depth of the decoder",
        ),
        ({"spilt_layer": 2}, "no field 'spilt_layer'", "did you mean 'split_layer'?"),
        ({"split_layer": 2, "image_token_index": None}, "image_token_index is None", "LLaVA-1.5: 32000"),
    ],
)
def test_a_contradiction_is_refused_with_what_came_and_what_is_needed(fields, came, needed):
    with pytest.raises(ValueError) as error:
        DpvrLlavaConfig(text_config=TEXT, **fields)
    assert came in str(error.value) and needed in str(error.value)


def test_the_fields_of_the_method_make_the_same_plan_on_another_base():
    config = DpvrLlavaConfig(
        text_config=TEXT, split_layer=2, fusion_layers=[3, 5], num_side_layers=2, base_model_name_or_path="me/base"
    )
    other = DpvrLlavaConfig(text_config=TEXT, **config.dpvr_fields())
    assert other.base_model_name_or_path is None
    assert other.dpvr_fields() == config.dpvr_fields() and other.layer_plan() == config.layer_plan()


def test_a_plan_survives_saving_and_loading(tmp_path):
    config = DpvrLlavaConfig(text_config=TEXT, split_layer=2, fusion_layers=[3, 5], side_branch_init="identity")
    config.save_pretrained(tmp_path)
    loaded = DpvrLlavaConfig.from_pretrained(tmp_path)
    assert loaded.layer_plan() == config.layer_plan()
    assert loaded.side_branch_init == "identity"
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "dpvr_llava" and saved["auto_map"] == AUTO_MAP


def test_a_saved_list_of_fusion_layers_can_be_replaced_and_dropped(tmp_path):
    DpvrLlavaConfig(text_config=TEXT, split_layer=2, fusion_layers=[3, 5]).save_pretrained(tmp_path)
    assert str(DpvrLlavaConfig.from_pretrained(tmp_path, fusion_layers=[4]).layer_plan()) == "oo|..c."
    assert str(DpvrLlavaConfig.from_pretrained(tmp_path, fusion_layers=None).layer_plan()) == "oo|...c"


def test_a_plan_made_wrong_after_construction_is_refused_when_it_is_used():
    config = DpvrLlavaConfig(text_config=TEXT, split_layer=2)
    config.split_layer = 9
    with pytest.raises(ValueError, match="split_layer is 9, but this decoder has 6 layers"):
        config.layer_plan()
