"""How `python -m dpvr.benchmarks.fit_time` measures: one model of random weights, one picture at a time."""

import statistics
from argparse import Namespace
from functools import partial
from typing import Any

import torch
from peft import get_peft_model
from tqdm import tqdm

from adapter_dpvr import DpvrConfig
from decoders_dpvr import lowest_split
from dpvr.benchmarks.latency_families import FamilySize, make_prompt, make_random, shape_name
from dpvr.benchmarks.latency_methods import Machine
from dpvr.benchmarks.time_and_memory import check_device, resident_peak, timed
from dpvr.cost_table import load_config
from dpvr.training.fit_run import moments_bytes
from dpvr.training.latent_fit import Moments, Target, collect, solve
from versions_dpvr import LINE_4


@torch.inference_mode()
def measure(args: Namespace) -> dict[str, Any]:
    """Medians over pictures, and the ratio of the two times of each picture with its 10th and 90th percentiles.

    Raises:
        ValueError: for a device that is not here, a model that no latent is supported in, and transformers 4.
    """
    if LINE_4:
        raise ValueError(
            "The image's features are given, which transformers 4 does not take: pip install 'transformers>=5.18'."
        )
    device, config = check_device(args.device), load_config(args.model)
    rank = args.latent_rank or config.get_text_config().hidden_size // 4
    fields = DpvrConfig(routing="latent", split_layer=max(1, lowest_split(config)), latent_rank=rank)
    fields.plan_for(config)
    base = make_random(config, Machine(device, getattr(torch, args.dtype)))
    model = get_peft_model(base, fields, autocast_adapter_dtype=False).eval()
    target, moments, seconds = Target.of(model), Moments(), []
    for number in tqdm(range(args.warmup + args.pictures), desc="Pictures"):
        prompt = make_prompt(base, FamilySize(1, args.text_tokens, args.image_tokens))
        works = [partial(_prefill, model, prompt), partial(collect, target, [prompt], moments)]
        times = {index: timed(works[index], device)[1] / 1000 for index in ((0, 1) if number % 2 else (1, 0))}
        if number >= args.warmup:
            seconds.append(times)
    solution, milliseconds = timed(lambda: solve(moments), device)
    solution.put_into(target.latent)
    ratios = torch.tensor([each[1] / each[0] for each in seconds], dtype=torch.float64)
    return {
        "shape": shape_name(args.model),
        "plan": str(target.plan),
        "latent_rank": rank,
        "pictures": args.pictures,
        "prefill_seconds": statistics.median(each[0] for each in seconds),
        "fit_seconds": statistics.median(each[1] for each in seconds),
        "ratio": ratios.quantile(torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)).tolist(),
        "solve_seconds": milliseconds / 1000,
        "moments_bytes": moments_bytes(moments),
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device != "cpu" else resident_peak(),
    }


def _prefill(model: torch.nn.Module, prompt: dict[str, Any]) -> None:
    """Of the base, with the last token's logits."""
    with model.disable_adapter():
        model(**prompt, use_cache=False, logits_to_keep=1)
