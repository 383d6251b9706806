"""Fit a latent to a base: what its deep layers read of a picture, in closed form, without labels and gradients.

rows with pictures --> one forward of the base each --> moments --> least squares --> OUTPUT_DIR
    |                                                                  a DPVR repository, or an adapter
rows that were not fitted on --> OUTPUT_DIR/fit.json                   for any other vision-language model
    how much of every layer's keys and values is explained, by rank; and how many answers are the base's

What was read is saved every ten minutes: the same command goes on where a killed one stopped.

python -m dpvr.training.fit --split_layer 1 --latent_rank 64                                    # dpvr-mini
python -m dpvr.training.fit --split_layer 1 --latent_rank auto                                  # and its rank
python -m dpvr.training.fit --model Qwen/Qwen3-VL-2B-Instruct --data rows.jsonl --split_layer 4 --latent_rank 512
"""

import argparse
from pathlib import Path
from typing import Any

from dpvr.command_line import Parser, at_least, run

AUTO = "auto"


def rank(text: str) -> int | str:
    return AUTO if text == AUTO else at_least(1)(text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model", default=".", help="a DPVR or vision-language model: a name on the Hub or a folder")
    parser.add_argument("--data", default="minibench", help="minibench, or what train_sft.py --data takes")
    parser.add_argument("--data_split", default="train", help="split of a data set from the Hub or a folder")
    parser.add_argument("--image_folder", help="folder that the picture names in LLaVA's JSON are relative to")
    parser.add_argument(
        "--allow_remote_images",
        action="store_true",
        help="also read a data set's pictures from web addresses and other folders",
    )
    parser.add_argument("--skip_bad_rows", action="store_true", help="leave bad rows out and report them")
    parser.add_argument("--num_samples", type=at_least(1), default=200, help="rows with a picture to fit on")
    parser.add_argument("--eval_samples", type=at_least(1), default=50, help="further rows to report on")
    parser.add_argument("--batch_size", type=at_least(1), default=16, help="rows of a forward")
    parser.add_argument("--split_layer", type=at_least(0), default=1, help="where image tokens leave the decoder")
    parser.add_argument(
        "--latent_rank", type=rank, default=64, help="width of the latent, or auto: the smallest within --tolerance"
    )
    parser.add_argument("--latent_side_layers", type=at_least(0), default=0, help="decoder layers before the latent")
    parser.add_argument(
        "--latent_layers", type=at_least(0), nargs="+", metavar="LAYER", help="layers that read; default: all"
    )
    parser.add_argument("--latent_stride", type=at_least(1), default=1, help="read only every k-th image token")
    parser.add_argument(
        "--latent_score", choices=("norm", "distance"), help="read those that stand out, not every k-th"
    )
    parser.add_argument(
        "--tolerance", type=float, default=0.02, help="how much less a rank may explain than the full one, for auto"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/latent"), help="a new folder")
    parser.add_argument("--device", help="torch device; default: a GPU if there is one, else the CPU")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="dtype of the weights"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of MiniBench's rows")
    parser.add_argument("--json", action="store_true", help="print fit.json as the last line, too")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> dict[str, Any]:
    from dpvr.training.fit_run import fit

    return fit(args)


if __name__ == "__main__":
    run(main, parse_args())
