"""What a training step costs: the method beside LoRA and full fine-tuning, on one model of random weights.

    one model, one batch  -->  late_fusion | lora_r16 | lora_r64 | full     on the same frozen weights, but for full
                                   |
    interleaved steps          seconds per step: median, and the spread from the 10th to the 90th percentile
    one step under a hook      bytes that autograd saves for backward, weights not counted
    one step in a process      peak memory over what Python and the libraries take (on a GPU: the allocator's peak)
    of its own                     |
    a table                    --output FILE writes the JSON document, --json prints it

Paper sections 3.4 and 4.2. Below the side branch and in the text-only layers nothing is saved for backward. The model
is a LLaVA in a given shape (--shape), with its tower, or one of any family in the shape of a real model (--model):
there the image's features are given, no tower runs, and the plans are those of `dpvr.benchmarks.latency --model`.

    python -m dpvr.benchmarks.training_step                # 512 wide, 32 layers, batch 2, on a CPU
    python -m dpvr.benchmarks.training_step --shape llava-1.5-7b --batch_size 4 --device cuda --dtype bfloat16
    python -m dpvr.benchmarks.training_step --model configs/shapes/llava-onevision-0.5b.json --batch_size 1
"""

import argparse
from pathlib import Path
from typing import Any

from dpvr.benchmarks.setups import FAMILY_TRAINED_METHODS, IMAGE_TOKENS, SHAPES, TRAINED_METHODS
from dpvr.command_line import Parser, at_least, run


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser, methods = Parser(__doc__), list(dict.fromkeys((*TRAINED_METHODS, *FAMILY_TRAINED_METHODS)))
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--shape", choices=tuple(SHAPES), default="512x32", help="a LLaVA: width x depth of the decoder"
    )
    which.add_argument("--model", help="any family: a file of configs/shapes, a folder or a name on the Hub")
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD", choices=methods, help="what to train; default: all of the model's"
    )
    parser.add_argument("--batch_size", type=at_least(1), default=2, help="rows of a step, each with one picture")
    parser.add_argument("--text_tokens", type=at_least(2), default=128, help="text tokens of each row")
    parser.add_argument("--steps", type=at_least(1), default=10, help="measured steps of each method")
    parser.add_argument("--warmup", type=at_least(0), default=2, help="steps of each method before the measured ones")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base's weights")
    parser.add_argument("--output", type=Path, help="write the JSON document to this file")
    parser.add_argument("--json", action="store_true", help="print the JSON document as the last line")
    parser.add_argument("--peak_of", choices=methods, help=argparse.SUPPRESS)  # what a process of its own is for
    args = parser.parse_args(argv)
    allowed = FAMILY_TRAINED_METHODS if args.model else TRAINED_METHODS
    args.methods = list(allowed) if args.methods is None else args.methods
    if wrong := [name for name in args.methods if name not in allowed]:
        parser.error(f"{', '.join(wrong)} needs --model, any family's: with --shape choose of {', '.join(allowed)}.")
    return args


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


def main(args: argparse.Namespace) -> dict[str, Any] | None:
    from dpvr.benchmarks.latency_families import shape_name
    from dpvr.benchmarks.step_costs import check_methods, measure, peak_of_one_step
    from dpvr.benchmarks.time_and_memory import check_device
    from dpvr.record import publish, run_record

    check_device(args.device)
    check_methods(args)
    if args.peak_of is not None:
        print(peak_of_one_step(args.peak_of, args))
        return None
    names = ("model", "batch_size", "text_tokens", "steps", "warmup", "device", "dtype")
    document = {
        **run_record("-m dpvr.benchmarks.training_step"),
        "shape": args.shape if args.model is None else shape_name(args.model),
        **{name: vars(args)[name] for name in names},
        "image_tokens": IMAGE_TOKENS,
        "rows": measure(args),
    }
    print(
        f"Shape {document['shape']}, batch {args.batch_size}, {args.dtype}, on {args.device}: medians of {args.steps} "
        "interleaved steps. Ratios are to the first method."
    )
    print_table(document["rows"])
    publish(document, args.output, args.json)
    return document


if __name__ == "__main__":
    run(main, parse_args())
