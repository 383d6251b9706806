"""Checkpoints that are whole or are no checkpoints, and that belong to one run.

Trainer's files -> checkpoint.json, written last: size and SHA-256 of every file, and which run wrote them
--resume_from_checkpoint -> the newest folder whose files are all as recorded -> refused if the run is another one
"""

import json
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from accelerate import PartialState
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dpvr.training.manifests import begin, digest, files_in, finish, is_empty, is_from_a_run, whole_or_nothing

MANIFEST_NAME, STATE_NAME = "checkpoint.json", "trainer_state.json"
RUN_FIELDS = ("method", "objective", "fit_rows", "base", "lora", "recipe", "data", "seed")  # run.py compares plans


class LogWhereSaved(TrainerCallback):
    """Logs a loss wherever a checkpoint is saved, so that a resumed run's means begin where the first run's did."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_log |= control.should_save and args.logging_strategy != "no"

    on_epoch_end = on_step_end


class WholeCheckpoints(Trainer):
    """A Trainer that records a checkpoint's files when all are written, and deletes older checkpoints only then.

    It goes on from a checkpoint to the very log and weights of a run that was not stopped, also from the last step's.

    Attributes:
        run: `run_identity` of the run, to be recorded.
    """

    run: dict[str, Any] = {}
    resumed_step = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(LogWhereSaved())

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        if resume_from_checkpoint is not None:
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / STATE_NAME))
            self.resumed_step = state.global_step
            counted = [entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry]
            self._total_train_tokens = counted[-1] if counted else 0  # TRL's count, which begins anew otherwise
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> tuple:
        """Trainer's, with no epoch to train if the checkpoint is the last step's: it would train one step more."""
        epochs, *others = super().set_initial_training_values(*args, **kwargs)
        return (0 if self.resumed_step and self.resumed_step >= others[-1] else epochs, *others)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            if self.args.should_save:
                make_room(folder)
            with whole_or_nothing(folder):
                if self.args.should_save:
                    begin(folder, MANIFEST_NAME)
                PartialState().wait_for_everyone()
                super()._save_checkpoint(model, trial)
                PartialState().wait_for_everyone()  # each process writes files of its own
                if self.args.should_save:
                    write_manifest(folder, self.run)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save and limit:
            ours = [path for path in checkpoint_folders(folder.parent) if is_from_a_run(path, MANIFEST_NAME)]
            for old in ours[limit:]:
                if str(old) != self.state.best_model_checkpoint:
                    delete_checkpoint(old)


def run_identity(record: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for a run to go on from another's checkpoint, as JSON holds it."""
    run = {name: record[name] for name in RUN_FIELDS if name in record}
    run["recipe"] = {name: value for name, value in run["recipe"].items() if name != "processes"}
    return json.loads(json.dumps(run))


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """What is named as a checkpoint, of the newest step first."""
    steps = {path: path.name.removeprefix("checkpoint-") for path in output_dir.glob("checkpoint-*")}
    found = [path for path, step in steps.items() if step.isdecimal()]
    return sorted(found, key=lambda path: int(steps[path]), reverse=True)


def delete_checkpoint(folder: Path) -> None:
    """Delete the files that a run recorded, and the folder if nothing else is in it; one that is torn as a whole."""
    try:
        recorded = read_manifest(folder)["files"]
    except (ValueError, OSError):
        shutil.rmtree(folder)
        return
    for path in files_in(folder, MANIFEST_NAME):
        if path.relative_to(folder).as_posix() in recorded:
            path.unlink()
    (folder / MANIFEST_NAME).unlink()  # last: until then the folder is known as a run's
    if is_empty(folder):
        shutil.rmtree(folder)


def make_room(folder: Path) -> None:
    """Delete what a run left at a checkpoint's place, damaged or torn, and set aside what no run wrote."""
    if is_from_a_run(folder, MANIFEST_NAME):
        delete_checkpoint(folder)
    if folder.exists() or folder.is_symlink():
        number = 1
        while (aside := folder.with_name(f"{folder.name}.kept-{number}")).exists() or aside.is_symlink():
            number += 1
        folder.rename(aside)
        print(f"{folder} holds what no run recorded; it is {aside.name} now.", flush=True)


def write_manifest(folder: Path, run: dict[str, Any]) -> None:
    recorded = {
        path.relative_to(folder).as_posix(): [path.stat().st_size, digest(path)]
        for path in files_in(folder, MANIFEST_NAME)
    }
    finish(folder, MANIFEST_NAME, json.dumps({"run": run, "files": recorded}, indent=2))


def read_manifest(folder: Path) -> dict[str, Any]:
    """{"run": what run_identity says, "files": {name: [bytes, SHA-256]}} of a checkpoint.

    Raises:
        ValueError: if the file is not such a manifest.
        OSError: if there is none.
    """
    try:
        found = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{MANIFEST_NAME} is nested too deeply.") from error
    if not isinstance(found, dict) or not all(isinstance(found.get(name), dict) for name in ("run", "files")):
        raise ValueError(f"{MANIFEST_NAME} has no run and files.")
    if STATE_NAME not in found["files"]:
        raise ValueError(f"{MANIFEST_NAME} does not list {STATE_NAME}.")
    for name, entry in found["files"].items():
        parts = PurePosixPath(name).parts
        if not isinstance(entry, list) or [type(value) for value in entry] != [int, str] or ".." in parts:
            raise ValueError(f"{MANIFEST_NAME} does not say what {name!r} is.")
    return found


def damage(folder: Path) -> str | None:
    """What keeps a folder from being a whole checkpoint, None if it is one."""
    try:
        recorded = read_manifest(folder)["files"].items()
    except FileNotFoundError:
        return f"it has no {MANIFEST_NAME}, which is written last"
    except (ValueError, OSError):
        return f"its {MANIFEST_NAME} cannot be read"
    for name, (size, sha) in recorded:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
        if digest(path) != sha:
            return f"{name} has changed since it was saved"
    return None


def find_checkpoint(name: str | None, output_dir: str) -> str | None:
    """The folder to resume from; "last" is the newest whole one in `output_dir`.

    Raises:
        ValueError: if there is no whole checkpoint.
    """
    if name is None:
        return None
    found = checkpoint_folders(Path(output_dir)) if name == "last" else [Path(name)]
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
    Args:
        run: `run_identity` of this run, or the fields of it that are known.

    Raises:
        ValueError: if the checkpoint was written by a run with another recipe, seed, base, method or data.
    """
    if checkpoint is None:
        return
    recorded = read_manifest(Path(checkpoint))["run"]
    saved, now = _flat({name: recorded.get(name) for name in run}), _flat(run)
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


def _flat(run: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in run.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
