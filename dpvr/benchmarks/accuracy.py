"""Accuracy of a DPVR model and of what it is compared with, on MiniBench (paper section 4.2, Table 2).

    vanilla       the base by itself, routing "none"
    untrained     the configured routing with its side branch as it was before training; not for a latent
    latent        the configured routing with the weights as they are (the row has the routing's name)
    blind         vanilla, every picture replaced by an even grey one

It prints a table in per cent. The JSON document, which --output writes and --json prints, holds "rows" and the record
of the run; scores lie between 0 and 1, with 95% intervals (minibench/scoring.py).

    python -m dpvr.benchmarks.accuracy
    python -m dpvr.benchmarks.accuracy --limit 50 --seed 1
    python -m dpvr.benchmarks.accuracy --model_name_or_path outputs/side --output accuracy.json
"""

import argparse
from pathlib import Path
from typing import Any

from dpvr.command_line import Parser, at_least, run


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model_name_or_path", default=".", help="a DPVR repository (id or path)")
    parser.add_argument("--limit", type=at_least(1), default=500, help="questions of each task")
    parser.add_argument("--seed", type=int, default=0, help="another seed asks other questions about other pictures")
    parser.add_argument("--batch_size", type=at_least(1), default=64, help="questions answered at once")
    parser.add_argument("--output", type=Path, help="write the JSON document to this file")
    parser.add_argument("--json", action="store_true", help="print the JSON document as the last line")
    return parser.parse_args(argv)


def format_table(rows: list[dict[str, Any]]) -> str:
    """The scores in per cent, one line per row."""
    header = ["", *rows[0]["tasks"], "mean", "six-bench", "95% of mean"]
    lines = [header]
    for row in rows:
        scores = [*row["tasks"].values(), row["mean"], row["six_bench_mean"]]
        interval = f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"
        lines.append([row["name"], *(f"{100 * score:.1f}" for score in scores), interval])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def main(args: argparse.Namespace) -> dict[str, Any]:
    from dpvr.benchmarks.accuracy_rows import load, measure
    from dpvr.record import publish, run_record
    from minibench.data import make_items
    from minibench.scoring import constant_replies
    from processors_dpvr import load_processor

    model = load(args.model_name_or_path)
    processor = load_processor(args.model_name_or_path)
    record = {
        **run_record("-m dpvr.benchmarks.accuracy"),
        **{name: vars(args)[name] for name in ("limit", "seed", "batch_size")},
        "dpvr": model.config.dpvr_fields(),
    }
    questions = {"num_questions": args.limit, "seed": args.seed}
    constant = constant_replies(make_items("test", **questions))
    rows = measure(model, processor, batch_size=args.batch_size, **questions)
    document = {"rows": rows, "constant_reply": constant, **record}
    print(f"MiniBench, {args.limit} questions of each task, seed {args.seed}: scores in per cent.")
    print(format_table([*rows, {"name": "constant reply", **constant}]))
    publish(document, args.output, args.json)
    return document


if __name__ == "__main__":
    run(main, parse_args())
