"""How the training step benchmark measures: every method trains a copy of one LLaVA of random weights.

make_method     the model that a method trains, and AdamW for its weights
    |
interleaved steps in this process       seconds
one forward pass under a hook           bytes that autograd saves for backward
one step in a process of its own        peak memory
"""

import copy
import statistics
import time
from argparse import Namespace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from dpvr.benchmarks import time_and_memory
from dpvr.benchmarks.random_models import make_llava
from dpvr.benchmarks.setups import IMAGE_TOKEN_ID, IMAGE_TOKENS, SHAPES
from dpvr.benchmarks.time_and_memory import resident_peak, synchronize
from dpvr.training.trainers import LORA_TARGETS
from generation_dpvr import IGNORED_LABEL
from modeling_dpvr import DpvrLlavaForConditionalGeneration


def make_batch(args: Namespace) -> dict[str, torch.Tensor]:
    """One picture, then text, half of which carries loss."""
    vocabulary = 1000
    text = torch.randint(IMAGE_TOKEN_ID + 1, vocabulary, (args.batch_size, args.text_tokens))
    image = torch.full((args.batch_size, IMAGE_TOKENS), IMAGE_TOKEN_ID)
    ids = torch.cat([text[:, :1], image, text[:, 1:]], dim=1)
    labels = ids.clone()
    labels[:, : -args.text_tokens // 2] = IGNORED_LABEL
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


def peak_of_one_step(method: str, args: Namespace) -> int:
    """Bytes at the peak of making a model and one step: of this process, which did nothing else, or of the GPU."""
    shape = SHAPES[args.shape]
    before = resident_peak()
    llava = make_llava(shape, args.device, getattr(torch, args.dtype))
    model, optimizer = make_method(method, llava, shape.split_layer)
    step(model, optimizer, make_batch(args))
    if args.device != "cpu":
        return torch.cuda.max_memory_allocated(args.device)
    return resident_peak() - before


def peak_in_a_process_of_its_own(method: str, args: Namespace) -> int | None:
    """None if it does not fit."""
    options = ("shape", "batch_size", "text_tokens", "device", "dtype")
    flags = [text for name in options for text in (f"--{name}", str(vars(args)[name]))]
    return time_and_memory.peak_in_a_process_of_its_own("dpvr.benchmarks.training_step", method, flags)


def measure(args: Namespace) -> list[dict[str, Any]]:
    """A row per method. Peaks come first, while this process holds no model."""
    shape = SHAPES[args.shape]
    peaks = {method: peak_in_a_process_of_its_own(method, args) for method in args.methods}
    fitting = [method for method in args.methods if peaks[method] is not None]
    llava = make_llava(shape, args.device, getattr(torch, args.dtype))
    batch = make_batch(args)
    trained = {method: make_method(method, copy.deepcopy(llava), shape.split_layer) for method in fitting}
    del llava
    saved = {method: saved_activation_bytes(trained[method][0], batch) for method in fitting}
    seconds = steps_in_turn(trained, batch, args)
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


def steps_in_turn(
    trained: dict[str, tuple[nn.Module, torch.optim.Optimizer]], batch: dict[str, torch.Tensor], args: Namespace
) -> dict[str, list[float]]:
    """{method: seconds of its steps after the warm-up}, interleaved: what slows the machine slows all methods.

    Each round begins with the next method, as each is slowed by what the one before it leaves behind.
    """
    names = list(trained)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in tqdm(range(args.warmup + args.steps), desc="Steps", unit="round"):
        first = turn % max(1, len(names))
        for name in names[first:] + names[:first]:
            synchronize(args.device)
            start = time.perf_counter()
            step(*trained[name], batch)
            synchronize(args.device)
            if turn >= args.warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds
