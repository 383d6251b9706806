"""minibench/results.py, findings.py, tables.py and pareto.py: on answers made up here, and on those in results/."""

import json
from math import sqrt
from pathlib import Path

import pytest

from dpvr.reports import accuracy as tables
from dpvr.reports.claims import better, findings, within
from dpvr.reports.documents import between_marks
from dpvr.reports.grid_results import Measured, Results, units
from dpvr.reports.pareto import draw
from minibench.tasks import TASKS

SETTINGS = {"model": ".", "limit": 4, "seed": 0}
NUM_QUESTIONS = {"perception": 2, "cognition": 2, "choice_en": 4, "choice_cn": 4}


def make_cell(name: str, wrong: dict[str, list[int]], routing: str = "late_fusion", **others) -> dict:
    """A measured cell with four items of each task, in which the listed items have their first question wrong."""
    right, scores = {}, {}
    for task in TASKS:
        several = NUM_QUESTIONS.get(task, 1)
        items = ["0" + "1" * (several - 1) if item in wrong.get(task, []) else "1" * several for item in range(4)]
        right[task] = "".join(items)
        lost = 0.75 if task in ("perception", "cognition") else 1.0
        scores[task] = 1 - lost * len(wrong.get(task, [])) / 4
    definition = {"fields": {"routing": routing}, "training": None, "pruning": None, "seed": 1, "split": "test"}
    return {
        "name": name,
        "cell": {**definition, **others},
        "settings": SETTINGS,
        "row": {
            "tasks": scores,
            "mean": sum(scores.values()) / 8,
            "n": 32,
            "details": {task: {"n": 4} for task in TASKS},
        },
        "right": right,
        "trainable_parameters": 0,
        "prefill_flops_ratio": 0.5,
        "training": None,
        "command": "python -m dpvr.benchmarks.grid",
        "hardware": "a machine",
        "versions": {"torch": "2", "transformers": "5"},
    }


