"""What a training step costs: late fusion beside LoRA and full fine-tuning, on one LLaVA of random weights.

    one LLaVA, one batch  -->  late_fusion | lora_r16 | lora_r64 | full     a copy of the model each
                                   |
    interleaved steps          seconds per step: median, and the spread from the 10th to the 90th percentile
    one step under a hook      bytes that autograd saves for backward, weights not counted
    one step in a process      peak memory over what Python and the libraries take (on a GPU: the allocator's peak)
    of its own                     |
    standard output            a table, and one JSON document as the last line     --output FILE writes it as well

Paper sections 3.4 and 4.2. Below the side branch and in the text-only layers nothing is saved for backward.

    python -m dpvr.benchmarks.training_step                # 512 wide, 32 layers, batch 2, on a CPU
    python -m dpvr.benchmarks.training_step --shape llava-1.5-7b --batch_size 4 --device cuda --dtype bfloat16
"""

import argparse
import copy
import statistics
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from dpvr.benchmarks import random_models as bench
from dpvr.benchmarks.random_models import (
    IMAGE_TOKEN_ID,
    IMAGE_TOKENS,
    SHAPES,
    Shape,
    make_llava,
    resident_peak,
    synchronize,
)
from dpvr.record import publish, run_record
from modeling_dpvr import DpvrLlavaForConditionalGeneration
from train_sft import LORA_TARGETS

METHODS = ("late_fusion", "lora_r16", "lora_r64", "full")


def make_batch(shape: Shape, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """One picture, then text, half of which carries loss."""
    vocabulary = 1000
    text = torch.randint(IMAGE_TOKEN_ID + 1, vocabulary, (args.batch_size, args.text_tokens))
    image = torch.full((args.batch_size, IMAGE_TOKENS), IMAGE_TOKEN_ID)
    ids = torch.cat([text[:, :1], image, text[:, 1:]], dim=1)
    labels = ids.clone()
    labels[:, : -args.text_tokens // 2] = -100
    pixels = torch.randn(args.batch_size, 3, 336, 336, dtype=getattr(torch, args.dtype))
    return {name: tensor.to(args.device) for name, tensor in
            {"input_ids": ids, "labels": labels, "pixel_values": pixels}.items()}  # fmt: skip


def make_method(
    method: str, llava: LlavaForConditionalGeneration, split_layer: int
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model that a method trains, with only its weights requiring gradients, and AdamW for them."""
    if method == "late_fusion":
        model = DpvrLlavaForConditionalGeneration.from_llava(llava, split_layer=split_layer)
        model.side_branch.float()  # as train_sft.py and PEFT train, whatever the base is in
        model.freeze_base()
    elif method.startswith("lora_r"):
        rank = int(method.removeprefix("lora_r"))
        model = get_peft_model(llava, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LORA_TARGETS))
    else:
        model = llava
        model.model.vision_tower.requires_grad_(False)
    model.train()
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.0)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> None:
    model(**batch, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def saved_activation_bytes(model: nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """Bytes of the distinct storages that autograd saves in one forward pass, parameters not counted."""
    own = {weight.untyped_storage().data_ptr() for weight in [*model.parameters(), *model.buffers(), *batch.values()]}
    saved = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch, use_cache=False).loss
    total = sum(saved.values())
    del loss
    return total


def peak_of_one_step(method: str, args: argparse.Namespace) -> int:
    """Bytes at the peak of making a model and one step: of this process, which did nothing else, or of the GPU."""
    shape = SHAPES[args.shape]
    before = resident_peak()
    llava = make_llava(shape, args.device, getattr(torch, args.dtype), args.seed)
    model, optimizer = make_method(method, llava, shape.split_layer)
    step(model, optimizer, make_batch(shape, args))
    if args.device != "cpu":
        return torch.cuda.max_memory_allocated(args.device)
    return resident_peak() - before


def peak_in_a_process_of_its_own(method: str, args: argparse.Namespace) -> int | None:
    """None if it does not fit."""
    options = ("shape", "batch_size", "text_tokens", "device", "dtype", "seed")
    flags = [text for name in options for text in (f"--{name}", str(vars(args)[name]))]
    return bench.peak_in_a_process_of_its_own("dpvr.benchmarks.training_step", method, flags)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per method. Their steps are interleaved, so that what slows the machine slows them all."""
    shape, dtype = SHAPES[args.shape], getattr(torch, args.dtype)
    peaks = {method: peak_in_a_process_of_its_own(method, args) for method in args.methods}
    fitting = [method for method in args.methods if peaks[method] is not None]
    llava = make_llava(shape, args.device, dtype, args.seed)
    batch = make_batch(shape, args)
    trained = {method: make_method(method, copy.deepcopy(llava), shape.split_layer) for method in fitting}
    del llava
    saved = {method: saved_activation_bytes(trained[method][0], batch) for method in fitting}
    seconds: dict[str, list[float]] = {method: [] for method in fitting}
    for turn in tqdm(range(args.warmup + args.steps), desc="Steps", unit="round"):
        first = turn % len(fitting)
        for method in fitting[first:] + fitting[:first]:  # whoever follows another is slowed by what that left behind
            synchronize(args.device)
            start = time.perf_counter()
            step(*trained[method], batch)
            synchronize(args.device)
            if turn >= args.warmup:
                seconds[method].append(time.perf_counter() - start)
    return [
        {"method": method, "fits": False}
        if method not in fitting
        else {
            "method": method,
            "seconds_per_step": statistics.median(seconds[method]),
            "spread": [float(edge) for edge in torch.tensor(seconds[method]).quantile(torch.tensor([0.1, 0.9]))],
            "saved_activation_bytes": saved[method],
            "peak_bytes": peaks[method],
            "trainable_parameters": sum(p.numel() for p in trained[method][0].parameters() if p.requires_grad),
        }
        for method in args.methods
    ]


def print_table(rows: list[dict[str, Any]]) -> None:
    first = next((row for row in rows if "seconds_per_step" in row), None)
    print(f"{'method':<14}{'s/step':>9}{'ratio':>8}{'saved MB':>11}{'peak MB':>10}{'trained':>15}")
    for row in rows:
        if "seconds_per_step" not in row:
            print(f"{row['method']:<14}does not fit")
            continue
        seconds, saved, peak = (row[name] for name in ("seconds_per_step", "saved_activation_bytes", "peak_bytes"))
        ratio = seconds / first["seconds_per_step"]
        numbers = f"{seconds:>9.3f}{ratio:>8.2f}{saved / 1e6:>11.0f}{peak / 1e6:>10.0f}"
        print(f"{row['method']:<14}{numbers}{row['trainable_parameters']:>15,}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what a training step costs, method by method.")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="512x32")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--text_tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10, help="measured steps of each method")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="also write the JSON document to this file")
    parser.add_argument("--peak_of", choices=METHODS, help="print the peak memory of one step and nothing else")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    if args.peak_of is not None:
        print(peak_of_one_step(args.peak_of, args))
        return
    rows = measure(args)
    print_table(rows)
    names = ("shape", "batch_size", "text_tokens", "steps", "warmup", "device", "dtype", "seed")
    settings = {name: vars(args)[name] for name in names}
    document = {
        **run_record("-m dpvr.benchmarks.training_step"),
        **settings,
        "image_tokens": IMAGE_TOKENS,
        "rows": rows,
    }
    publish(document, args.output)


if __name__ == "__main__":
    main(parse_args())
