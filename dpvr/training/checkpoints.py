"""Checkpoints that are whole or are no checkpoints, and that belong to one run.

Trainer's files -> checkpoint.json, written last: size and SHA-256 of every file, and which run wrote them
--resume_from_checkpoint -> the newest folder whose files are all as recorded -> refused if the run is another one
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import Trainer

MANIFEST_NAME = "checkpoint.json"
RUN_FIELDS = ("method", "base", "lora", "recipe", "data", "seed")  # the layer plan is compared by the trainer


class WholeCheckpoints(Trainer):
    """A Trainer that records a checkpoint's files when all are written, and deletes older checkpoints only then."""

    run: dict[str, Any] = {}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        PartialState().wait_for_everyone()  # each process writes files of its own
        if self.args.should_save:
            from transformers.trainer_utils import rotate_checkpoints  # transformers 4, which only loads, has none

            write_manifest(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}", self.run)
            rotate_checkpoints(
                output_dir=self.args.output_dir,
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )


def run_identity(record: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for a run to go on from another's checkpoint, as JSON holds it."""
    run = {name: record[name] for name in RUN_FIELDS}
    run["recipe"] = {name: value for name, value in run["recipe"].items() if name != "processes"}
    return json.loads(json.dumps(run))


def write_manifest(folder: Path, run: dict[str, Any]) -> None:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_NAME]
    recorded = {path.relative_to(folder).as_posix(): [path.stat().st_size, _digest(path)] for path in sorted(files)}
    beside = folder / f"{MANIFEST_NAME}.part"
    with beside.open("w", encoding="utf-8") as file:
        json.dump({"run": run, "files": recorded}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, folder / MANIFEST_NAME)


def read_manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))


def damage(folder: Path) -> str | None:
    """What keeps a folder from being a whole checkpoint, None if it is one."""
    try:
        recorded = read_manifest(folder)["files"].items()
    except FileNotFoundError:
        return f"it has no {MANIFEST_NAME}, which is written last"
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return f"its {MANIFEST_NAME} cannot be read"
    for name, (size, digest) in recorded:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
        if _digest(path) != digest:
            return f"{name} has changed since it was saved"
    return None


def find_checkpoint(name: str | None, output_dir: str) -> str | None:
    """The folder to resume from; "last" is the newest whole one in `output_dir`.

    Raises:
        ValueError: if there is no whole checkpoint.
    """
    if name is None:
        return None
    found = _newest_first(Path(output_dir)) if name == "last" else [Path(name)]
    damaged = ""
    for folder in found:
        if (wrong := damage(folder)) is None:
            return str(folder)
        damaged += f" {folder.name} is not whole: {wrong}."
        if name == "last" and PartialState().is_main_process:
            print(f"{folder.name} is not whole: {wrong}. Looking for an older checkpoint.", flush=True)
    raise ValueError(
        f"There is no whole checkpoint in {output_dir if name == 'last' else name!r}.{damaged} Name another one, or "
        "start anew with --save_strategy steps --save_steps 100 and without --resume_from_checkpoint."
    )


def refuse_another_run(checkpoint: str | None, run: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: if the checkpoint was written by a run with another recipe, seed, base, method or data.
    """
    if checkpoint is None:
        return
    saved, now = _flat(read_manifest(Path(checkpoint))["run"]), _flat(run)
    different = [
        f"{name} was {saved.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(saved | now)
        if saved.get(name) != now.get(name)
    ]
    if different:
        raise ValueError(
            f"{checkpoint} was saved by another run: {'; '.join(different)}. Resume with the options of that run, or "
            "start anew in another --output_dir without --resume_from_checkpoint."
        )


def check_output_folder(output_dir: str) -> None:
    """Make sure that a run will be able to write, before anything is read or trained; nothing is left behind.

    Raises:
        ValueError: if it could not.
    """
    folder = Path(output_dir).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x" * 4096)
    except OSError as error:
        raise ValueError(
            f"--output_dir {output_dir!r} cannot be written to ({error.strerror}): name a folder that can, with free "
            "space for the checkpoints and the result."
        ) from error


def _newest_first(output_dir: Path) -> list[Path]:
    steps = {path: path.name.removeprefix("checkpoint-") for path in output_dir.glob("checkpoint-*")}
    whole = [path for path, step in steps.items() if step.isdecimal() and path.is_dir()]
    return sorted(whole, key=lambda path: int(steps[path]), reverse=True)


def _flat(run: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in run.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