# of late fusion - vanilla: four items and two more; of the equal tasks four, and the two of choices as one
VARIANCE = {"multi_image": (2.25 - 1.5**2 / 6) / 36, "scene": (1.25 - 0.5**2 / 6) / 36, "equal": (4 * 1 + 4) / 36}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Vanilla with everything right, two of three seeds of late fusion, and full fine-tuning not measured."""
    cells = [
        make_cell("vanilla", {}, routing="none"),
        make_cell("late1", {"multi_image": [0, 1], "scene": [2]}),
        make_cell("late2", {"multi_image": [0]}, seed=2),
    ]
    rows = [("vanilla", ["vanilla"]), ("late_fusion", ["late1", "late2", "late3"]), ("full", ["full"])]
    plan = {"routing": "late_fusion", "split_layer": 3, "fusion_layers": [5, 7]}
    grid = {
        "settings": SETTINGS,
        "prompt": {"image_tokens": 64, "text_tokens": 25},
        "found_plans": [0.7],
        "tables": {
            "table2": [{"name": name, "cells": names} for name, names in rows],
            "frontier": [{"name": "0.45 plan", "cells": []}, {"name": "0.70 plan", "cells": ["plan"]}],
            "splits": [{"name": "8, trained", "cells": ["late1", "late2", "late3"]}],
            "training_length": [
                {"name": "split 8, 10 pictures", "cells": ["late2"]},
                {"name": "split 8, 40 pictures", "cells": ["late1"]},
            ],
            **{table: [] for table in ("fusion", "side_branch", "learning_rates")},
        },
        "cells": {**{cell["name"]: cell["cell"] for cell in cells}, "late3": {}, "full": {}, "plan": {"fields": plan}},
    }
    (tmp_path / "grid.json").write_text(json.dumps(grid))
    (tmp_path / "cells").mkdir()
    for cell in cells:
        (tmp_path / "cells" / f"{cell['name']}.json").write_text(json.dumps(cell))
    return tmp_path


def test_a_row_is_the_mean_over_its_seeds_and_its_interval_is_the_one_by_hand(folder):
    results = Results(folder)
    late, vanilla = results.row("table2", "late_fusion"), results.vanilla
    assert late.tasks["multi_image"] == pytest.approx((0.5 + 0.75) / 2)
    assert late.mean == pytest.approx((0.5 + 0.75 + 0.75 + 1 + 6 * 2) / 16)
    assert late.std == pytest.approx(abs((0.5 + 0.75) - (0.75 + 1)) / 8 / sqrt(2))
    estimate, low, high = late.minus(vanilla)  # per item: multi_image -1, -1/2, 0, 0; scene 0, 0, -1/2, 0
    half, centre = 1.96 * sqrt(sum(VARIANCE.values())) / 8, (-1.5 / 6 - 0.5 / 6) / 8
    assert (estimate, low, high) == pytest.approx((-0.5 / 8, centre - half, centre + half))


def test_trained_rows_are_compared_by_the_seeds_that_both_have(folder):
    training = {"final_loss": 1.0}
    rows = [make_cell("a", {"scene": [0]}), make_cell("b", {"scene": [0, 1, 2]}, seed=2)]
    several, single = Measured("several", rows, ["a", "b"]), Measured("single", [make_cell("c", {})], ["c"])
    assert several.minus(single)[0] == pytest.approx(-2 / 4 / 8)
    for cell in [*rows, *single.cells]:
        cell["training"] = training
    assert several.minus(single)[0] == pytest.approx(-1 / 4 / 8)


def test_answers_give_the_scores_that_were_recorded():
    cell = make_cell("some", {"perception": [1], "choice_en": [0, 3], "scene": [2]})
    assert {task: sum(scores) / 4 for task, scores in units(cell).items()} == pytest.approx(cell["row"]["tasks"])


def test_a_cell_of_other_settings_or_definition_counts_as_not_measured(folder):
    for name, key, value in (("late1", "settings", {**SETTINGS, "limit": 5}), ("vanilla", "cell", {})):
        path = folder / "cells" / f"{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    results = Results(folder)
    assert results.vanilla is None and len(results.row("table2", "late_fusion").cells) == 1


def test_what_is_missing_reads_not_measured(folder):
    results = Results(folder)
    table = tables.render_table(results, "table2").splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == [
        "| vanilla LLaVA",
        "| all weights",
        "| late fusion, 2 of 3 seeds",
    ]
    assert table[3].startswith("| all weights | not measured |") and len({line.count("|") for line in table}) == 1
    frontier = tables.render_table(results, "frontier")
    assert "| 0.45 plan | none is so cheap |" in frontier and "| 0.70 plan | not measured |" in frontier
    assert tables.render_plans(results).splitlines()[2:] == ["| 0.70 | 3 | 5 7 | probe_saturation.py --find_plan |"]
    answers = {one.label: one.answer for finding in findings(results) for one in finding.comparisons}
    assert answers["late fusion - all weights"] == "not measured"
    assert answers["late fusion - vanilla"] == "open"
    assert answers["split 8, 40 pictures - 10 pictures"] == "open"
    assert [row["name"] for row in tables.table2(results)] == ["vanilla", "late_fusion"]
    assert tables.table2(results)[0]["minus_vanilla"] is None and tables.table2(results)[1]["minus_vanilla"]
    assert tables.table2(results)[1]["seeds"] == []  # those of trained cells
    assert all(tables.blocks(results)["docs/accuracy.md"].values())


def test_answers_follow_the_interval():
    assert [within(i) for i in ((0, -0.01, 0.01), (0, -0.02, 0.01), (0, -0.03, -0.02))] == ["yes", "open", "no"]
    assert [better(i) for i in ((1, 0.1, 2), (0, -1, 1), (-1, -2, -0.1))] == ["yes", "open", "no"]
    assert within((0, 0, 0)) == "yes" and better((0, 0, 0)) == "no"


def test_a_rival_is_the_best_of_its_kind_within_the_budget(folder):
    grid = json.loads((folder / "grid.json").read_text())
    rows = {"plan": ["late1"], "fastv, after 3": ["late2"], "fastv, after 2": ["vanilla"], "vtw": ["full"]}
    rows["kv_substitution"] = []
    grid["tables"]["frontier"] = [{"name": f"0.70 {name}", "cells": cells} for name, cells in rows.items()]
    (folder / "grid.json").write_text(json.dumps(grid))
    labels = {one.label: one for finding in findings(Results(folder)) for one in finding.comparisons}
    assert labels["plan - fastv, after 2"].interval[0] == pytest.approx(-3 / 4 / 8)
    assert "plan - fastv, after 3" not in labels
    assert labels["plan - vtw"].answer == "not measured"
    assert labels["plan - kv_substitution"].answer == labels["plan - random_pruning"].answer == "none is so cheap"


def test_the_weak_spot_is_where_late_fusion_loses_more_than_elsewhere(folder):
    (finding,) = (f for f in findings(Results(folder)) if f.question.startswith("Is multi_image"))
    estimate, low, high = finding.comparisons[0].interval
    assert estimate == pytest.approx(-0.375 + 0.125 / 7)
    here, elsewhere = 1.96 * VARIANCE["multi_image"] ** 0.5, 1.96 * (VARIANCE["scene"] + VARIANCE["equal"]) ** 0.5 / 7
    shift, other = -0.25 + 0.375, -0.5 / 6 / 7 + 0.125 / 7  # of the intervals' centres from the estimates
    below, above = (
        sqrt((here - shift) ** 2 + (elsewhere + other) ** 2),
        sqrt((here + shift) ** 2 + (elsewhere - other) ** 2),
    )
    assert (low, high) == pytest.approx((estimate - below, estimate + above))


def test_the_figure_is_drawn_and_not_without_vanilla(folder, tmp_path):
    draw(Results(folder), tmp_path)
    assert (tmp_path / "pareto.png").stat().st_size > 10_000
    drawn = (tmp_path / "pareto.svg").read_bytes()
    draw(Results(folder), tmp_path)
    assert (tmp_path / "pareto.svg").read_bytes() == drawn
    (folder / "cells" / "vanilla.json").unlink()
    (tmp_path / "pareto.png").unlink()
    draw(Results(folder), tmp_path)
    assert not (tmp_path / "pareto.png").exists()


def test_the_documents_are_made_from_the_results():
    root = Path(__file__).parent.parent
    results = Results(root / "results" / "minibench")
    for document, blocks in tables.blocks(results).items():
        text = (root / document).read_text(encoding="utf-8")
        for name, block in blocks.items():
            assert between_marks(text, name) == block, name
    table2 = json.loads((root / "results" / "minibench" / "table2.json").read_text(encoding="utf-8"))
    assert table2["rows"] == tables.table2(results)
