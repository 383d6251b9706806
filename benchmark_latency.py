"""What an answer costs: time to the first token, time per token and bytes of keys and values, routing by routing.

    one LLaVA of random weights, one batch  -->  vanilla | late_fusion | kv_substitution | text_only   the same weights
                                                     |
    rounds, methods interleaved                  prefill into a fresh cache, then tokens one by one
                                                     |
    medians, and ratios to vanilla               each ratio is of one round: what slows the machine slows both
                                                     |
    standard output                              a table, and one JSON document as the last line  (--output FILE too)

The prefill includes the vision tower, which is small here and timed apart as well. Paper section 4.5, Tables 6 and 7.

    python benchmark_latency.py                                       # 512 wide, 32 layers, on a CPU
    python benchmark_latency.py --shape llava-1.5-7b --device cuda --dtype bfloat16
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

from benchmark_training import IMAGE_TOKENS, SHAPES, make_batch, make_llava, synchronize
from minibench.record import publish, run_record
from modeling_dpvr import DpvrLlavaForConditionalGeneration

METHODS = {"vanilla": "none"} | {name: name for name in ("late_fusion", "kv_substitution", "text_only")}
CACHES = ("growing", "static")


def make_cache(kind: str, model: DpvrLlavaForConditionalGeneration, room: int) -> Cache:
    return StaticCache(config=model.config, max_cache_len=room) if kind == "static" else DynamicCache()


def timed(work: Callable[[], Any], device: str) -> tuple[Any, float]:
    """What `work` returns, and the milliseconds it took."""
    synchronize(device)
    start = time.perf_counter()
    result = work()
    synchronize(device)
    return result, 1000 * (time.perf_counter() - start)


@torch.inference_mode()
def run_once(
    model: DpvrLlavaForConditionalGeneration, batch: dict[str, torch.Tensor], kind: str, args: argparse.Namespace
) -> dict[str, Any]:
    """One answer: milliseconds of the prefill and of each token, and the bytes that the cache's tensors hold."""
    length, rows = batch["input_ids"].shape[1], args.batch_size
    cache = make_cache(kind, model, length + args.new_tokens)
    _, prefill_ms = timed(lambda: model(**batch, past_key_values=cache, logits_to_keep=1), args.device)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)
    token, tokens_ms = batch["input_ids"][:, -1:], []
    for index in range(args.new_tokens):
        place = torch.full((rows, 1), length + index, device=args.device)
        options = {"position_ids": place, "past_key_values": cache, "logits_to_keep": 1}
        output, milliseconds = timed(lambda: model(input_ids=token, **options), args.device)  # noqa: B023
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        tokens_ms.append(milliseconds)
    return {"prefill_ms": prefill_ms, "decode_ms_per_token": statistics.median(tokens_ms), "kv_bytes": held}


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per method and cache. Within a round every method runs once, vanilla first or last in turn."""
    shape = SHAPES[args.shape]
    llava = make_llava(shape, args.device, getattr(torch, args.dtype), args.seed)
    model = DpvrLlavaForConditionalGeneration.from_llava(llava, split_layer=shape.split_layer).eval()
    batch = {name: value for name, value in make_batch(shape, args).items() if name != "labels"}
    found: dict[tuple[str, str], list[dict[str, Any]]] = {(m, c): [] for m in args.methods for c in args.caches}
    tower = []
    for turn in tqdm(range(args.warmup + args.rounds), desc="Rounds", unit="round"):
        with torch.inference_mode():
            tower.append(timed(lambda: model.model.get_image_features(batch["pixel_values"]), args.device)[1])
        for method, kind in list(found)[:: 1 if turn % 2 else -1]:
            model.set_routing(METHODS[method])
            found[method, kind].append(run_once(model, batch, kind, args))
    rows = []
    for (method, kind), runs in found.items():
        runs, base = runs[args.warmup :], found["vanilla", kind][args.warmup :]
        row = {"method": method, "shape": args.shape, "batch_size": args.batch_size, "text_tokens": args.text_tokens}
        row |= {"cache": kind, "kv_bytes": runs[0]["kv_bytes"]}
        counts = {"batch_size": args.batch_size, "routing": METHODS[method]}
        row["prefill_flops"] = model.prefill_flops(IMAGE_TOKENS, args.text_tokens, **counts)
        row["ratio_to_vanilla"] = {
            "kv_bytes": runs[0]["kv_bytes"] / base[0]["kv_bytes"],
            "prefill_flops": row["prefill_flops"]
            / model.prefill_flops(IMAGE_TOKENS, args.text_tokens, batch_size=args.batch_size, routing="none"),
        }
        for name in ("prefill_ms", "decode_ms_per_token"):
            row[name] = statistics.median(run[name] for run in runs)
            ratios = [run[name] / other[name] for run, other in zip(runs, base, strict=True)]
            low, middle, high = torch.tensor(ratios).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
            row["ratio_to_vanilla"] |= {name: middle, f"{name}_spread": [low, high]}
        rows.append(row | {"tower_ms": statistics.median(tower[args.warmup :])})
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    heads = f"{'prefill ms':>12}{'ratio':>7}{'ms/token':>10}{'ratio':>7}{'10 to 90%':>15}{'K/V MB':>9}{'ratio':>7}"
    print(f"{'method':<17}{'cache':<9}{heads}")
    for row in rows:
        ratio = row["ratio_to_vanilla"]
        low, high = ratio["decode_ms_per_token_spread"]
        print(
            f"{row['method']:<17}{row['cache']:<9}{row['prefill_ms']:>12.1f}{ratio['prefill_ms']:>7.3f}"
            f"{row['decode_ms_per_token']:>10.2f}{ratio['decode_ms_per_token']:>7.3f}{f'{low:.3f} to {high:.3f}':>15}"
            f"{row['kv_bytes'] / 1e6:>9.1f}{ratio['kv_bytes']:>7.3f}"
        )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure prefill, decoding and cache, routing by routing.")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="512x32")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=list(CACHES))
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--text_tokens", type=int, default=128)
    parser.add_argument("--new_tokens", type=int, default=16, help="tokens decoded in each round")
    parser.add_argument("--rounds", type=int, default=10, help="measured rounds")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="also write the JSON document to this file")
    args = parser.parse_args(argv)
    if "vanilla" not in args.methods:
        args.methods = ["vanilla", *args.methods]  # which the ratios are to
    return args


def main(args: argparse.Namespace) -> None:
    rows = measure(args)
    print_table(rows)
    settings = {name: value for name, value in vars(args).items() if name not in ("output", "methods", "caches")}
    document = {**run_record("benchmark_latency.py"), **settings, "image_tokens": IMAGE_TOKENS, "rows": rows}
    publish(document, args.output)


if __name__ == "__main__":
    main(parse_args())
