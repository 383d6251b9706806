"""What a fit has read so far, on disk, so that a killed one goes on: its moments and the number of rows in them.

collect batches --every SAVE_SECONDS--> OUTPUT_DIR/moments.safetensors --the same command again--> collect the rest

A fit of many pictures with a large model takes hours, and its moments are all that it has then. The file is as large
as the moments, and goes when the fit is done.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dpvr.training.latent_fit import Moments, Target, collect

NAME = "moments.safetensors"
SAVE_SECONDS = 600.0
NOT_COMPARED = ("num_samples", "eval_samples", "latent_rank", "latent_stride", "latent_score", "tolerance", "json")
SUMS = ("target", "square", "cross")  # by layer and kind


def check_folder(args: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: if the folder holds anything but what this very fit left there.
    """
    folder, path = args.output_dir, args.output_dir / NAME
    held = {each.name for each in folder.iterdir()} if folder.exists() else set()
    if held - {NAME, NAME + ".part"}:
        raise ValueError(f"The folder {str(folder)!r} is not empty: choose a new one with --output_dir.")
    if path.exists():
        saved, ours = _settings_in(path), _settings(args)
        other = {name: (saved.get(name), value) for name, value in ours.items() if saved.get(name) != value}
        if other:
            listed = ", ".join(f"{name} {one!r} there and {two!r} here" for name, (one, two) in other.items())
            raise ValueError(f"{str(path)!r} is of another fit ({listed}): choose a new --output_dir, or delete it.")


def collect_on(
    target: Target, batches: Callable[[int, int], Iterator[dict[str, torch.Tensor]]], args: argparse.Namespace
) -> Moments:
    """The moments of `args.num_samples` rows, from where an earlier run of the same fit stopped.

    Args:
        batches: of so many rows after the first ones.
    """
    path = args.output_dir / NAME
    moments, taken = _read(path) if path.exists() else (Moments(), 0)
    if taken > args.num_samples:
        raise ValueError(
            f"{str(path)!r} holds {taken} rows already, and --num_samples is {args.num_samples}: choose as many at "
            "least."
        )
    saved = time.monotonic()
    for batch in batches(taken, args.num_samples - taken) if taken < args.num_samples else ():
        collect(target, [batch], moments)
        taken += len(batch["labels"])
        if time.monotonic() - saved >= SAVE_SECONDS:
            _write(path, moments, taken, args)
            saved = time.monotonic()
    return moments


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the moments depend on."""
    values = {name: value for name, value in vars(args).items() if name not in (*NOT_COMPARED, "output_dir", "device")}
    return json.loads(json.dumps(values, default=str))


def _settings_in(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            return {**json.loads(file.metadata()["settings"])}
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{str(path)!r} is no record of a fit ({error}): delete it, or choose a new --output_dir."
        ) from error


def _write(path: Path, moments: Moments, taken: int, args: argparse.Namespace) -> None:
    """Whole or not at all: a run may be killed here as well."""
    tensors = {"state": moments.state, "states": moments.states}
    for name in SUMS:
        tensors |= {f"{name} {index} {kind}": value for (index, kind), value in vars(moments)[name].items()}
    metadata = {"settings": json.dumps(_settings(args)), "rows": str(taken), "count": str(moments.count)}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(NAME + ".part")
    save_file({key: value.contiguous() for key, value in tensors.items()}, part, metadata)
    part.replace(path)


def _read(path: Path) -> tuple[Moments, int]:
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    moments = Moments(int(metadata["count"]), tensors.pop("state"), tensors.pop("states"))
    for key, value in tensors.items():
        name, index, kind = key.split(" ")
        vars(moments)[name][int(index), kind] = value
    return moments, int(metadata["rows"])
