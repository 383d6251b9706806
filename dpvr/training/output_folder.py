"""What a training run leaves in its folder: whole, or as it was before, and nobody else's file touched.

weights of all processes -> .saving/ -> .saving/saved.sha256: the save is whole
                         -> the earlier run's files deleted, these moved in their place, saved.sha256 last

A run that is killed in between is taken up by the next one: `finish_move`.

--method dpvr   the side branch with its config and code; adapter/ for PEFT
         lora   PEFT's own files
         full   all weights, config and code
and the processor and training.json, the record of the run
"""

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, ProcessorMixin, Trainer
from transformers.integrations import unset_hf_deepspeed_config

from dpvr.training.manifests import begin, digest, files_in, finish, whole_or_nothing, write_whole
from dpvr.training.used_folders import LIST_NAME, RECORD_NAME, STAGING, Ours, is_weights, refuse_what_is_in_the_way
from hub_dpvr import save_adapter
from loading_dpvr import is_side_branch
from modeling_dpvr import DpvrLlavaForConditionalGeneration


def save(trainer: Trainer, processor: ProcessorMixin, method: str, record: dict[str, Any], output_dir: str) -> None:
    """Write what was trained into `output_dir`, in place of what an earlier run saved there.

    To be called on all processes, which put their shards together; the main one writes.

    Raises:
        OSError: if it could not be written; the earlier files are then as they were.
        ValueError: if something that no run wrote has come in the way; the whole save is then in `.saving`.
    """
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    unset_hf_deepspeed_config()  # under ZeRO-3 the model to save would be made in shards, with processes that wait
    if trainer.accelerator.is_main_process:
        folder = Path(output_dir) / STAGING
        if folder.exists():
            shutil.rmtree(folder)
        with whole_or_nothing(folder):
            begin(folder, LIST_NAME)
            write_model(trainer.accelerator.unwrap_model(trainer.model), weights, method, folder)
            processor.save_pretrained(folder)
            write_record(record, folder)
            finish_list(folder)
        finish_move(Path(output_dir))
    trainer.accelerator.wait_for_everyone()


def write_model(
    model: PreTrainedModel | PeftModel, weights: dict[str, torch.Tensor], method: str, folder: Path
) -> None:
    if isinstance(model, PeftModel):
        model.save_pretrained(folder, state_dict=weights)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's card, where one's own may be
        return
    if not isinstance(model, DpvrLlavaForConditionalGeneration):
        model.save_pretrained(folder, state_dict=weights)
        return
    whole = without_shards(model, side_branch_of(weights) if method == "dpvr" else weights)
    whole.save_pretrained(folder, side_branch_only=method == "dpvr")
    if method == "dpvr":
        (folder / "adapter").mkdir()
        save_adapter(whole, folder / "adapter")


def finish_list(folder: Path) -> None:
    """Declare a save whole: its list, as sha256sum reads it; without the record, which the scores are added to."""
    files = [path for path in files_in(folder, LIST_NAME) if path.name != RECORD_NAME]
    lines = [f"{digest(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    finish(folder, LIST_NAME, "".join(lines))


def finish_move(output_dir: Path) -> bool:
    """Put a whole save in place of an earlier run's files, from wherever a killed run had come with that.

    Each step can be done again. The list comes last, so until then both lists say which files are the project's. The
    earlier weights go first and the new ones come last, so that nothing loads half old, half new.

    Returns:
        Whether there was a whole save to put in place; one that is not whole is deleted.

    Raises:
        ValueError: if something that no run wrote is in the way.
        OSError: if a file cannot be moved.
    """
    staging = output_dir / STAGING
    if not (staging / LIST_NAME).is_file():
        if staging.exists():
            shutil.rmtree(staging)
        return False
    ours = Ours(output_dir)
    refuse_what_is_in_the_way(output_dir, ours)
    try:
        _move(output_dir, staging, ours)
    except OSError as error:
        raise OSError(
            f"What was saved could not be moved into {output_dir} ({error.strerror or error}). The whole save is in "
            f"{staging}: mend this, and give --resume_from_checkpoint last, which moves it first."
        ) from error
    return True


def _move(output_dir: Path, staging: Path, ours: Ours) -> None:
    left = files_in(staging, LIST_NAME)
    there = {path.relative_to(staging).as_posix() for path in left}
    for name in sorted(ours.earlier, key=lambda name: not is_weights(name)):
        moved = name in ours.coming and name not in there
        if not moved and ours.wrote(name):
            (output_dir / name).unlink()
    for path in sorted(left, key=lambda path: is_weights(path.name)):
        target = output_dir / path.relative_to(staging)
        target.parent.mkdir(exist_ok=True)
        os.replace(path, target)
    os.replace(staging / LIST_NAME, output_dir / LIST_NAME)
    shutil.rmtree(staging)


def write_record(record: dict[str, Any], folder: str | Path) -> None:
    write_whole(Path(folder) / RECORD_NAME, json.dumps(record, indent=2))


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
