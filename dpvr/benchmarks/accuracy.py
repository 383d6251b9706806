"""Accuracy of a DPVR model and of what it is compared with, on MiniBench (paper section 4.2, Table 2).

    vanilla       the base alone, routing "none"
    untrained     the configured routing with its side branch as it was before training
    late_fusion   the configured routing with the weights as they are (the row has the routing's name)
    blind         vanilla, every picture replaced by an even grey one

The last line of standard output is one JSON document: {"rows": [{"name", "routing", "tasks", "mean", "six_bench_mean",
"n", ...}], ...} with the record of the run. Scores lie between 0 and 1, with 95 % intervals; see minibench/scoring.py.

    python -m dpvr.benchmarks.accuracy
    python -m dpvr.benchmarks.accuracy --limit 50 --seed 1
    python -m dpvr.benchmarks.accuracy --model_name_or_path outputs/side --output accuracy.json
"""

import argparse
from pathlib import Path
from typing import Any

from dpvr.inference.evaluation import evaluate
from dpvr.record import publish, run_record
from loading_dpvr import load_processor
from minibench.data import make_items
from minibench.scoring import constant_replies
from modeling_dpvr import DpvrLlavaForConditionalGeneration


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Accuracy of vanilla, untrained, trained and blind models.")
    parser.add_argument("--model_name_or_path", default=".", help="a DPVR repository (id or path)")
    parser.add_argument("--limit", type=int, default=500, help="questions per task")
    parser.add_argument("--seed", type=int, default=0, help="another seed asks other questions about other pictures")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--output", type=Path, help="also write the JSON document to this file")
    return parser.parse_args(argv)


def load(name_or_path: str) -> DpvrLlavaForConditionalGeneration:
    """Return the model, or raise ValueError if its routing has no side branch to compare."""
    model = DpvrLlavaForConditionalGeneration.from_pretrained(name_or_path)
    if not model.config.layer_plan().reads_side_branch:
        raise ValueError(
            f"Expected a model whose routing reads its side branch, got {model.config.routing!r} in {name_or_path!r}. "
            "Remedy: save it with late_fusion, persistent_context or kv_substitution."
        )
    return model


def measure(model: DpvrLlavaForConditionalGeneration, processor: Any, **options: Any) -> list[dict[str, Any]]:
    """Return the four rows; afterwards the side branch is untrained."""
    routing = model.config.routing
    rows = {}
    for name, row_routing in (("vanilla", "none"), ("blind", "none"), (routing, routing), ("untrained", routing)):
        if name == "untrained":
            model.reset_side_branch()
        model.set_routing(row_routing)
        scores = evaluate(model, processor, blind=name == "blind", description=name, **options)
        rows[name] = {"name": name, "routing": row_routing, **scores}
        model.set_routing(routing)
    return [rows[name] for name in ("vanilla", "untrained", routing, "blind")]


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
    model = load(args.model_name_or_path)
    processor = load_processor(args.model_name_or_path)
    record = {
        **run_record("-m dpvr.benchmarks.accuracy"),
        **{name: vars(args)[name] for name in ("limit", "seed", "batch_size")},
        "dpvr": model.config.dpvr_fields(),
    }
    options = {"num_questions": args.limit, "seed": args.seed}
    constant = constant_replies(make_items("test", **options))
    rows = measure(model, processor, batch_size=args.batch_size, **options)
    document = {"rows": rows, "constant_reply": constant, **record}
    print(format_table([*rows, {"name": "constant reply", **constant}]))
    publish(document, args.output)
    return document


if __name__ == "__main__":
    main(parse_args())
