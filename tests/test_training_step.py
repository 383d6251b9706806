"""training_step.py and step_costs.py: what they count, on a small shape; no test asks how fast anything was."""

import json
import re

import pytest
import torch
from families import PRESENT, make

from decoders_dpvr import decoder_of, owner_of
from dpvr.benchmarks import step_costs, time_and_memory
from dpvr.benchmarks.random_models import make_llava
from dpvr.benchmarks.setups import FAMILY_TRAINED_METHODS, SHAPES, TRAINED_METHODS
from dpvr.benchmarks.training_step import main, parse_args
from dpvr.training.trainers import LORA_TARGETS, lora_targets
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


@pytest.mark.parametrize("name", [each for each in ("llava_onevision", "smolvlm", "qwen3_vl") if each in PRESENT])
def test_a_model_of_any_family_trains_its_own_weights_and_leaves_the_base(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(step_costs, "peak_in_a_process_of_its_own", lambda method, args: 7)
    make(name, torch.float32).config.save_pretrained(tmp_path)
    args = parse_args(["--model", str(tmp_path), *SMALL[2:], "--json"])
    base = step_costs.make_base(args)
    before = {key: weight.clone() for key, weight in base.state_dict().items()}
    monkeypatch.setattr(step_costs, "make_base", lambda args: base)
    main(args)
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]}
    assert tuple(rows) == FAMILY_TRAINED_METHODS
    saved = {method: row["saved_activation_bytes"] for method, row in rows.items()}
    assert saved["late_fusion"] < saved["read_everywhere"] < min(saved[m] for m in ("lora_r16", "lora_r64", "full"))
    assert all(torch.equal(weight, before[key]) for key, weight in base.state_dict().items())
    assert rows["full"]["trainable_parameters"] == sum(weight.numel() for weight in base.parameters())


def test_the_peak_of_a_family_is_measured_in_its_process(tmp_path):
    make("llava_onevision", torch.float32).config.save_pretrained(tmp_path)
    args = parse_args(["--model", str(tmp_path), *SMALL[2:]])
    assert 0 < step_costs.peak_in_a_process_of_its_own("latent", args) < 2**30


@pytest.mark.parametrize("name", PRESENT)
def test_lora_sits_on_the_linear_layers_of_the_decoder_alone(name):
    model = make(name, torch.float32)
    decoder = decoder_of(owner_of(model))[1]
    inside = {id(module) for module in decoder.modules() if isinstance(module, torch.nn.Linear)}
    targets = re.compile(lora_targets(model))
    found = {id(module) for key, module in model.named_modules() if targets.fullmatch(key)}
    named = {id(module) for key, module in decoder.named_modules() if key.rpartition(".")[2] in LORA_TARGETS}
    assert found == named and found <= inside and len(found) >= 4


def test_plans_that_no_model_is_there_for_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_args([*SMALL, "--methods", "latent"])
    assert "latent needs --model" in capsys.readouterr().err
    shallow = make("llava_onevision", torch.float32).config
    shallow.text_config.num_hidden_layers = 1
    shallow.text_config.layer_types = ["full_attention"]
    shallow.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot train late_fusion: split_layer is 1, .* --methods"):
        main(parse_args(["--model", str(tmp_path), *SMALL[2:], "--methods", "late_fusion", "lora_r16"]))
