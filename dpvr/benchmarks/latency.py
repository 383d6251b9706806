"""What an answer costs, every method beside the others: time to the first token, time per token, memory, FLOPs.

    one LLaVA of random weights  -->  vanilla | late fusion ... | FastV ...     all methods share its weights
                                          |
    one prefill in a process          peak memory over what Python and the libraries take (on a GPU: the allocator's)
    of its own                            |
    for each prompt size              rounds, methods in turn, each round beginning with the next: prefill into a fresh
                                          |     cache, then tokens one by one; the vision tower is timed on the way
    formulas                          FLOPs; held to torch.utils.flop_counter in the tests
                                          |
    medians, and ratios to vanilla    each ratio is of one round: what slows the machine slows both
                                          |
    standard output                   a table, and one JSON document as the last line; --output_dir has it as a file

Sizes of 7B and more are not run without a GPU: their weights stay on the meta device, FLOPs and bytes are counted, and
times are null. Paper sections 4.7 to 4.9; `python -m dpvr.reports` makes tables and figures of the
files.

    python -m dpvr.benchmarks.latency --quick                                   # under a minute
    python -m dpvr.benchmarks.latency --text_tokens 64 128 256 512 1024         # 512 wide, 32 layers, on a CPU
    python -m dpvr.benchmarks.latency --shape llava-1.5-7b --device cuda --batch_sizes 1 4 --warmup 10 --rounds 100
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import DynamicCache, LlavaForConditionalGeneration, StaticCache
from transformers.cache_utils import Cache
from transformers.utils import is_flash_attn_2_available

from configuration_dpvr import JOINT, DpvrLlavaConfig, LayerPlan
from dpvr.benchmarks import random_models as bench
from dpvr.benchmarks.pruning import PrunedLlava, prune
from dpvr.benchmarks.random_models import SHAPES, make_llava, resident_peak, synchronize, timed
from dpvr.record import publish, run_record
from modeling_dpvr import DpvrLlavaForConditionalGeneration

MINI = "dpvr-mini"
QUICK = {"shape": "64x4", "text_tokens": [16], "rounds": 2, "warmup": 1, "new_tokens": 4, "skip_peaks": True}
FLASH = "vanilla_flash"
ROUTINGS = {
    "vanilla": {"routing": "none", "num_side_layers": 0},
    "late_fusion": {},
    "late_fusion_k2": {"num_fusion_layers": 2},
    "persistent_context": {"routing": "persistent_context"},
    "kv_substitution": {"routing": "kv_substitution"},
    "text_only": {"routing": "text_only", "num_side_layers": 0},  # VTW
}
EARLY_READING = {"early_reading_4": (10, 12, 14, 16), "early_reading_8": range(10, 18)}  # of 32 layers, split at 8
PRUNINGS = {"fastv": "attention", "random_pruning": "random"}
METHODS = (
    "vanilla",
    FLASH,
    "late_fusion",
    "late_fusion_k2",
    *EARLY_READING,
    *("persistent_context", "kv_substitution", "text_only"),
    *PRUNINGS,
)
TIMES = ("prefill_ms", "prefill_without_tower_ms", "decode_ms_per_token")
PARTS = ("tower", "embedding", "shared_stack", "side_branch", "deep_stack", "last_layer", "head")
CACHES = ("growing", "static")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Method = DpvrLlavaForConditionalGeneration | PrunedLlava | LlavaForConditionalGeneration


class Size(NamedTuple):
    """A batch of equal prompts: text tokens and pictures of each row."""

    batch_size: int
    text_tokens: int
    num_images: int


# -- models and prompts -----------------------------------------------------------------------------------------------


def make_base(args: argparse.Namespace) -> tuple[LlavaForConditionalGeneration, int]:
    """The LLaVA whose weights all methods share, and the split of late fusion."""
    dtype = getattr(torch, args.dtype)
    if args.shape != MINI:
        return make_llava(SHAPES[args.shape], args.device, dtype, args.seed).eval(), SHAPES[args.shape].split_layer
    llava = LlavaForConditionalGeneration.from_pretrained(".", dtype=dtype).to(args.device)
    return llava.eval(), DpvrLlavaConfig.from_pretrained(".").split_layer


def make_method(name: str, llava: LlavaForConditionalGeneration, split_layer: int) -> Method:
    """A model that shares the weights of `llava`; a side branch, where the method has one, is its own."""
    if name in PRUNINGS:
        return prune(llava, layer=3, keep=0.5, rank=PRUNINGS[name])
    if name == FLASH:
        return llava
    fields = {"routing": "late_fusion", "num_side_layers": 1, "num_fusion_layers": 1, "fusion_layers": None}
    fields |= {"split_layer": split_layer}
    if name in EARLY_READING:
        depth = llava.config.text_config.num_hidden_layers
        layers = sorted({round(layer * depth / 32) for layer in EARLY_READING[name]})
        fields |= {"split_layer": max(1, depth // 4), "fusion_layers": layers}
    else:
        fields |= ROUTINGS[name]
    return DpvrLlavaForConditionalGeneration.from_llava(llava, **fields)


def why_not(name: str, args: argparse.Namespace) -> str | None:
    """Why a method cannot run here."""
    if args.device == "meta":
        return "not measured: no GPU"
    if name == FLASH and not is_flash_attn_2_available():
        return "not measured: flash attention is not installed"
    return None


@contextmanager
def kernels_of(name: str, llava: LlavaForConditionalGeneration) -> Iterator[None]:
    """Flash attention for vanilla alone: a context layer needs a mask, which flash attention does not take."""
    if name != FLASH:
        yield
        return
    llava.set_attn_implementation("flash_attention_2")
    try:
        yield
    finally:
        llava.set_attn_implementation("sdpa")


def make_prompt(llava: LlavaForConditionalGeneration, size: Size, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """A token of text, the pictures, then the rest of the text."""
    config = llava.config
    rows, image = size.batch_size, config.image_token_id
    text = torch.randint(image + 1, min(1000, config.text_config.vocab_size), (rows, size.text_tokens))
    images = torch.full((rows, size.num_images * config.image_seq_length), image)
    side = config.vision_config.image_size
    pixels = torch.randn(rows * size.num_images, 3, side, side, dtype=getattr(torch, args.dtype))
    ids = torch.cat([text[:, :1], images, text[:, 1:]], dim=1)
    return {"input_ids": ids.to(args.device), "pixel_values": pixels.to(args.device)}


# -- measuring --------------------------------------------------------------------------------------------------------


class PhaseClock:
    """Milliseconds of a prefill by its parts; each lasts until the next begins.

    tower, embedding, shared stack (layers 0 ... s-1), side branch, deep stack (s ... L-2), last layer, head
    """

    def __init__(self, llava: LlavaForConditionalGeneration, args: argparse.Namespace):
        self.llava, self.device, self.now = llava, args.device, CLOCKS[args.clock]
        self.begins: dict[str, float] = {}

    @contextmanager
    def listening(self, model: Method) -> Iterator[None]:
        """Take the time of one prefill of `model`, which is a method on the LLaVA's own layers."""
        layers, self.begins = self.llava.model.language_model.layers, {}
        split = plan_of(model).split_layer
        beginnings = [(self.llava.model.vision_tower, "tower"), (layers[0], "shared_stack")]
        if isinstance(model, DpvrLlavaForConditionalGeneration) and len(model.side_branch):
            beginnings.append((model.side_branch[0], "side_branch"))
        if split < len(layers):
            beginnings.append((layers[split].input_layernorm, "deep_stack"))
        beginnings.append((layers[-1].input_layernorm, "last_layer"))  # a context layer writes the image's keys first
        beginnings.append((self.llava.model.language_model.norm, "head"))
        handles = [module.register_forward_pre_hook(partial(self._begin, part)) for module, part in beginnings]
        handles.append(self.llava.model.multi_modal_projector.register_forward_hook(partial(self._begin, "embedding")))
        try:
            yield
            self._begin("end")
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, part: str, *_: Any) -> None:
        if part not in self.begins:
            synchronize(self.device)
            self.begins[part] = self.now()

    def milliseconds(self) -> dict[str, float]:
        """Of every part; 0 of one that the method does not have."""
        ordered = sorted(self.begins, key=self.begins.get)
        found = {a: 1000 * (self.begins[b] - self.begins[a]) for a, b in itertools.pairwise(ordered)}
        return {part: found.get(part, 0.0) for part in PARTS}


