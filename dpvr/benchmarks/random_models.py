"""What the benchmarks of cost share: LLaVAs of random weights in several sizes, a clock, and peak memory.

    Shape -> make_llava            a decoder and a tower of 576 patches, on a device or on "meta", without weights
    timed                          milliseconds, after the device has caught up
    peak_in_a_process_of_its_own   starts a command anew with --peak_of METHOD, so that nothing else is in its memory

Used by benchmark_training.py and benchmark_latency.py.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

IMAGE_TOKENS, IMAGE_TOKEN_ID = 576, 3


class Shape(NamedTuple):
    """Width and depth of the decoder and of a tower of 576 patches, and where late fusion splits."""

    width: int
    mlp_width: int
    layers: int
    heads: int
    split_layer: int
    vision_width: int
    vision_layers: int


SHAPES = {
    "512x32": Shape(512, 1376, 32, 8, 18, 64, 2),
    "1024x32": Shape(1024, 2752, 32, 16, 18, 64, 2),
    "llava-1.5-7b": Shape(4096, 11008, 32, 32, 18, 1024, 24),
    "llava-1.5-13b": Shape(5120, 13824, 40, 40, 24, 1024, 24),
    "64x4": Shape(64, 128, 4, 4, 2, 32, 2),
}


def make_llava(shape: Shape, device: str, dtype: torch.dtype, seed: int) -> LlavaForConditionalGeneration:
    """A LLaVA of random weights: pictures of 336 pixels in patches of 14, as LLaVA-1.5."""
    text = LlamaConfig(
        vocab_size=32064 if shape.width >= 4096 else 1000,
        hidden_size=shape.width,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
    )
    vision = CLIPVisionConfig(
        hidden_size=shape.vision_width,
        intermediate_size=4 * shape.vision_width,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=max(1, shape.vision_width // 64),
        image_size=336,
        patch_size=14,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN_ID, image_seq_length=IMAGE_TOKENS
    )
    torch.manual_seed(seed)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # built in it at once: a conversion would be the peak of all memory
    try:
        with torch.device(device):
            return LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(usual)


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], Any], device: str, clock: Callable[[], float] = time.perf_counter) -> tuple[Any, float]:
    """What `work` returns, and the milliseconds it took by a clock in seconds."""
    synchronize(device)
    start = clock()
    result = work()
    synchronize(device)
    return result, 1000 * (clock() - start)


def resident_peak() -> int:
    """The most bytes that this process has had in memory; `ru_maxrss` would begin with the parent's."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


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
