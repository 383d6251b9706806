"""MiniBench's scores of a model by lmms-eval, under vanilla and under the model's own routing.

    questions, in a temporary folder --> lmms-eval --> a table; --output writes the JSON document, --json prints it

The scores are those of dpvr.benchmarks.accuracy; docs/lmms_eval.md says how to install lmms-eval.

    python -m dpvr.lmms_eval.minibench --limit 100 --output results/lmms_eval/minibench.json
"""

import argparse
from pathlib import Path
from typing import Any

from dpvr.command_line import Parser, at_least, run


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model_name_or_path", default=".", help="a DPVR repository (id or path)")
    parser.add_argument("--limit", type=at_least(1), default=100, help="questions of each task")
    parser.add_argument("--seed", type=int, default=0, help="of the questions, as in dpvr.benchmarks.accuracy")
    parser.add_argument("--batch_size", type=at_least(1), default=64, help="questions answered at once")
    parser.add_argument("--output", type=Path, help="write the JSON document to this file")
    parser.add_argument("--json", action="store_true", help="print the JSON document as the last line")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> dict[str, Any]:
    import tempfile
    from importlib.metadata import version

    from configuration_dpvr import DpvrLlavaConfig
    from dpvr.lmms_eval.minibench_tasks import measure, write_tasks
    from dpvr.record import publish, run_record

    routing = DpvrLlavaConfig.from_pretrained(args.model_name_or_path).routing
    record = {
        **run_record("-m dpvr.lmms_eval.minibench"),
        **{name: vars(args)[name] for name in ("limit", "seed", "batch_size")},
    }
    record["versions"]["lmms_eval"] = version("lmms_eval")
    with tempfile.TemporaryDirectory() as folder:
        task_files = write_tasks(Path(folder), args.limit, args.seed)
        rows = [measure(args.model_name_or_path, each, task_files, args.batch_size) for each in ("none", routing)]
    document = {"rows": rows, **record}
    print(f"MiniBench by lmms-eval, {args.limit} questions of each task, seed {args.seed}: scores in per cent.")
    print_table(rows)
    publish(document, args.output, args.json)
    return document


def print_table(rows: list[dict[str, Any]]) -> None:
    names = [row["name"] for row in rows]
    print(" " * 12 + "".join(f"{name:>20}" for name in names))
    scores = {task: [row["tasks"][task] for row in rows] for task in rows[0]["tasks"]}
    for task, values in {**scores, "mean": [row["mean"] for row in rows]}.items():
        print(f"{task:<12}" + "".join(f"{100 * value:>20.1f}" for value in values))


if __name__ == "__main__":
    run(main, parse_args())
