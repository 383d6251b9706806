"""examples/: each script runs on its family's tiny model, in this process, and is short."""

import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES, PRESENT
from family_processors import WITH_PROCESSOR, save_family
from peft import get_peft_model
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from adapter_dpvr import DpvrConfig
from processors_dpvr import NoVideos, load_processor

ROOT = Path(__file__).parent.parent
SCRIPTS = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs a family's example on its tiny model; what it prints."""

    def run(name: str) -> str:
        save_family(name, tmp_path / "tiny")
        processor = load_processor(str(tmp_path / "tiny"))
        if isinstance(
            vars(processor).get("video_processor"), NoVideos
        ):  # torchvision, which a script needs, is missing
            monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda name: processor)
        monkeypatch.setattr(sys, "argv", [name, str(tmp_path / "tiny")])
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        runpy.run_path(str(SCRIPTS[name]), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_every_family_has_a_script_of_at_most_40_lines():
    assert SCRIPTS.keys() == FAMILIES.keys()
    assert all(len(path.read_text().splitlines()) <= 40 for path in SCRIPTS.values())


@pytest.mark.parametrize("name", [name for name in WITH_PROCESSOR if name in PRESENT])
def test_a_script_trains_saves_loads_and_answers(name, run, tmp_path):
    lines = dict(line.split(": ", 1) for line in run(name).splitlines() if ": " in line)
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "tiny")
    config = DpvrConfig.from_pretrained(str(tmp_path / f"my-{name}"))
    assert lines["layer plan"].strip() == str(config.plan_for(base.config)) and "c" in lines["layer plan"]
    assert float(lines["prefill FLOPs"]) == config.prefill_ratio(base.config, 1024, 128) < 1
    assert math.isfinite(float(lines["loss"])) and "answer" in lines
    untrained = get_peft_model(base, config).state_dict()
    with safe_open(tmp_path / f"my-{name}" / "adapter_model.safetensors", "pt") as file:
        trained = {key.replace("side_branch.", "side_branch.default."): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert sum(map(torch.numel, trained.values())) == int(lines["trainable params"].split()[0].replace(",", ""))
    assert trained.keys() == {key for key in untrained if "side_branch" in key}
    assert not any(torch.equal(weight, untrained[key]) for key, weight in trained.items() if "proj" in key)
