"""What an answer costs, every method beside the others: time to the first token, time per token, memory, FLOPs.

    one model of random weights  -->  vanilla | late fusion ... | FastV ...     all methods share its weights
                                          |
    one prefill in a process          peak memory over what Python and the libraries take (on a GPU: the allocator's),
    of its own                            |           with --model over the weights
    for each prompt size              rounds, methods in turn: prefill into a fresh cache, then tokens one by one
                                          |
    formulas                          FLOPs and bytes; tests hold them to torch.utils.flop_counter and real caches
                                          |
    medians, and ratios to vanilla    a table, and --output_dir/SHAPE.json; --json prints the document too

The model is a LLaVA in a given shape (--shape), with its tower, or one of any family in the shape of a real model
(--model): there the image's features are given, no tower runs, and the methods are plans of an adapter. Shapes too
large for a CPU do not run without a GPU: their FLOPs and bytes are counted, and their times are null. Paper sections
4.7 to 4.9; `python -m dpvr.reports` makes tables and figures of the files in results/latency.

    python -m dpvr.benchmarks.latency --shape 64x4 --text_tokens 16 --rounds 2 --new_tokens 4 --skip_peaks  # seconds
    python -m dpvr.benchmarks.latency --text_tokens 64 128 256 512 1024         # 512 wide, 32 layers, on a CPU
    python -m dpvr.benchmarks.latency --shape llava-1.5-7b --device cuda --batch_sizes 1 4 --warmup 10 --rounds 100
    python -m dpvr.benchmarks.latency --model configs/shapes/qwen3-vl-2b.json --image_tokens 576 2048
"""

import argparse
from pathlib import Path
from typing import Any

from dpvr.benchmarks.setups import CACHES, FAMILY_METHODS, IMAGE_TOKENS, METHODS, MINI, SHAPES
from dpvr.command_line import Parser, at_least, run


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser, count = Parser(__doc__), at_least(1)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--shape", choices=(MINI, *SHAPES), default="512x32", help="a LLaVA: width x depth of the decoder, or a model"
    )
    which.add_argument("--model", help="any family: a file of configs/shapes, a folder or a name on the Hub")
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        choices=list(dict.fromkeys((*METHODS, *FAMILY_METHODS))),
        help="vanilla is always measured; default: all",
    )
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=["growing"], help="kinds of K/V cache")
    parser.add_argument("--batch_sizes", nargs="+", type=count, default=[1], help="prompts in a batch")
    parser.add_argument("--text_tokens", nargs="+", type=count, default=[128], help="text tokens of each prompt")
    parser.add_argument("--num_images", nargs="+", type=count, help="of --shape: pictures in each prompt; default: 1")
    parser.add_argument(
        "--image_tokens", nargs="+", type=count, help=f"of --model: in each prompt; default: {IMAGE_TOKENS}"
    )
    parser.add_argument("--new_tokens", type=count, default=16, help="tokens decoded in each round")
    parser.add_argument(
        "--rounds",
        type=at_least(0),
        default=10,
        help="measured rounds; 0 measures peak memory and the machine's speed only",
    )
    parser.add_argument("--warmup", type=at_least(0), default=2, help="rounds before the measured ones")
    parser.add_argument("--device", help="default: a GPU; without one the CPU, and meta for large shapes")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="default: bfloat16 on a GPU; on a CPU float32, and for --model the one whose prefill is faster",
    )
    parser.add_argument("--threads", type=count, help="threads of a CPU; default: what torch takes")
    parser.add_argument("--skip_peaks", action="store_true", help="measure no peak memory")
    parser.add_argument("--output_dir", type=Path, help="write the JSON document there, as SHAPE.json")
    parser.add_argument("--json", action="store_true", help="print the JSON document as the last line")
    parser.add_argument("--peak_of", help=argparse.SUPPRESS)  # what a process of its own is for
    args = parser.parse_args(argv)
    known, kind = (METHODS, "--shape") if args.model is None else (FAMILY_METHODS, "--model")
    args.methods = list(known) if args.methods is None else args.methods
    if unknown := [name for name in args.methods if name not in known]:
        parser.error(f"{unknown[0]!r} is no method for {kind}: choose from {', '.join(known)}")
    other = "image_tokens" if args.model is None else "num_images"
    if vars(args)[other] is not None:
        parser.error(f"--{other} is not for {kind}: give --{'num_images' if args.model is None else 'image_tokens'}")
    args.num_images, args.image_tokens = args.num_images or [1], args.image_tokens or [IMAGE_TOKENS]
    args.methods = ["vanilla", *(name for name in args.methods if name != "vanilla")]  # which the ratios are to
    return args


def print_table(rows: list[dict[str, Any]]) -> None:
    def cell(value: float | None, scale: float = 1.0, digits: int = 3) -> str:
        return f"{'-' if value is None else f'{value / scale:,.{digits}f}':>11}"

    print(f"{'method':<20}{'prompt':<22}{'prefill ms':>11}{'ratio':>11}{'FLOPs':>11}{'ms/token':>11}{'ratio':>11}"
          f"{'K/V MB':>11}{'ratio':>11}{'peak MB':>11}")  # fmt: skip
    for row in rows:
        ratio = row["ratio_to_vanilla"]
        prompt = f"{row['batch_size']} x ({row['image_tokens']}+{row['text_tokens']}) {row['cache']}"
        prefill = "prefill_ms" if row["prefill_ms"] is not None else "prefill_without_tower_ms"
        print(
            f"{row['method']:<20}{prompt:<22}{cell(row[prefill], digits=1)}{cell(ratio[prefill])}"
            f"{cell(ratio['prefill_flops'])}{cell(row['decode_ms_per_token'], digits=2)}"
            f"{cell(ratio['decode_ms_per_token'])}{cell(row['kv_bytes'], 1e6, 1)}{cell(ratio['kv_bytes'])}"
            f"{cell(row['peak_bytes'] or row['prefill_peak_bytes'], 1e6, 0)}  {row['note'] or ''}"
        )


def main(args: argparse.Namespace) -> dict[str, Any] | None:
    import torch

    from dpvr.benchmarks.latency_rounds import dtype_name, machine_speed, make_bench, measure, peak_of_one_prefill
    from dpvr.record import publish, run_record

    if args.threads:
        torch.set_num_threads(args.threads)
    bench = make_bench(args)
    if args.peak_of is not None:
        print(peak_of_one_prefill(args.peak_of, args, bench))
        return None
    document = {
        "rows": measure(args, bench),
        **run_record("-m dpvr.benchmarks.latency"),
        "shape": bench.shape,
        **{name: vars(args)[name] for name in ("model", "caches", "new_tokens", "rounds", "warmup")},
        "device": bench.machine.device,
        "dtype": dtype_name(bench.machine),
        "tried_ms": bench.tried_ms,
        "threads": torch.get_num_threads(),
        "machine_speed": machine_speed(bench.machine),
    }
    if bench.tried_ms:
        tried = ", ".join(f"{name} {milliseconds:,.0f} ms" for name, milliseconds in bench.tried_ms.items())
        print(f"One prefill in each number format: {tried}. The faster is used.")
    print(
        f"Shape {bench.shape}, {document['dtype']}, on {document['device']}: medians of {args.rounds} interleaved "
        "rounds. Ratios are to vanilla."
    )
    print_table(document["rows"])
    publish(document, args.output_dir / f"{bench.shape}.json" if args.output_dir else None, args.json)
    return document


if __name__ == "__main__":
    run(main, parse_args())
