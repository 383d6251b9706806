"""Time and peak memory of a piece of work, on a CPU or a GPU.

timed                           milliseconds, from and to a moment at which the device has nothing left to do
peak_in_a_process_of_its_own    runs a command again with --peak_of METHOD, so that nothing else is in its memory
    |-- resident_peak           what that process reports on a CPU; on a GPU it is the allocator's peak
    `-- peak_beyond             of a piece of work alone, beyond what was in memory before it
"""

import ctypes
import gc
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def check_device(device: str) -> str:
    """Return the name of a device that is here.

    Raises:
        ValueError: for another.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ValueError(f"There is no device {device!r}: choose cpu or cuda.") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device} needs a GPU, and torch finds none here: choose cpu.")
    return device


def synchronize(device: str) -> None:
    """Wait until a GPU has done all it was given."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], Any], device: str) -> tuple[Any, float]:
    """What `work` returns, and the milliseconds it took."""
    synchronize(device)
    start = time.perf_counter()
    result = work()
    synchronize(device)
    return result, 1000 * (time.perf_counter() - start)


def resident_peak() -> int:
    """The most bytes that this process has had in memory; `ru_maxrss` would begin with the parent's."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def peak_beyond(work: Callable[[], Any], device: str) -> int:
    """Bytes at the peak of `work` beyond those in memory before it; on a CPU of Linux, in a process of its own."""
    synchronize(device)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, else `work` would take it unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident_peak()
    work()
    return resident_peak() - before


def peak_in_a_process_of_its_own(module: str, method: str, flags: list[str]) -> int | None:
    """What `module` prints last with these flags and --peak_of, in bytes; None if it does not fit."""
    command = [sys.executable, "-m", module, *flags, "--peak_of", method]
    result = subprocess.run(command, capture_output=True, text=True)
    if "OutOfMemoryError" in result.stderr:
        return None
    if result.returncode:
        raise RuntimeError(
            f"Measuring the peak memory of {method} failed with exit status {result.returncode} (-9: killed, as "
            f"happens without enough memory):\n{result.stderr}"
        )
    return int(result.stdout.split()[-1])
