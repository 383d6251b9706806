"""The files in `results/`: how they are written, and what each says of its command, hardware and versions."""

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

TOKEN = re.compile(r"(?<=token[ =])\S+|\bhf_\w{8,}")
ABSOLUTE = re.compile(r"(?<![^\s=])/(?:[^\s/]+/)*(?=[^\s/])")
PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "scikit-learn")


def run_record(script: str, packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """The record of this process, started as `python` + `script` + its arguments, without tokens and folders.

    Args:
        packages: whose versions matter; they are installed.
    """
    return {
        "command": without_folders(TOKEN.sub("...", " ".join(["python", *script.split(), *sys.argv[1:]]))),
        "commit": READ_FROM,
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def publish(document: dict[str, Any], path: str | Path | None, as_json: bool = False) -> None:
    """Write what a command found to a file, if one is named; with `as_json` it is the last line of standard output."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        print(f"Written to {path}.")
    if as_json:
        print(json.dumps(document))


def publish_section(name: str, section: dict[str, Any], path: str | Path) -> None:
    """Put what a command found into its own section of a file that other commands write to as well."""
    document = json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).exists() else {}
    publish({**document, name: section}, path)


def commit(folder: Path = Path(__file__).parent) -> str | None:
    """The commit of the code in a folder, with "+" if files differ from it; None outside a repository."""
    git = ["git", "-C", str(folder)]
    try:
        found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return found + "+" * bool(changed)


def without_folders(text: str) -> str:
    """A text with its absolute paths shortened to their last part: the rest says nothing to others."""
    return ABSOLUTE.sub(".../", text)


def hardware() -> str:
    """The GPU's name if there is one, else the processor's, and the number of cores."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {os.cpu_count()} CPU cores"
    return f"{_processor()}, {os.cpu_count()} cores, no GPU"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


READ_FROM = commit()  # when this process began: files may be changed while it runs
