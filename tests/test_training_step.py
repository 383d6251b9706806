"""training_step.py and step_costs.py: what they count, on a small shape; no test asks how fast anything was."""

import json

import pytest
import torch

from dpvr.benchmarks import step_costs, time_and_memory
from dpvr.benchmarks.random_models import make_llava
from dpvr.benchmarks.setups import SHAPES, TRAINED_METHODS
from dpvr.benchmarks.training_step import main, parse_args
from versions_dpvr import LINE_4

pytestmark = pytest.mark.skipif(LINE_4, reason="training is for transformers 5.18 and newer")
SMALL = ["--shape", "64x4", "--steps", "1", "--warmup", "0", "--batch_size", "1", "--text_tokens", "16"]


def test_it_prints_a_row_per_method_and_a_json_document_last(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(step_costs, "peak_in_a_process_of_its_own", lambda method, args: 7)
    main(parse_args([*SMALL, "--output", str(tmp_path / "out.json"), "--json"]))
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == json.loads((tmp_path / "out.json").read_text()) and document["versions"]["torch"]
    rows = {row["method"]: row for row in document["rows"]}
    assert tuple(rows) == TRAINED_METHODS
    for row in rows.values():
        assert row["seconds_per_step"] > 0 and row["peak_bytes"] == 7
    parameters = [rows[method]["trainable_parameters"] for method in TRAINED_METHODS]
    width, mlp, layers = 64, 128, 4
    side = 4 * width**2 + 3 * width * mlp + 2 * width
    lora = layers * (4 * 2 * width + 3 * (width + mlp))
    assert parameters[:3] == [side, 16 * lora, 64 * lora] and parameters[3] > side * layers
    saved = [rows[method]["saved_activation_bytes"] for method in TRAINED_METHODS]
    assert saved[0] < min(saved[1:]) / 2


def test_saved_bytes_are_those_of_a_product_counted_by_hand():
    class Product(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(8, 4), torch.nn.Linear(4, 2)

        def forward(self, x, use_cache):
            self.loss = self.second(self.first(x)).sum()
            return self

    inputs = {"x": torch.randn(3, 8)}
    assert step_costs.saved_activation_bytes(Product(), inputs) == 3 * 4 * 4  # the second layer's input alone


def test_the_peak_is_that_of_a_process_with_nothing_else_in_it():
    args = parse_args(SMALL)
    llava = make_llava(SHAPES["64x4"], "cpu", torch.float32)
    weights = sum(weight.nbytes for weight in llava.parameters())
    assert weights < step_costs.peak_in_a_process_of_its_own("late_fusion", args) < 2**30


def test_a_method_that_does_not_fit_is_said_not_to_fit(capsys, monkeypatch):
    def peak(method, args):
        return None if method == "full" else 1

    monkeypatch.setattr(step_costs, "peak_in_a_process_of_its_own", peak)
    main(parse_args([*SMALL, "--methods", "late_fusion", "full", "--json"]))
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1])["rows"][1] == {"method": "full", "fits": False}
    assert any("full" in line and "does not fit" in line for line in lines[:-1])


def test_a_measurement_that_fails_says_why():
    with pytest.raises(RuntimeError, match=r"peak memory of late_fusion failed with exit status 1 .*\n.*nowhere"):
        time_and_memory.peak_in_a_process_of_its_own("nowhere", "late_fusion", SMALL)


def test_a_device_that_is_not_here_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cuda:0 needs a GPU, .*: choose cpu"):
        main(parse_args([*SMALL, "--device", "cuda:0"]))
    with pytest.raises(ValueError, match="no device 'gpu': choose cpu or cuda"):
        main(parse_args([*SMALL, "--device", "gpu"]))
