"""Where a plan could break: plans and vanilla on long answers, small details, crowded, turned or noisy pictures.

limit_sets.py   situations, each of several levels; the right answers are known
    |
vanilla, late fusion, the repository's latent, latents fitted here, random pruning as cheap as the first latent
    |
of each level   score, paired difference to vanilla, replies equal to vanilla's
of long ones    at each place of vanilla's reply: is the model's next token vanilla's?

python -m dpvr.benchmarks.limits --limit 20                                    # a first look
python -m dpvr.benchmarks.limits --fit 0:48:2 2:48 3:104 --output results/limits.json
"""

import argparse
from pathlib import Path

from dpvr.command_line import Parser, at_least, run


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model", default=".", help="a DPVR repository with a latent (id or path)")
    parser.add_argument("--fit", nargs="*", default=[], help="latents to fit, as split:rank or split:rank:stride")
    parser.add_argument("--fit_rows", type=at_least(1), default=1200, help="pictures of the train split to fit on")
    parser.add_argument("--limit", type=at_least(2), default=300, help="questions of each level")
    parser.add_argument("--seed", type=int, default=0, help="of the questions and the fits")
    parser.add_argument("--output", type=Path, help="write the JSON document to this file")
    parser.add_argument("--json", action="store_true", help="print the JSON document as the last line")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    from dpvr.benchmarks.limits_run import measure, table
    from dpvr.record import publish

    document = measure(args)
    print("\n".join(table(document)))
    publish(document, args.output, args.json)


if __name__ == "__main__":
    run(main, parse_args())