def make_cache(kind: str, model: Method, room: int) -> Cache:
    return StaticCache(config=model.config, max_cache_len=room) if kind == "static" else DynamicCache()


@torch.inference_mode()
def run_once(
    model: Method, prompt: dict[str, torch.Tensor], kind: str, clock: PhaseClock, args: argparse.Namespace
) -> dict[str, Any]:
    """One answer: milliseconds of the prefill and of each token, and the bytes that the cache's tensors hold."""
    rows, length = prompt["input_ids"].shape
    cache = make_cache(kind, model, length + args.new_tokens)
    with clock.listening(model) if args.device == "cpu" else nullcontext():
        _, prefill_ms = timed(lambda: model(**prompt, past_key_values=cache, logits_to_keep=1), args.device, clock.now)
    if args.device != "cpu":  # where listening waits for the device at every part: in a prefill that is not timed
        with clock.listening(model):
            model(**prompt, past_key_values=make_cache(kind, model, length), logits_to_keep=1)
    phases = clock.milliseconds()
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)
    token, tokens_ms = prompt["input_ids"][:, -1:], []
    for index in range(args.new_tokens):
        place = torch.full((rows, 1), length + index, device=args.device)
        options = {"position_ids": place, "past_key_values": cache, "logits_to_keep": 1}
        output, milliseconds = timed(lambda: model(input_ids=token, **options), args.device, clock.now)  # noqa: B023
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        tokens_ms.append(milliseconds)
    return {
        "prefill_ms": prefill_ms,
        "prefill_without_tower_ms": prefill_ms - phases["tower"],
        "phases_ms": phases,
        "decode_ms_per_token": statistics.median(tokens_ms),
        "kv_bytes": held,
        "kv_reuse": int(cache.get_seq_length()) == length + args.new_tokens,
    }


