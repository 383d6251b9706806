"""Lists of what a run wrote, with SHA-256 digests: what is whole, what is ours, and what is somebody else's.

    begin(folder)    a new folder with an empty "<list>.part" in it: a run is writing here
    the run's files
    finish(folder)   "<list>.part" -> "<list>", in one step and last

A folder with the list is whole, one with the part is torn, and one with neither was not written by a run.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

PART = ".part"


def begin(folder: Path, list_name: str) -> None:
    """Make a new folder for a run's files."""
    folder.mkdir(parents=True)
    (folder / f"{list_name}{PART}").touch()


def finish(folder: Path, list_name: str, text: str) -> None:
    _replace(folder / list_name, text)


def write_whole(path: Path, text: str) -> None:
    """Write a file that is whole at any time: the earlier one, or the new one."""
    try:
        _replace(path, text)
    except OSError as error:
        path.with_name(f"{path.name}{PART}").unlink(missing_ok=True)
        raise _full(path, error) from error


def is_from_a_run(folder: Path, list_name: str) -> bool:
    """Whether a run wrote a folder, whole or torn, or there is no file in it to lose."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    if (folder / list_name).is_file() or (folder / f"{list_name}{PART}").is_file():
        return True
    return is_empty(folder)


def is_empty(folder: Path) -> bool:
    """Whether there is nothing but folders in a folder."""
    return all(path.is_dir() and not path.is_symlink() for path in folder.rglob("*"))


def files_in(folder: Path, list_name: str) -> list[Path]:
    """The files of a folder without its list, sorted by name."""
    lists = {folder / list_name, folder / f"{list_name}{PART}"}
    return sorted(path for path in folder.rglob("*") if path.is_file() and path not in lists)


def digest(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            sha.update(block)
    return sha.hexdigest()


@contextmanager
def whole_or_nothing(folder: Path) -> Iterator[None]:
    """Delete a folder that could not be written to its end, such as on a full disk.

    Raises:
        OSError: with the folder and the reason, in place of the libraries' several errors.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # torch.save's file
            raise
        raise _full(folder, error) from error


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(f"{path.name}{PART}")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _full(path: Path, error: Exception) -> OSError:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error).splitlines()[0]
    return OSError(
        f"{path} could not be written ({reason}), and nothing half written was left there. Make room, then go on from "
        "the last checkpoint with --resume_from_checkpoint last, if the run saved any."
    )
