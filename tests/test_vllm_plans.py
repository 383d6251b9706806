"""What the vLLM plugin decides without vLLM: which plans are served, and how a batch's tokens fall into runs."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configuration_dpvr import DpvrLlavaConfig
from dpvr.serving.plans import served
from dpvr.serving.runs import sort_tokens

ROOT = Path(__file__).parent.parent
TEXT_CONFIG = {"model_type": "llama", "num_hidden_layers": 6}


def make_config(**fields) -> DpvrLlavaConfig:
    return DpvrLlavaConfig(text_config=TEXT_CONFIG, split_layer=2, **fields)


@pytest.mark.parametrize(
    "fields, plan, side_layers, rank",
    [
        ({"routing": "none"}, "oooooo|", 0, None),
        ({"routing": "kv_substitution", "num_side_layers": 2}, "oo|cccc", 2, None),
        ({"routing": "persistent_context"}, "oo|rrrr", 1, None),
        ({"routing": "late_fusion", "fusion_layers": [2, 3, 4, 5]}, "oo|cccc", 1, None),
        ({"routing": "latent", "latent_rank": 4}, "oo|llll", 0, 4),
        ({"routing": "latent", "latent_rank": 4, "latent_split_layer": 0, "latent_side_layers": 1}, "|llllll", 1, 4),
    ],
)
def test_a_plan_whose_deep_layers_all_read_the_image_is_served(fields, plan, side_layers, rank):
    found = served(make_config(**fields))
    assert (str(found.plan), found.num_side_layers, found.latent_rank) == (plan, side_layers, rank)


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"routing": "late_fusion"}, "in layer 2 text must not see the image"),
        ({"routing": "text_only"}, "in layer 2 text must not see the image"),
        ({"routing": "late_fusion", "num_fusion_layers": 4}, "image tokens run on"),
        ({"routing": "latent", "latent_rank": 4, "latent_layers": [2, 4]}, "in layer 3 text must not see the image"),
        ({"routing": "latent", "latent_rank": 4, "latent_stride": 2}, "latent_stride is 2"),
    ],
)
def test_a_plan_that_leaves_slots_without_keys_is_refused_with_the_reason(fields, reason):
    with pytest.raises(ValueError, match=reason):
        served(make_config(**fields))


def test_a_base_without_an_adapter_is_told_to_name_one():
    from transformers import LlavaConfig

    with pytest.raises(ValueError, match='"dpvr_adapter"'):
        served(LlavaConfig(text_config=TEXT_CONFIG))


@pytest.mark.parametrize("seed", range(20))
def test_each_run_sees_its_request_up_to_its_own_last_token(seed):
    """Against the definition, token by token, on random batches of chunks and decoded tokens."""
    rng = np.random.default_rng(seed)
    counts, pasts = rng.integers(1, 12, 5), rng.integers(0, 9, 5)
    starts = np.concatenate([[0], counts.cumsum()])
    is_image = rng.random(starts[-1]) < rng.choice([0.0, 0.3, 0.9, 1.0])
    runs = sort_tokens(is_image, starts, pasts + counts)
    request = np.repeat(np.arange(5), counts)
    slot = np.concatenate([past + np.arange(count) for past, count in zip(pasts, counts, strict=True)])
    assert sorted([*runs.text, *runs.image]) == list(range(starts[-1]))
    assert not is_image[runs.text].any() and is_image[runs.image].all()
    assert (runs.image_requests == request[runs.image]).all() and (runs.image_slots == slot[runs.image]).all()
    sizes = np.diff(runs.starts)
    assert (np.diff(sizes) >= 0).all(), "some kernels want single tokens first"
    for first, size, end, owner in zip(runs.starts[:-1], sizes, runs.ends, runs.requests, strict=True):
        places = runs.text[first : first + size]
        assert (request[places] == owner).all()
        assert (slot[places] == np.arange(end - size, end)).all(), "a causal kernel's queries are the last slots"


def test_the_plugin_imports_nothing_of_vllm_before_it_is_called():
    code = "import sys, dpvr.serving.vllm_plugin, dpvr.serving.plans, dpvr.serving.check; print('vllm' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "False"
