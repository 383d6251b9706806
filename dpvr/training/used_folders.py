"""Whether a run may use a folder, asked before anything is read: nothing in it that the run did not write is lost.

can it be written to? -> is it an earlier run's? -> does anything that no run wrote lie in the way?
"""

import os
import tempfile
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from dpvr.training.checkpoints import MANIFEST_NAME, checkpoint_folders, delete_checkpoint
from dpvr.training.manifests import digest, is_empty, is_from_a_run

STAGING, LIST_NAME, RECORD_NAME = ".saving", "saved.sha256", "training.json"
ADAPTER = "adapter"
WEIGHTS = ("*.safetensors", "*.index.json", "adapter_config.json")  # what a loader would take for the model
IN_THE_WAY = (  # names that a run writes, and those that a loader would take in their place
    "model*.safetensors",
    "model.safetensors.index.json",
    "adapter_*",
    "config.json",
    "generation_config.json",
    "*processor_config.json",
    "chat_template*",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*_dpvr.py",
    RECORD_NAME,
    f"{RECORD_NAME}.part",
    LIST_NAME,
)


class Ours:
    """Which files of a folder a run of ours wrote: those in its list, with the content that the list records.

    Attributes:
        earlier: {name: digest} of what was saved in the folder.
        coming: the same of what a run has saved in `.saving` and not moved to its end.

    Raises:
        ValueError: for a list that is not one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.earlier, self.coming = _read_list(folder), _read_list(folder / STAGING)

    def wrote(self, name: str) -> bool:
        path = self.folder / name
        inside = [self.folder / part for part in PurePosixPath(name).parents if part.name]
        if any(part.is_symlink() for part in (path, *inside)) or not path.is_file():
            return False
        if name in (RECORD_NAME, f"{RECORD_NAME}.part"):  # the scores are added to it, so its digest is not recorded
            return bool(self.earlier or self.coming)
        if name == LIST_NAME:
            return True  # or it would not have been read
        recorded = {self.earlier.get(name), self.coming.get(name)} - {None}
        return bool(recorded) and digest(path) in recorded


def check_output_folder(output_dir: str, base: str, *, resumed: bool, overwrite: bool) -> None:
    """Make sure that a run will be able to write and may, before anything is read; nothing is changed.

    Raises:
        ValueError: if it could not, if the base or an earlier run is there, or if something that no run wrote is in
            the way.
    """
    folder = Path(output_dir).absolute()
    _check_writable(folder, output_dir)
    if not folder.is_dir():
        return
    if Path(base).is_dir() and folder.samefile(base):
        raise ValueError(
            f"{output_dir!r} is the folder of the base, and its weights would be overwritten: save to a new folder."
        )
    ours = Ours(folder)
    if not (resumed or overwrite) and (found := traces(folder)):
        raise ValueError(
            f"--output_dir {output_dir!r} is used: an earlier run wrote {found[0]} there. Go on with that run with "
            "--resume_from_checkpoint last, name another folder, or give --overwrite_output_dir, which deletes that "
            "run's checkpoints and, once the new model is saved, its model; other files are left alone."
        )
    refuse_what_is_in_the_way(folder, ours)
    for checkpoint in [] if resumed else checkpoint_folders(folder):
        if not is_from_a_run(checkpoint, MANIFEST_NAME):
            raise _in_the_way(checkpoint)


def traces(folder: Path) -> list[str]:
    """What shows that an earlier run used a folder."""
    lists = [(folder / STAGING, LIST_NAME), *((path, MANIFEST_NAME) for path in checkpoint_folders(folder))]
    found = [path for path, name in lists if is_from_a_run(path, name) and not is_empty(path)]
    return [LIST_NAME] * (folder / LIST_NAME).exists() + [path.name for path in found]


def refuse_what_is_in_the_way(folder: Path, ours: Ours) -> None:
    """
    Raises:
        ValueError: naming the first file or folder that the run would write over, or that would load in its place.
    """
    staging, adapter = folder / STAGING, folder / ADAPTER
    if (staging.exists() or staging.is_symlink()) and not is_from_a_run(staging, LIST_NAME):
        raise _in_the_way(staging)
    if adapter.is_symlink() or (adapter.exists() and not adapter.is_dir()):
        raise _in_the_way(adapter)
    inside = sorted(adapter.iterdir()) if adapter.is_dir() else []
    for path in [*sorted(folder.iterdir()), *inside]:
        name = path.relative_to(folder).as_posix()
        reserved = name in ours.coming or any(fnmatch(path.name, pattern) for pattern in IN_THE_WAY)
        if reserved and not ours.wrote(name):
            raise _in_the_way(path, changed=name in ours.earlier)


def delete_checkpoints(output_dir: str) -> None:
    """Delete an earlier run's checkpoints, for a new run in its folder."""
    for folder in checkpoint_folders(Path(output_dir)):
        if is_from_a_run(folder, MANIFEST_NAME):
            delete_checkpoint(folder)


def is_weights(name: str) -> bool:
    return any(fnmatch(PurePosixPath(name).name, pattern) for pattern in WEIGHTS)


def _check_writable(folder: Path, output_dir: str) -> None:
    try:
        if not output_dir:
            raise ValueError("it has no name")
        there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x" * 4096)
        if there != folder:  # whose name may be too long, or none
            with tempfile.TemporaryDirectory(dir=there) as beside:
                Path(beside, *folder.relative_to(there).parts).mkdir(parents=True)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(
            f"--output_dir {output_dir!r} cannot be written to ({reason}): name a folder that can, with free space "
            "for the checkpoints and the result."
        ) from error


def _in_the_way(path: Path, changed: bool = False) -> ValueError:
    whose = "has changed since a run saved it" if changed else "was not written by a training run"
    return ValueError(
        f"{path} {whose}, and the run would write in its place: move it away, or name another --output_dir."
    )


def _read_list(folder: Path) -> dict[str, str]:
    path = folder / LIST_NAME
    if not path.exists() and not path.is_symlink():
        return {}
    recorded = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            sha, name = line.split("  ", 1)
            if len(sha) != 64 or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError
            recorded[name] = sha
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path} is not the list of saved files that a training run writes: move it away, or name another "
            "--output_dir."
        ) from error
    return recorded
