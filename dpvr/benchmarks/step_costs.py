"""How the training step benchmark measures: every method trains on one model of random weights.

make_base       a LLaVA in a shape of setups.py, or a model of any family; its weights are shared by all methods
    |           but full fine-tuning
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
from transformers import PreTrainedModel

from adapter_dpvr import DpvrConfig
from dpvr.benchmarks import time_and_memory
from dpvr.benchmarks.latency_families import FamilySize, make_prompt, make_random, plan_fields, why_refused
from dpvr.benchmarks.latency_methods import Machine
from dpvr.benchmarks.random_models import make_llava
from dpvr.benchmarks.setups import IMAGE_TOKEN_ID, IMAGE_TOKENS, SHAPES
from dpvr.benchmarks.time_and_memory import resident_peak, synchronize
from dpvr.cost_table import load_config
from dpvr.training.activations import counting_saved
from dpvr.training.trainers import lora_targets
from generation_dpvr import IGNORED_LABEL
from modeling_dpvr import DpvrLlavaForConditionalGeneration


def check_methods(args: Namespace) -> None:
    """
    Raises:
        ValueError: for a plan that the model's decoder cannot run.
    """
    if args.model is None:
        return
    config = load_config(args.model)
    for method in plan_fields(config).keys() & set(args.methods):
        if reason := why_refused(method, config):
            raise ValueError(f"{args.model} cannot train {method}: {reason} Or leave it out of --methods.")


def make_base(args: Namespace) -> PreTrainedModel:
    """The model of random weights that all methods start from, frozen."""
    dtype = getattr(torch, args.dtype)
    if args.model is not None:
        return make_random(load_config(args.model), Machine(args.device, dtype))
    return make_llava(SHAPES[args.shape], args.device, dtype).requires_grad_(False)


def make_batch(model: PreTrainedModel, args: Namespace) -> dict[str, Any]:
    """One picture, then text, half of which carries loss."""
    rows, text = args.batch_size, args.text_tokens
    if args.model is not None:
        batch = make_prompt(model, FamilySize(rows, text, IMAGE_TOKENS))
        ids = batch["input_ids"]
    else:
        drawn = torch.randint(IMAGE_TOKEN_ID + 1, 1000, (rows, text))
        image = torch.full((rows, IMAGE_TOKENS), IMAGE_TOKEN_ID)
        ids = torch.cat([drawn[:, :1], image, drawn[:, 1:]], dim=1).to(args.device)
        pixels = torch.randn(rows, 3, 336, 336, dtype=getattr(torch, args.dtype))
        batch = {"input_ids": ids, "pixel_values": pixels.to(args.device)}
    labels = ids.clone()
    labels[:, : -text // 2] = IGNORED_LABEL
    return {**batch, "labels": labels}


def make_method(method: str, base: PreTrainedModel, args: Namespace) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model that a method trains, with only its weights requiring gradients, and AdamW for them.

    Its modules are its own; its weights are the base's, but for those that are trained.
    """
    shared = {} if method == "full" else {id(weight): weight for weight in base.parameters()}
    model = copy.deepcopy(base, shared)
    if method == "full":
        model.requires_grad_(True)
        if args.model is None:
            model.model.vision_tower.requires_grad_(False)
    elif method.startswith("lora_r"):
        rank = int(method.removeprefix("lora_r"))
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=lora_targets(model)))
    elif args.model is not None:
        model = get_peft_model(model, DpvrConfig(**plan_fields(model.config)[method]))
    else:
        model = DpvrLlavaForConditionalGeneration.from_llava(model, split_layer=SHAPES[args.shape].split_layer)
        model.side_branch.float()  # as train_sft.py and PEFT train, whatever the base is in
        model.freeze_base()
    model.train()
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.0)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Any]) -> None:
    model(**batch, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def saved_activation_bytes(model: nn.Module, batch: dict[str, Any]) -> int:
    """Bytes of the distinct storages that autograd saves in one forward pass, parameters and inputs not counted."""
    inputs = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    with counting_saved([*model.parameters(), *model.buffers(), *inputs]) as saved:
        loss = model(**batch, use_cache=False).loss
    del loss
    return saved.bytes


def peak_of_one_step(method: str, args: Namespace) -> int:
    """Bytes at the peak of making a model and one step: of this process, which did nothing else, or of the GPU."""
    before = resident_peak()
    base = make_base(args)
    batch = make_batch(base, args)
    model, optimizer = make_method(method, base, args)
    del base
    step(model, optimizer, batch)
    if args.device != "cpu":
        return torch.cuda.max_memory_allocated(args.device)
    return resident_peak() - before


def peak_in_a_process_of_its_own(method: str, args: Namespace) -> int | None:
    """None if it does not fit."""
    which = "shape" if args.model is None else "model"
    options = (which, "batch_size", "text_tokens", "device", "dtype")
    flags = [text for name in options for text in (f"--{name}", str(vars(args)[name]))]
    return time_and_memory.peak_in_a_process_of_its_own("dpvr.benchmarks.training_step", method, flags)


def measure(args: Namespace) -> list[dict[str, Any]]:
    """A row per method. Peaks come first, while this process holds no model."""
    peaks = {method: peak_in_a_process_of_its_own(method, args) for method in args.methods}
    fitting = [method for method in args.methods if peaks[method] is not None]
    base = make_base(args)
    batch = make_batch(base, args)
    trained = {method: make_method(method, base, args) for method in fitting}
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
    trained: dict[str, tuple[nn.Module, torch.optim.Optimizer]], batch: dict[str, Any], args: Namespace
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
