"""Would answering again without the plan, where the plan's own answer was unsure, be worth what it costs?

reply under the plan --> a signal: how sure was it of its tokens? --> below a threshold: vanilla answers again

validation questions   the threshold for each tolerated share of replies that differ from vanilla's: conformal risk
                       control (arXiv 2208.02814), so that on like questions no more are expected to differ
test questions         what then differs, how many were answered again, and the prefill FLOPs of it all, beside
                       plans that read from a later split and cost as much
other questions        the same threshold where it was not calibrated: limit_sets.py's pictures

python -m dpvr.benchmarks.fallback --limit 50
python -m dpvr.benchmarks.fallback --splits 2 4 6 8 9 10 --output results/fallback.json
"""

import argparse
from pathlib import Path

from dpvr.command_line import Parser, at_least, run


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model", default=".", help="a DPVR repository with a latent (id or path)")
    parser.add_argument("--splits", nargs="+", type=int, default=[2, 4, 6, 8], help="later splits to compare with")
    parser.add_argument("--rank", type=at_least(1), default=48, help="of the latents at these splits, fitted here")
    parser.add_argument("--fit_rows", type=at_least(1), default=1200, help="pictures of the train split to fit on")
    parser.add_argument(
        "--tolerated", nargs="+", type=float, default=[0.005, 0.01, 0.02, 0.03], help="shares of replies"
    )
    parser.add_argument("--limit", type=at_least(2), default=200, help="questions of each task and split")
    parser.add_argument("--seed", type=int, default=0, help="of the questions and the fits")
    parser.add_argument("--output", type=Path, help="write the JSON document to this file")
    parser.add_argument("--json", action="store_true", help="print the JSON document as the last line")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    from dpvr.benchmarks.fallback_run import measure, table
    from dpvr.record import publish

    document = measure(args)
    print("\n".join(table(document)))
    publish(document, args.output, args.json)


if __name__ == "__main__":
    run(main, parse_args())
