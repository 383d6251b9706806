"""Accuracy of latents on MiniBench, beside whatever else costs as much: paired with vanilla and with each latent.

    vanilla            the base by itself
    latent             the repository's own, and others that are fitted here, in closed form, as --fit says
    untrained plan     of those that dpvr.analysis.probe --find_plan has tried, the nearest to vanilla within the cost
    FastV, random      with the most image tokens that cost no more
    text only          (VTW) with the deepest split that costs no more

Costs are prefill FLOPs of MiniBench's median prompt, as a share of vanilla's whose last layer has one query too.

    python -m dpvr.benchmarks.latents --limit 200
    python -m dpvr.benchmarks.latents --split test --fit 0:24 --output results/dpvr_mini/latents.json
"""

import argparse
from pathlib import Path

from dpvr.command_line import Parser, at_least, run


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model", default=".", help="a DPVR repository with a latent (id or path)")
    parser.add_argument(
        "--fit",
        nargs="*",
        default=[],
        help="latents to fit, as split:rank, split:rank:stride or split:rank:stride:score",
    )
    parser.add_argument("--fit_rows", type=at_least(1), default=400, help="pictures of the train split to fit on")
    parser.add_argument("--split", choices=("validation", "test"), default="validation", help="of the questions")
    parser.add_argument("--limit", type=at_least(2), default=500, help="questions of each task")
    parser.add_argument("--seed", type=int, default=0, help="of the questions")
    parser.add_argument(
        "--plans", type=Path, default="results/saturation", help="folder with the plans that were tried"
    )
    parser.add_argument("--output", type=Path, help="write the JSON document to this file")
    parser.add_argument("--json", action="store_true", help="print the JSON document as the last line")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    from dpvr.benchmarks.latents_run import measure, table
    from dpvr.record import publish

    document = measure(args)
    print("\n".join(table(document)))
    publish(document, args.output, args.json)


if __name__ == "__main__":
    run(main, parse_args())
