"""How the latency benchmark measures: rounds in which every method answers once, and a row of medians for each.

a round       methods in turn, each round beginning with the next of them
    |
an answer     prefill into a fresh cache, then tokens one by one; PhaseClock times the parts of the prefill
    |
a row         medians over rounds, and ratios to vanilla, each taken within a round: what slows one slows both
"""

import statistics
from argparse import Namespace
from contextlib import nullcontext
from typing import Any

import torch
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from dpvr.benchmarks import time_and_memory
from dpvr.benchmarks.latency_families import FamilyBench, FamilySize
from dpvr.benchmarks.latency_methods import (
    LlavaBench,
    Machine,
    Row,
    Size,
    kernels_of,
    make_base,
    make_method,
    make_prompt,
    plan_of,
    sizes,
)
from dpvr.benchmarks.phase_clock import PARTS, PhaseClock
from dpvr.benchmarks.time_and_memory import resident_peak, timed
from versions_dpvr import cache_name

SQUARE = 2048  # wide is the matrix by which the machine's speed is measured
TIMES = ("prefill_ms", "prefill_without_tower_ms", "decode_ms_per_token")
Bench = LlavaBench | FamilyBench


def make_cache(kind: str, model: PreTrainedModel, room: int) -> Cache:
    config = model.config
    return StaticCache(config=config, max_cache_len=room) if kind == "static" else DynamicCache(config=config)


@torch.inference_mode()
def answer(
    model: PreTrainedModel, prompt: dict[str, Any], kind: str, clock: PhaseClock | None, device: str, new_tokens: int
) -> Row:
    """One answer: milliseconds of the prefill and of each token, and the bytes that the cache's tensors hold.

    Without a clock there is no tower in the prefill, and its parts are not told apart.
    """
    length, named = prompt["input_ids"].shape[1], cache_name(type(model).forward)
    cache = make_cache(kind, model, length + new_tokens)
    split = None if clock is None else plan_of(model).split_layer
    with clock.listening(model, split) if clock is not None and device == "cpu" else nullcontext():
        _, prefill_ms = timed(lambda: model(**prompt, **{named: cache}, logits_to_keep=1), device)
    if clock is not None and device != "cpu":  # where listening waits for the device at every part: in a prefill that
        with clock.listening(model, split):  # is not timed
            model(**prompt, **{named: make_cache(kind, model, length)}, logits_to_keep=1)
    phases = None if clock is None else clock.milliseconds()
    layers = [layer for layer in cache.layers if isinstance(vars(layer).get("keys"), torch.Tensor)]
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    return {
        "prefill_ms": None if clock is None else prefill_ms,
        "prefill_without_tower_ms": prefill_ms if clock is None else prefill_ms - phases["tower"],
        "phases_ms": phases,
        "decode_ms_per_token": decode(model, prompt["input_ids"], cache, new_tokens, device),
        "kv_bytes": held,
        "kv_reuse": int(cache.get_seq_length()) == length + new_tokens,
    }


def decode(model: PreTrainedModel, input_ids: torch.Tensor, cache: Cache, new_tokens: int, device: str) -> float:
    """The median of the milliseconds that a token takes after the prompt."""
    (rows, length), token, tokens_ms = input_ids.shape, input_ids[:, -1:], []
    for index in range(new_tokens):
        place = torch.full((rows, 1), length + index, device=device)
        options = {"position_ids": place, cache_name(type(model).forward): cache, "logits_to_keep": 1}
        output, milliseconds = timed(lambda: model(input_ids=token, **options), device)  # noqa: B023
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        tokens_ms.append(milliseconds)
    return statistics.median(tokens_ms)


def peak_of_one_prefill(name: str, args: Namespace, bench: Bench) -> int:
    """Bytes at the peak of making a model and one prefill: of this process, which did nothing else, or of the GPU.

    Of a model of any family, whose tower is made and let go, those of the prefill alone.
    """
    machine = bench.machine
    if isinstance(bench, FamilyBench):
        return bench.peak_of_one_prefill(name)
    before = resident_peak()
    llava, split_layer = make_base(args.shape, machine)
    model = make_method(name, llava, split_layer)
    prompt = make_prompt(llava, next(sizes(args)), machine)
    with torch.inference_mode(), kernels_of(name, llava):
        model(**prompt, **{cache_name(type(model).forward): DynamicCache()}, logits_to_keep=1)
    return torch.cuda.max_memory_allocated(machine.device) if machine.device != "cpu" else resident_peak() - before


def peak_in_a_process_of_its_own(name: str, size: Size | FamilySize, bench: Bench) -> int | None:
    """None if it does not fit."""
    values = {"device": bench.machine.device, "dtype": dtype_name(bench.machine), "batch_sizes": size.batch_size}
    values["text_tokens"] = size.text_tokens
    if isinstance(bench, FamilyBench):
        values |= {"model": bench.args.model, "methods": name, "image_tokens": size.image_tokens}
        values["threads"] = torch.get_num_threads()
    else:
        values |= {"shape": bench.shape, "num_images": size.num_images}
    flags = [text for option, value in values.items() for text in (f"--{option}", str(value))]
    return time_and_memory.peak_in_a_process_of_its_own("dpvr.benchmarks.latency", name, flags)


