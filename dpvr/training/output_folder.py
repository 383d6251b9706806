"""What a training run leaves in its folder: whole, or as it was before.

weights of all processes -> a new folder inside output_dir -> its files moved in place of the earlier run's

--method dpvr   the side branch with its config and code; adapter/ for PEFT
         lora   PEFT's own files
         full   all weights, config and code
and the processor and training.json, the record of the run
"""

import copy
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaProcessor, PreTrainedModel, Trainer
from transformers.integrations import unset_hf_deepspeed_config

from hub_dpvr import save_adapter
from loading_dpvr import is_side_branch
from modeling_dpvr import DpvrLlavaForConditionalGeneration


def save(trainer: Trainer, processor: LlavaProcessor, method: str, record: dict[str, Any], output_dir: str) -> None:
    """Write what was trained into `output_dir`, in place of what an earlier run saved there.

    To be called on all processes, which put their shards together; the main one writes, to a folder in it first. A run
    that is killed meanwhile leaves the earlier files as they were; one that is killed in the instant in which files
    are moved leaves no weights in place, so that nothing loads half old, and the whole new save in `.saving-*`.
    """
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    unset_hf_deepspeed_config()  # under ZeRO-3 the model to save would be made in shards, with processes that wait
    if trainer.accelerator.is_main_process:
        os.makedirs(output_dir, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".saving-", dir=output_dir))
        write_model(trainer.accelerator.unwrap_model(trainer.model), weights, method, folder)
        processor.save_pretrained(folder)
        write_record(record, folder)
        move_into(Path(output_dir), folder)
    trainer.accelerator.wait_for_everyone()


def write_model(model: PreTrainedModel, weights: dict[str, torch.Tensor], method: str, folder: Path) -> None:
    if method == "lora":
        model.save_pretrained(folder, state_dict=weights)
        return
    whole = without_shards(model, side_branch_of(weights) if method == "dpvr" else weights)
    whole.save_pretrained(folder, side_branch_only=method == "dpvr")
    if method == "dpvr":
        (folder / "adapter").mkdir()
        save_adapter(whole, folder / "adapter")


def move_into(output_dir: Path, folder: Path) -> None:
    """Put the files of `folder`, which lies in `output_dir`, in place of an earlier run's."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for pattern in ("*.safetensors", "*.index.json", "adapter_config.json", "adapter/*"):
        for path in output_dir.glob(pattern):
            path.unlink()
    for path in sorted(files, key=lambda path: path.suffix == ".safetensors"):  # weights last
        target = output_dir / path.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        os.replace(path, target)
    for left_over in output_dir.glob(".saving-*"):
        shutil.rmtree(left_over)


def write_record(record: dict[str, Any], folder: str | Path) -> None:
    (Path(folder) / "training.json").write_text(json.dumps(record, indent=2), encoding="utf-8")


def without_shards(
    model: DpvrLlavaForConditionalGeneration, weights: dict[str, torch.Tensor]
) -> DpvrLlavaForConditionalGeneration:
    """A model with these whole weights, or those of a side branch alone, to be saved.

    FSDP 2 replaces a model's class, and the code to save is found by its class.
    """
    with torch.device("meta"):
        whole = DpvrLlavaForConditionalGeneration(copy.deepcopy(model.config))
    whole.load_state_dict(weights, assign=True, strict=not all(map(is_side_branch, weights)))
    whole.generation_config = model.generation_config
    return whole


def side_branch_of(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in weights.items() if is_side_branch(name)}
