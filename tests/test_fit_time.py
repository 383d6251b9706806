"""fit_time.py: what fitting takes at the shape of a model of any family; no test asks how fast anything was."""

import json

import pytest
import torch
from families import PRESENT, make

from dpvr.benchmarks.fit_time import main, parse_args
from dpvr.cost_table import load_config
from versions_dpvr import LINE_4

TINY = [name for name in ("smolvlm", "qwen3_vl") if name in PRESENT]
SHORT = "--pictures 3 --image_tokens 8 --text_tokens 6 --latent_rank 2 --dtype float32"


def asked(folder, *more: str):
    return parse_args(["--model", str(folder), *SHORT.split(), *more])


@pytest.mark.skipif(LINE_4, reason="transformers 4 takes no image features that were made before")
@pytest.mark.parametrize("name", TINY)
def test_a_fit_is_timed_beside_a_prefill_and_its_moments_are_as_large_as_the_formula_says(name, tmp_path):
    make(name, torch.float32).config.save_pretrained(tmp_path)
    document = main(asked(tmp_path, "--output", str(tmp_path / "fit.json")))
    assert json.loads((tmp_path / "fit.json").read_text()) == document
    assert 0 < document["prefill_seconds"] and 0 < document["fit_seconds"] and 0 < document["solve_seconds"]
    low, high = document["ratio"][1:]
    assert low <= document["ratio"][0] <= high and document["latent_rank"] == 2
    text = load_config(str(tmp_path)).get_text_config()
    width, readers = text.hidden_size, document["plan"].count("l")
    head = getattr(text, "head_dim", None) or width // text.num_attention_heads
    widths = 2 * readers * text.num_key_value_heads * head
    sums = 8 * (width + 2 * widths + 2 * readers)  # of n, T and its square
    assert abs(document["moments_bytes"] - 8 * width * (width + widths)) <= sums


@pytest.mark.skipif(not LINE_4, reason="transformers 5 takes image features that were made before")
def test_what_transformers_4_cannot_do_is_said_before_a_model_is_made(tmp_path):
    with pytest.raises(ValueError, match="transformers>=5.18"):
        main(asked(tmp_path))
