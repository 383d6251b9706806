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
    ("fields", "expected", "got", "remedy"),
    [
        ({"split_layer": 6}, "split_layer to be an integer from 1 to 5", "got 6", "would be 3 here"),
        ({"split_layer": 0}, "split_layer to be an integer from 1 to 5", "got 0", "would be 3 here"),
        ({"split_layer": True}, "split_layer to be an integer", "got True", "18 of 32"),
        (
            {"split_layer": 2, "num_fusion_layers": 5},
            "num_fusion_layers to be an integer from 1 to 4",
            "got 5",
            "fewer",
        ),
        ({"split_layer": 2, "num_fusion_layers": 0}, "from 1 to 4", "got 0", "text_only"),
        ({"split_layer": 3, "fusion_layers": [2, 4]}, "from split_layer=3 to 5", "got [2, 4]", "deep stack"),
        ({"split_layer": 3, "fusion_layers": [6]}, "from split_layer=3 to 5", "got [6]", "deep stack"),
        ({"split_layer": 3, "fusion_layers": []}, "from split_layer=3 to 5", "got []", "text_only"),
        ({"split_layer": 3, "fusion_layers": 4}, "from split_layer=3 to 5", "got 4", "deep stack"),
        ({"split_layer": 3, "fusion_layers": [5, 4]}, "ascending", "got [5, 4]", "[4, 5]"),
        ({"split_layer": 3, "fusion_layers": [4, 4]}, "each once", "got [4, 4]", "[4]"),
        (
            {"split_layer": 2, "fusion_layers": [4, 5], "num_fusion_layers": 3},
            "num_fusion_layers=2",
            "got 3",
            "one way",
        ),
        ({"split_layer": 2, "routing": "late"}, "routing to be one of", "got 'late'", "pick one"),
        ({"split_layer": 2, "side_branch_init": "zeros"}, "side_branch_init to be one of", "got 'zeros'", "pick one"),
        ({"split_layer": 2, "num_side_layers": 0}, "num_side_layers to be an integer of at least 1", "got 0", "VTW"),
        ({"spilt_layer": 2}, "DPVR fields", "got 'spilt_layer'", "'split_layer'"),
        ({"split_layer": 2, "image_token_index": None}, "image_token_index", "got None", "32000"),
    ],
)
def test_a_contradiction_names_expected_got_and_remedy(fields, expected, got, remedy):
    with pytest.raises(ValueError) as error:
        DpvrLlavaConfig(text_config=TEXT, **fields)
    message = str(error.value)
    assert message.startswith("Expected ") and "Remedy: " in message
    assert expected in message and got in message and remedy in message


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
    with pytest.raises(ValueError, match="got 9"):
        config.layer_plan()