def peak_of_one_prefill(name: str, args: argparse.Namespace) -> int:
    """Bytes at the peak of making a model and one prefill: of this process, which did nothing else, or of the GPU."""
    before = resident_peak()
    llava, split_layer = make_base(args)
    model = make_method(name, llava, split_layer)
    prompt = make_prompt(llava, next(sizes(args)), args)
    with torch.inference_mode(), kernels_of(name, llava):
        model(**prompt, past_key_values=DynamicCache(), logits_to_keep=1)
    return torch.cuda.max_memory_allocated(args.device) if args.device != "cpu" else resident_peak() - before


def peak_in_a_process_of_its_own(name: str, size: Size, args: argparse.Namespace) -> int | None:
    """None if it does not fit."""
    values = {option: vars(args)[option] for option in ("shape", "device", "dtype", "seed")}
    values |= {"batch_sizes": size.batch_size, "text_tokens": size.text_tokens, "num_images": size.num_images}
    flags = [text for option, value in values.items() for text in (f"--{option}", str(value))]
    return bench.peak_in_a_process_of_its_own("dpvr.benchmarks.latency", name, flags)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per prompt size, kind of cache and method. Peaks come first, while this process holds no model."""
    able = [] if args.skip_peaks else [name for name in args.methods if why_not(name, args) is None]
    peaks = {size: {name: peak_in_a_process_of_its_own(name, size, args) for name in able} for size in sizes(args)}
    llava, split_layer = make_base(args)
    models = {name: make_method(name, llava, split_layer) for name in args.methods}
    return [
        row
        for size in sizes(args)
        for kind in args.caches
        for row in measure_size(models, llava, size, kind, peaks[size], args)
    ]


def sizes(args: argparse.Namespace) -> Iterator[Size]:
    return (Size(*values) for values in itertools.product(args.batch_sizes, args.text_tokens, args.num_images))


def measure_size(
    models: dict[str, Method],
    llava: LlavaForConditionalGeneration,
    size: Size,
    kind: str,
    peaks: dict[str, int | None],
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """A row per method. Within a round every method runs once, and the next round begins with the next of them."""
    notes = {name: why_not(name, args) or ("does not fit" if peaks.get(name, 0) is None else None) for name in models}
    running = [name for name in models if notes[name] is None]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in running}
    if running and args.rounds:
        clock, prompt = PhaseClock(llava, args), make_prompt(llava, size, args)
        for turn in tqdm(range(args.warmup + args.rounds), desc=str(size), unit="round"):
            first = turn % len(running)
            for name in running[first:] + running[:first]:
                with kernels_of(name, llava):
                    runs[name].append(run_once(models[name], prompt, kind, clock, args))
    rows = []
    for name, model in models.items():
        row = {"method": name, "shape": args.shape, **size._asdict(), "cache": kind, "note": notes[name]}
        row |= counted(models["vanilla"] if name == FLASH else model, size, models["vanilla"])
        if runs.get(name):
            row |= medians(runs[name][args.warmup :])
        row["peak_bytes"] = peaks.get(name)
        rows.append(row | {name: None for name in (*TIMES, "phases_ms", "kv_reuse") if name not in row})
    for row in rows:
        row["ratio_to_vanilla"] = ratios(
            row, rows[0], *(runs.get(r["method"], [])[args.warmup :] for r in (row, rows[0]))
        )
    return rows


def plan_of(model: Method) -> LayerPlan:
    if isinstance(model, PrunedLlava):
        return model.plan
    if isinstance(model, DpvrLlavaForConditionalGeneration):
        return model.config.layer_plan()
    depth = model.config.text_config.num_hidden_layers
    return LayerPlan(depth, (JOINT,) * depth)


def counted(model: Method, size: Size, vanilla: DpvrLlavaForConditionalGeneration) -> dict[str, Any]:
    """What formulas say: FLOPs of the prefill without the tower, bytes of keys and values, and what a token costs.

    A decoded token reads every weight of the decoder and the head once, and every key and value of the decoder; a
    prefill reads the weights (and the side branch's) and writes the keys and values. Activations are not counted.
    """
    tokens, plan = (size.num_images * model.config.image_seq_length, size.text_tokens), plan_of(model)
    text, rows = model.config.text_config, size.batch_size
    per_image = vanilla.kv_cache_bytes(tokens[0], 0, batch_size=rows) // text.num_hidden_layers  # in one layer
    kv_bytes = model.kv_cache_bytes(*tokens, batch_size=rows)
    read = kv_bytes - (per_image if plan.reads_side_branch else 0)
    weights = [*model.model.language_model.layers.parameters(), *model.lm_head.parameters()]
    matrices, item = sum(weight.numel() for weight in weights if weight.ndim == 2), model.dtype.itemsize
    branch = sum(weight.numel() for weight in model.side_branch.parameters()) if plan.reads_side_branch else 0
    row = {
        "image_tokens": tokens[0],
        "plan": str(plan),
        "prefill_flops": model.prefill_flops(*tokens, batch_size=rows),
        "prefill_bytes": (matrices + branch) * item + kv_bytes,
        "decode_flops": 2 * rows * matrices + 2 * read // item * text.num_attention_heads // text.num_key_value_heads,
        "decode_bytes": matrices * item + read,
        "kv_bytes": kv_bytes,
        "deep_image_layers": None,
    }
    if not isinstance(model, PrunedLlava) and (model is vanilla or model.config.fusion_layers is None):
        row["deep_image_layers"] = deep_image_layers(model, tokens)
    return row


def deep_image_layers(model: DpvrLlavaForConditionalGeneration, tokens: tuple[int, int]) -> float:
    """FLOPs that images cost past the split and in the side branch, in vanilla layers' worth (the unit of Table 1)."""
    everywhere = {
        routing: model.prefill_flops(*tokens, logits_to_keep=0, routing=routing) for routing in ("none", "text_only")
    }
    unit = (everywhere["none"] - everywhere["text_only"]) / (
        len(model.config.layer_plan("none").modes) - model.config.split_layer
    )
    return (model.prefill_flops(*tokens, logits_to_keep=0) - everywhere["text_only"]) / unit


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the times with their 10th and 90th percentiles; and what is the same in all runs."""
    row = {"kv_bytes": runs[0]["kv_bytes"], "kv_reuse": runs[0]["kv_reuse"]}
    for name in TIMES:
        low, row[name], high = spread([run[name] for run in runs])
        row[f"{name}_spread"] = [low, high]
    row["phases_ms"] = {part: statistics.median(run["phases_ms"][part] for run in runs) for part in PARTS}
    return row


def machine_speed(args: argparse.Namespace) -> dict[str, float] | None:
    """What this machine reaches: FLOPs a second in a square product, bytes a second in one with a vector."""
    if args.device == "meta":
        return None
    clock, options = CLOCKS[args.clock], {"device": args.device, "dtype": getattr(torch, args.dtype)}
    square, tall, vector = (torch.randn(*shape, **options) for shape in ((2048, 2048), (32768, 2048), (2048,)))
    with torch.inference_mode():
        product = min(timed(lambda: square @ square, args.device, clock)[1] for _ in range(5))
        reading = min(timed(lambda: tall @ vector, args.device, clock)[1] for _ in range(5))
    return {"flops_per_second": 2 * 2048**3 / product * 1e3, "bytes_per_second": tall.nbytes / reading * 1e3}


def spread(values: list[float]) -> list[float]:
    """The 10th percentile, the median and the 90th percentile."""
    return (
        torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    )


def ratios(
    row: dict[str, Any], base: dict[str, Any], runs: list[dict[str, Any]], base_runs: list[dict[str, Any]]
) -> dict[str, Any]:
    """To vanilla: of times within a round, their median and spread; of what is counted, as it is."""
    found = {name: row[name] / base[name] for name in ("kv_bytes", "prefill_flops")}
    found["peak_bytes"] = row["peak_bytes"] / base["peak_bytes"] if row["peak_bytes"] and base["peak_bytes"] else None
    for name in TIMES:
        found[name] = None
        if runs and base_runs:
            low, found[name], high = spread([a[name] / b[name] for a, b in zip(runs, base_runs, strict=True)])
            found[f"{name}_spread"] = [low, high]
    return found


# -- the script -------------------------------------------------------------------------------------------------------


def print_table(rows: list[dict[str, Any]]) -> None:
    def cell(value: float | None, scale: float = 1.0, digits: int = 3) -> str:
        return f"{'-' if value is None else f'{value / scale:,.{digits}f}':>11}"

    print(f"{'method':<20}{'prompt':<22}{'prefill ms':>11}{'ratio':>11}{'FLOPs':>11}{'ms/token':>11}{'ratio':>11}"
          f"{'K/V MB':>11}{'ratio':>11}{'peak MB':>11}")  # fmt: skip
    for row in rows:
        ratio = row["ratio_to_vanilla"]
        prompt = f"{row['batch_size']} x ({row['image_tokens']}+{row['text_tokens']}) {row['cache']}"
        print(
            f"{row['method']:<20}{prompt:<22}{cell(row['prefill_ms'], digits=1)}{cell(ratio['prefill_ms'])}"
            f"{cell(ratio['prefill_flops'])}{cell(row['decode_ms_per_token'], digits=2)}"
            f"{cell(ratio['decode_ms_per_token'])}{cell(row['kv_bytes'], 1e6, 1)}{cell(ratio['kv_bytes'])}"
            f"{cell(row['peak_bytes'], 1e6, 0)}  {row['note'] or ''}"
        )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure prefill, decoding, cache and memory, method by method.")
    parser.add_argument("--shape", choices=(MINI, *SHAPES), default="512x32")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=["growing"])
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1])
    parser.add_argument("--text_tokens", nargs="+", type=int, default=[128])
    parser.add_argument("--num_images", nargs="+", type=int, default=[1], help="pictures in each prompt")
    parser.add_argument("--new_tokens", type=int, default=16, help="tokens decoded in each round")
    parser.add_argument(
        "--rounds", type=int, default=10, help="measured rounds; 0 for peak memory and the machine's speed alone"
    )
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--device", help="default: a GPU; else the CPU, and meta for sizes of 7B and more")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--threads", type=int, help="of a CPU; default: what torch takes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--clock",
        choices=tuple(CLOCKS),
        default="wall",
        help="cpu: the processor's time, for a CPU that others use too; with one thread that of an idle core",
    )
    parser.add_argument("--skip_peaks", action="store_true", help="measure no peak memory")
    parser.add_argument("--quick", action="store_true", help=f"other defaults, for a small run: {QUICK}")
    parser.add_argument("--output_dir", type=Path, help="also write the JSON document there, as SHAPE.json")
    parser.add_argument("--peak_of", choices=METHODS, help="print the peak memory of one prefill and nothing else")
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    least = {
        "batch_sizes": 1,
        "text_tokens": 1,
        "num_images": 1,
        "new_tokens": 1,
        "rounds": 0,
        "warmup": 0,
        "threads": 1,
    }
    for name, bound in least.items():
        given = vars(args)[name]
        if any(value < bound for value in (given if isinstance(given, list) else [given]) if value is not None):
            parser.error(f"Expected --{name} of at least {bound}; got {given}.")
    args.methods = ["vanilla", *(name for name in args.methods if name != "vanilla")]  # which the ratios are to
    if args.device is None:
        large = args.shape in SHAPES and SHAPES[args.shape].width >= 4096
        args.device = "cuda" if torch.cuda.is_available() else "meta" if large else "cpu"
    if args.clock == "cpu":
        if args.device != "cpu":
            raise ValueError(
                f"Expected --clock wall on a GPU, whose time a processor's clock does not count; got 'cpu' with "
                f"--device {args.device}. Remedy: leave --clock out."
            )
        args.threads = 1  # the clock adds up what threads take
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    return args


def main(args: argparse.Namespace) -> None:
    if args.peak_of is not None:
        print(peak_of_one_prefill(args.peak_of, args))
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = measure(args)
    print_table(rows)
    names = ("shape", "caches", "new_tokens", "rounds", "warmup", "device", "dtype", "clock", "seed")
    settings = {**{name: vars(args)[name] for name in names}, "threads": torch.get_num_threads()}
    settings["machine_speed"] = machine_speed(args)
    document = {"rows": rows, **run_record("-m dpvr.benchmarks.latency"), **settings}
    publish(document, args.output_dir / f"{args.shape}.json" if args.output_dir else None)


if __name__ == "__main__":
    main(parse_args())
