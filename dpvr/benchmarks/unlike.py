"""Make the criterion by which the chat tells pictures unlike dpvr-mini's training pictures, and measure its errors.

    MiniBench's training pictures    -> mean and covariance of their features (Ledoit and Wolf's estimate)
    its validation pictures          -> the threshold that one in a hundred is above
    its test pictures                -> false alarms
    photographs and drawings that lie in installed packages, and pictures drawn here -> how many are told apart

    python -m dpvr.benchmarks.unlike                   2 minutes on two cores

Writes results/dpvr_mini/pictures.safetensors, which the chat reads, and results/dpvr_mini/pictures.json. Of the
packages scikit-learn, matplotlib and gradio are there anyway; for the pictures that the record has of scikit-image
run `pip install scikit-image` first.
"""

import argparse
from pathlib import Path

from dpvr.command_line import Parser, at_least, run

ROOT = Path(__file__).parents[2]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model", default=str(ROOT), help="whose vision tower looks; default: dpvr-mini")
    parser.add_argument("--pictures", type=at_least(200), default=2000, help="of each split of MiniBench")
    parser.add_argument("--drawn", type=at_least(1), default=100, help="pictures of each kind that is drawn here")
    parser.add_argument("--output", default=str(ROOT / "results" / "dpvr_mini"), help="folder of both files")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    from dpvr.benchmarks.unlike_run import measure
    from dpvr.record import publish, run_record

    found = measure(args.model, args.pictures, args.drawn, Path(args.output) / "pictures.safetensors")
    publish({**run_record("-m dpvr.benchmarks.unlike"), **found}, Path(args.output) / "pictures.json")


if __name__ == "__main__":
    run(main, parse_args())
