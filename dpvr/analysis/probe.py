"""Find out after which layer a model no longer needs its image tokens (paper section 3.1, Figure 2; saturation.py).

    rows of pictures and conversations      the first question of each and its answer, in batches
        |
    OUTPUT_DIR/samples.jsonl                a line per sample; a run that was stopped resumes after the last one
        |
    OUTPUT_DIR/saturation.json, .png, .svg  medians and quartiles by layer, transitions, two recommended splits
        |
    OUTPUT_DIR/plans.json, plan_0.45.yaml   with --find_plan 0.45: the deep layers that must read the image, within
    plan_frontier.png, .svg                 that share of vanilla's prefill FLOPs (plan_search.py)

Any vision-language model with a chat template. A DPVR model is measured as the vanilla LLaVA that it is based on, and
then under its own routing for comparison.

    python -m dpvr.analysis.probe                                           # dpvr-mini on MiniBench
    python -m dpvr.analysis.probe --find_plan 0.45 0.35                     # and which layers must read the image
    python -m dpvr.analysis.probe --model Qwen/Qwen3-VL-2B-Instruct --dtype bfloat16 --find_plan 0.45
    python -m dpvr.analysis.probe --model llava-hf/llava-1.5-7b-hf --data llava_v1_5_mix665k.json --image_folder images
"""

import argparse
from pathlib import Path
from typing import Any

from dpvr.command_line import Parser, at_least, run


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model", default=".", help="a vision-language model: a name on the Hub or a folder")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run the code in the model's repository; else none of it runs"
    )
    parser.add_argument("--data", default="minibench", help="minibench, or what train_sft.py --data takes")
    parser.add_argument("--data_split", default="train", help="split of a data set from the Hub or a folder")
    parser.add_argument("--image_folder", help="folder that the picture names in LLaVA's JSON are relative to")
    parser.add_argument(
        "--allow_remote_images",
        action="store_true",
        help="also read a data set's pictures from web addresses and other folders",
    )
    parser.add_argument("--skip_bad_rows", action="store_true", help="leave bad rows out and report them")
    parser.add_argument("--num_samples", type=at_least(1), default=500, help="rows with a picture to measure")
    parser.add_argument("--batch_size", type=at_least(1), default=8, help="rows measured at a time")
    parser.add_argument(
        "--tuned_lens",
        type=int,
        default=0,
        help="rows to train a tuned lens on, which are not measured; 0: no tuned lens",
    )
    parser.add_argument(
        "--find_plan",
        type=float,
        nargs="+",
        metavar="BUDGET",
        help="also search for layer plans within these shares of vanilla's prefill FLOPs",
    )
    parser.add_argument(
        "--plan_samples",
        type=at_least(2),
        default=128,
        help="rows for --find_plan, half to search on and half to measure on",
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path("results/saturation"), help="folder of a new run, or of one to resume"
    )
    parser.add_argument("--device", help="torch device; default: a GPU if there is one, else the CPU")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="dtype of the weights"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of MiniBench's rows")
    parser.add_argument("--json", action="store_true", help="print saturation.json as the last line, too")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> dict[str, Any]:
    from dpvr.analysis.probe_run import probe

    return probe(args)


if __name__ == "__main__":
    run(main, parse_args())