def make_bench(args: Namespace) -> Bench:
    """What is measured: a LLaVA in a shape, or a model of any family."""
    return LlavaBench(args) if args.model is None else FamilyBench(args)


def measure(args: Namespace, bench: Bench) -> list[Row]:
    """A row per prompt size, kind of cache and method.

    Peaks come first, while this process holds no model, unless it has to choose their number format with one.
    """
    if choose_dtype := bench.machine.device == "cpu" and args.model is not None and args.dtype is None:
        bench.load()
    able = [] if args.skip_peaks else [name for name in bench.names if bench.why_not(name) is None]
    peaks = {size: {name: peak_in_a_process_of_its_own(name, size, bench) for name in able} for size in bench.sizes()}
    if not choose_dtype:
        bench.load()
    return [
        row
        for size in bench.sizes()
        for kind in args.caches
        for row in measure_size(bench, size, kind, peaks[size], args)
    ]


def measure_size(
    bench: Bench, size: Size | FamilySize, kind: str, peaks: dict[str, int | None], args: Namespace
) -> list[Row]:
    """A row per method."""
    notes = {
        name: bench.why_not(name) or ("does not fit" if peaks.get(name, 0) is None else None) for name in bench.names
    }
    running = [name for name in bench.names if notes[name] is None]
    runs = dict.fromkeys(bench.names, ()) | answers_in_turn(running, bench, size, kind, args)
    rows = []
    for name in bench.names:
        row = {"method": name, "shape": bench.shape, **size._asdict(), "cache": kind, "note": notes[name]}
        row |= bench.count(name, size)
        if runs[name]:
            row |= medians(runs[name])
        row |= {"peak_bytes": None, "prefill_peak_bytes": None, bench.peak: peaks.get(name)}
        rows.append(row | {name: None for name in (*TIMES, "phases_ms", "kv_reuse") if name not in row})
    for row in rows:
        row["ratio_to_vanilla"] = ratios(row, rows[0], runs[row["method"]], runs[rows[0]["method"]])
    return rows


def answers_in_turn(
    names: list[str], bench: Bench, size: Size | FamilySize, kind: str, args: Namespace
) -> dict[str, list[Row]]:
    """{method: its answer in every round after the warm-up}. Each round begins with the next method."""
    runs: dict[str, list[Row]] = {name: [] for name in names}
    if not (names and args.rounds):
        return runs
    prompt, device = bench.prompt(size), bench.machine.device
    for turn in tqdm(range(args.warmup + args.rounds), desc=str(size), unit="round"):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            with bench.running(name) as model:
                found = answer(model, prompt, kind, bench.clock, device, args.new_tokens)
            if turn >= args.warmup:
                runs[name].append(found)
    return runs


def medians(runs: list[Row]) -> Row:
    """Medians of the times with their 10th and 90th percentiles; and what is the same in all runs."""
    first = runs[0]
    row = {"kv_bytes": first["kv_bytes"], "kv_reuse": first["kv_reuse"]}
    for name in TIMES:
        if first[name] is not None:
            low, row[name], high = spread([run[name] for run in runs])
            row[f"{name}_spread"] = [low, high]
    if first["phases_ms"] is not None:
        row["phases_ms"] = {part: statistics.median(run["phases_ms"][part] for run in runs) for part in PARTS}
    return row


def ratios(row: Row, base: Row, runs: list[Row], base_runs: list[Row]) -> dict[str, Any]:
    """To vanilla: of times within a round, their median and spread; of what is counted, as it is."""
    found = {name: row[name] / base[name] if row[name] else None for name in ("kv_bytes", "prefill_flops")}
    for name in ("peak_bytes", "prefill_peak_bytes"):
        found[name] = row[name] / base[name] if row[name] and base[name] else None
    for name in TIMES:
        found[name] = None
        if runs and base_runs and row[name] is not None:
            low, found[name], high = spread([a[name] / b[name] for a, b in zip(runs, base_runs, strict=True)])
            found[f"{name}_spread"] = [low, high]
    return found


def spread(values: list[float]) -> list[float]:
    """The 10th percentile, the median and the 90th percentile."""
    percentiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    return torch.tensor(values, dtype=torch.float64).quantile(percentiles).tolist()


def machine_speed(machine: Machine) -> dict[str, float] | None:
    """What this machine reaches: FLOPs a second in a square product, bytes a second in one with a vector."""
    if machine.device == "meta":
        return None
    square, tall, vector = (
        torch.randn(*shape, device=machine.device, dtype=machine.dtype)
        for shape in ((SQUARE, SQUARE), (16 * SQUARE, SQUARE), (SQUARE,))
    )
    with torch.inference_mode():
        product = min(timed(lambda: square @ square, machine.device)[1] for _ in range(5))
        reading = min(timed(lambda: tall @ vector, machine.device)[1] for _ in range(5))
    return {"flops_per_second": 2 * SQUARE**3 / product * 1e3, "bytes_per_second": tall.nbytes / reading * 1e3}


def dtype_name(machine: Machine) -> str:
    return str(machine.dtype).removeprefix("torch.")
