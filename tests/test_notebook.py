"""The notebook: its cells run in order on dpvr-mini's base, without the installation."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from dpvr.pretraining.processor import save_processor
from processors_dpvr import load_processor

ROOT = Path(__file__).parent.parent
NOTEBOOK = json.loads((ROOT / "notebooks" / "adapter.ipynb").read_text(encoding="utf-8"))
CODE = [(cell, "".join(cell["source"])) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
STEPS = 6


@pytest.fixture(scope="module")
def stock_mini(tmp_path_factory) -> str:
    """The folder of dpvr-mini's base as a stock LLaVA, with its processor."""
    folder = tmp_path_factory.mktemp("stock")
    llava = LlavaForConditionalGeneration.from_pretrained(ROOT)
    del llava.config.auto_map
    llava.save_pretrained(folder)
    save_processor(load_processor(str(ROOT)), folder)
    return str(folder)


def test_its_cells_go_from_the_base_to_a_reloaded_adapter(stock_mini, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    instead = {
        "llava-hf/llava-1.5-7b-hf": stock_mini,
        "SPLIT_LAYER = 18": "SPLIT_LAYER = 8",
        "STEPS = 100": f"STEPS = {STEPS}",
    }
    names: dict = {"__name__": "__main__"}
    for cell, source in CODE:
        if "install" in cell["metadata"].get("tags", ()):
            continue
        for old, new in instead.items():
            source = source.replace(old, new)
        exec(compile(source, cell["id"], "exec"), names)
    printed = capsys.readouterr().out
    assert "trainable params: 286,080" in printed and len(names["losses"]) == STEPS
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").stat().st_size < 2e6
    assert float(re.search(r"largest difference of the logits: (\S+)", printed).group(1)) == 0


def test_it_has_no_outputs_and_its_installation_stands_in_one_cell():
    assert not any(cell["outputs"] or cell["execution_count"] for cell, _ in CODE)
    shell = [index for index, (_, source) in enumerate(CODE) if re.search(r"^[!%]", source, re.MULTILINE)]
    assert shell == [0] and "install" in CODE[0][0]["metadata"]["tags"]
