"""Train and measure the accuracy grid, unattended: a killed run goes on where it stopped.

    cells.py, frontier_cells.py   which models, in which tables, the most important first
        |
    train_sft.py, in a process of its own --> WORK_DIR/<cell>          deleted once it is measured
        |
    the same questions for all cells
        |
    OUTPUT_DIR/cells/<cell>.json         scores, right answers, training, command, versions; <cell>.replies.json.gz
    OUTPUT_DIR/grid.json                 which cells stand in which table
        |
    python -m dpvr.reports               tables, figures, documents

A cell whose file says that it was measured with this definition and these settings is left alone; several runs share
the work, each with its own cells. It ends with exit status 1 if a cell could not be trained.

    python -m dpvr.benchmarks.grid
    python -m dpvr.benchmarks.grid --cells table2 'late_fusion_split4_*'
    python -m dpvr.analysis.probe --find_plan 0.7 0.55 0.45 && python -m dpvr.benchmarks.grid --cells frontier
    python -m dpvr.benchmarks.grid --grid frontier --limit 500      # latents, and their rivals at the same cost
"""

import argparse
import sys
from pathlib import Path

from dpvr.command_line import Parser, at_least, run

GRIDS = {"paper": "results/minibench", "frontier": "results/frontier"}  # and where their results go


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--grid", choices=GRIDS, default="paper", help="the paper's tables, or latents beside what costs as much"
    )
    parser.add_argument(
        "--output_dir", type=Path, help="a folder for the results; default: results/minibench, results/frontier"
    )
    parser.add_argument(
        "--work_dir",
        type=Path,
        default=Path("outputs/grid"),
        help="a folder for trained cells, logs and locks",
    )
    parser.add_argument("--model_name_or_path", default=".", help="the base of all cells (id or path)")
    parser.add_argument("--num_rows", type=at_least(1), default=800, help="training pictures of a cell")
    parser.add_argument("--limit", type=at_least(1), default=100, help="questions of each task")
    parser.add_argument("--seed", type=int, default=0, help="of the questions; the cells have seeds of their own")
    parser.add_argument("--batch_size", type=at_least(1), default=64, help="questions answered at once")
    parser.add_argument(
        "--plans",
        type=Path,
        help="where dpvr.analysis.probe --find_plan wrote plans.json; default: results/saturation, if it has one",
    )
    parser.add_argument(
        "--cells", nargs="+", default=["*"], help="names of tables or cells, with * for any characters"
    )
    parser.add_argument("--json", action="store_true", help="print what became of each cell as JSON, as the last line")
    args = parser.parse_args(argv)
    args.output_dir = args.output_dir or Path(GRIDS[args.grid])
    return args


def main(args: argparse.Namespace) -> dict[str, list[str]]:
    """Returns the names of cells by what became of them: measured, finished before, busy elsewhere, failed."""
    from dpvr.benchmarks.grid_run import run_grid
    from dpvr.record import publish

    outcome = run_grid(args)
    print(
        f"{len(outcome['measured'])} cells were measured, {len(outcome['finished'])} had been before, "
        f"{len(outcome['busy'])} are another run's, {len(outcome['failed'])} could not be trained. Their files are in "
        f"{args.output_dir}; python -m dpvr.reports makes the tables."
    )
    publish(outcome, None, args.json)
    return outcome


if __name__ == "__main__":
    sys.exit(bool(run(main, parse_args())["failed"]))
