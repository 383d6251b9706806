"""The work of `python -m dpvr.serving.benchmark`."""

import argparse
import json
import os
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import CLIPVisionConfig

from adapter_dpvr import DpvrConfig
from configuration_dpvr import JOINT, DpvrLlavaConfig, LayerPlan
from dpvr.inference.comparison import ratio_of
from dpvr.record import publish, run_record
from dpvr.serving.check_run import vllm_package
from dpvr.serving.server_check import MEMORY
from modeling_dpvr import DpvrLlavaForConditionalGeneration
from processors_dpvr import load_processor

SIDE, PATCH = 336, 14
IMAGE_TOKENS = (SIDE // PATCH) ** 2
PARTS = ("qkv_proj", "o_proj", "mlp")  # of a layer, that text alone runs past the split


def benchmark(args: argparse.Namespace) -> bool:
    """Measure, print and write; whether each layer ran as many tokens as the plan says."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    with TemporaryDirectory() as folder:
        config = make_repository(args, folder)
        llm = LLM(
            folder,
            dtype=args.dtype,
            enforce_eager=True,
            max_model_len=1024,
            gpu_memory_utilization=MEMORY,
            max_num_batched_tokens=1024 * args.requests,
            enable_prefix_caching=False,
            limit_mm_per_prompt={"image": 1},
        )
        (found,) = llm.apply_model(lambda model: measured(args, llm, model))
    found["prefill_flops"] = prefill_ratio(config, found["text_tokens"])
    print(json.dumps(found, indent=1))
    record = run_record("-m dpvr.serving.benchmark", ("torch", "transformers", vllm_package()))
    publish(record | {"shape": config.text_config.to_diff_dict(), **found}, args.output)
    return found["tokens_as_planned"]


def make_repository(args: argparse.Namespace, folder: str) -> DpvrLlavaConfig:
    """Save a DPVR repository of random weights, with dpvr-mini's tokenizer and a small tower for 576 image tokens."""
    processor = load_processor(".")
    processor.patch_size = PATCH
    processor.image_processor.size = {"shortest_edge": SIDE}
    processor.image_processor.crop_size = {"height": SIDE, "width": SIDE}
    text = json.loads(Path(args.shape).read_text(encoding="utf-8"))["text_config"]
    ends = {name: getattr(processor.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text |= {"vocab_size": len(processor.tokenizer), **ends}
    depth = args.layers or text["num_hidden_layers"]
    text |= {"num_hidden_layers": depth} | ({"layer_types": None} if "layer_types" in text else {})
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = DpvrLlavaConfig(
        text_config=text,
        vision_config=CLIPVisionConfig(**tower, image_size=SIDE, patch_size=PATCH),
        image_token_index=processor.image_token_id,
        image_seq_length=IMAGE_TOKENS,
        routing="latent",
        split_layer=1,
        latent_rank=args.latent_rank,
        latent_split_layer=args.split_layer or max(1, depth // 8),
    )
    torch.manual_seed(0)
    model = DpvrLlavaForConditionalGeneration(config)
    with torch.no_grad():
        for weight in model.side_branch.latent.parameters():
            weight.normal_(0, 0.02)
    model.to(getattr(torch, args.dtype)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return config


def measured(args: argparse.Namespace, llm: Any, model: nn.Module) -> dict[str, Any]:
    """Times of both plans in turn, and the tokens that each layer ran for one request."""
    from vllm import SamplingParams

    routed, depth = model.served, model.depth
    ways = {"vanilla": routed._replace(plan=LayerPlan(depth, (JOINT,) * depth)), "latent": routed}
    prompt = "USER: <image>\n" + "red " * args.text_words + "ASSISTANT:"
    one, many = (
        SamplingParams(temperature=0, max_tokens=1),
        SamplingParams(temperature=0, max_tokens=args.new_tokens, ignore_eos=True),
    )
    pictures = iter(Image.effect_noise((SIDE, SIDE), 60 + at).convert("RGB") for at in range(10_000))

    def ask(count: int, sampling: SamplingParams) -> tuple[float, float, int]:
        """Seconds on the clock, seconds of the processor in all threads, and the tokens of a prompt."""
        asked = [{"prompt": prompt, "multi_modal_data": {"image": next(pictures)}} for _ in range(count)]
        start, worked = time.perf_counter(), time.process_time()
        outputs = llm.generate(asked, sampling, use_tqdm=False)
        return time.perf_counter() - start, time.process_time() - worked, len(outputs[0].prompt_token_ids)

    first, work, rates, counts = defaultdict(list), defaultdict(list), defaultdict(list), {}
    for name, model.served in ways.items():
        with counted(model) as counts[name]:
            *_, length = ask(1, one)  # the first request warms up, too
    for turn in range(args.rounds):
        for name, model.served in list(ways.items())[:: -1 if turn % 2 else 1]:
            seconds, worked, _ = ask(1, one)
            first[name].append(seconds)
            work[name].append(worked)
            rates[name].append(args.requests / ask(args.requests, many)[0])
    split, text = routed.plan.split_layer, length - IMAGE_TOKENS
    planned = {"vanilla": [length] * depth, "latent": [length] * split + [text] * (depth - split)}
    return {
        "plan": str(routed.plan),
        "image_tokens": IMAGE_TOKENS,
        "text_tokens": text,
        "split_layer": split,
        "requests_at_once": args.requests,
        "new_tokens": args.new_tokens,
        "rounds": args.rounds,
        "seconds_to_first_token": {name: median(times) for name, times in first.items()},
        "requests_per_second": {name: median(each) for name, each in rates.items()},
        "ratios": {
            "seconds_to_first_token": interval(first),
            "processor_seconds_to_first_token": interval(work),  # other programs do not count
            "requests_per_second": interval(rates),
        },
        "all_seconds_to_first_token": dict(first),
        "all_processor_seconds_to_first_token": dict(work),
        "all_requests_per_second": dict(rates),
        "tokens_run": counts["latent"],
        "tokens_as_planned": all(counts[name][part] == planned[name] for name in ways for part in PARTS),
    }


def interval(found: dict[str, list[float]]) -> dict[str, float]:
    """The median of the routed values as shares of vanilla's of the same round, and its 95% interval."""
    return ratio_of(found["vanilla"], found["latent"])._asdict()


class counted:
    """Within this, {part: tokens that it ran in each decoder layer} of a model, by hooks on the stock modules."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = list(model.decoder.layers)[: model.depth]

    def __enter__(self) -> dict[str, list[int]]:
        found = {part: [0] * len(self.layers) for part in PARTS}
        self.handles = []
        for index, layer in enumerate(self.layers):
            modules = {"qkv_proj": layer.self_attn.qkv_proj, "o_proj": layer.self_attn.o_proj, "mlp": layer.mlp}
            for part, module in modules.items():

                def count(_: nn.Module, inputs: tuple, at: int = index, counts: list[int] = found[part]) -> None:
                    counts[at] += len(inputs[0])

                self.handles.append(module.register_forward_pre_hook(count))
        return found

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()


def prefill_ratio(config: DpvrLlavaConfig, text_tokens: int) -> float:
    """Prefill FLOPs of the plan as a share of vanilla's, of the language model, from the formulas."""
    method = DpvrConfig(**{name: value for name, value in config.dpvr_fields().items()})
    return method.prefill_ratio(config, IMAGE_TOKENS, text_tokens)
