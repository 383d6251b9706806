"""dpvr/reports: tables, claims and figures of answers made up here, and of those in results/."""

import json
import os
import subprocess
import sys
from math import sqrt
from pathlib import Path
from shutil import copyfile, copytree

import pytest
from lines import ONCE

from dpvr.reports import accuracy as tables
from dpvr.reports.__main__ import main, parse_args
from dpvr.reports.blocks import blocks
from dpvr.reports.claims import better, claims, within
from dpvr.reports.documents import between_marks, fill, read, table
from dpvr.reports.front import METHODS, render_front
from dpvr.reports.frontier import seeds_of
from dpvr.reports.grid_results import Measured, Results, units
from dpvr.reports.latency import render_latency, render_models_tokens
from dpvr.reports.pareto import draw
from minibench.tasks import TASKS

pytestmark = ONCE
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
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


@pytest.fixture(scope="module")
def made() -> dict[str, dict[str, str]]:
    """All blocks of all documents, from the committed results."""
    return blocks(RESULTS)


def test_a_row_is_the_mean_over_its_seeds_and_its_interval_is_the_one_by_hand(folder):
    results = Results(folder)
    late, vanilla = results.row("table2", "late_fusion"), results.vanilla
    assert late.tasks["multi_image"] == pytest.approx((0.5 + 0.75) / 2)
    assert late.mean == pytest.approx((0.5 + 0.75 + 0.75 + 1 + 6 * 2) / 16)
    assert late.std == pytest.approx(abs((0.5 + 0.75) - (0.75 + 1)) / 8 / sqrt(2))
    estimate, low, high = late.minus(vanilla)  # per item: multi_image -1, -1/2, 0, 0; scene 0, 0, -1/2, 0
    half, centre = 1.96 * sqrt(sum(VARIANCE.values())) / 8, (-1.5 / 6 - 0.5 / 6) / 8
    assert (estimate, low, high) == pytest.approx((-0.5 / 8, centre - half, centre + half))


def test_a_row_of_the_frontier_says_how_far_its_seeds_are_apart(folder):
    late = Results(folder).row("table2", "late_fusion")
    means = sorted((0.5 + 0.75 + 6, 0.75 + 1 + 6))
    assert seeds_of(late) == f"2 ({100 * means[0] / 8:.1f} to {100 * means[1] / 8:.1f})"
    assert seeds_of(late._replace(cells=late.cells[:1])) == "1"


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
    assert "| 0.45 plan | no such model at this cost |" in frontier and "| 0.70 plan | not measured |" in frontier
    assert tables.render_plans(results).splitlines()[2:] == ["| 0.70 | 3 | 5 7 | dpvr.analysis.probe --find_plan |"]
    answers = {one.label: one.answer for claim in claims(results) for one in claim.comparisons}
    assert answers["late fusion - all weights"] == "not measured"
    assert answers["late fusion - vanilla"] == "open"
    assert answers["split 8, 40 pictures - 10 pictures"] == "open"
    assert [row["name"] for row in tables.table2(results)] == ["vanilla", "late_fusion"]
    assert tables.table2(results)[0]["minus_vanilla"] is None and tables.table2(results)[1]["minus_vanilla"]
    assert tables.table2(results)[1]["seeds"] == []  # those of trained cells
    assert all(tables.blocks(results).values())


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
    labels = {one.label: one for claim in claims(Results(folder)) for one in claim.comparisons}
    assert labels["plan - fastv, after 2"].interval[0] == pytest.approx(-3 / 4 / 8)
    assert "plan - fastv, after 3" not in labels
    assert labels["plan - vtw"].answer == "not measured"
    assert (
        labels["plan - kv_substitution"].answer
        == labels["plan - random_pruning"].answer
        == "no such model at this cost"
    )


def test_the_weak_spot_is_where_late_fusion_loses_more_than_elsewhere(folder):
    (claim,) = (one for one in claims(Results(folder)) if one.question.startswith("Is multi_image"))
    estimate, low, high = claim.comparisons[0].interval
    assert estimate == pytest.approx(-0.375 + 0.125 / 7)
    here, elsewhere = 1.96 * VARIANCE["multi_image"] ** 0.5, 1.96 * (VARIANCE["scene"] + VARIANCE["equal"]) ** 0.5 / 7
    shift, other = -0.25 + 0.375, -0.5 / 6 / 7 + 0.125 / 7  # of the intervals' centres from the estimates
    below, above = (
        sqrt((here - shift) ** 2 + (elsewhere + other) ** 2),
        sqrt((here + shift) ** 2 + (elsewhere - other) ** 2),
    )
    assert (low, high) == pytest.approx((estimate - below, estimate + above))


def test_the_figures_are_drawn_and_not_without_vanilla(folder, tmp_path):
    assert draw(Results(folder), tmp_path) == [tmp_path / "pareto.png", tmp_path / "pareto.svg"]
    assert (tmp_path / "pareto.png").stat().st_size > 10_000
    drawn = (tmp_path / "pareto.svg").read_bytes()
    draw(Results(folder), tmp_path)
    assert (tmp_path / "pareto.svg").read_bytes() == drawn
    (folder / "cells" / "vanilla.json").unlink()
    (tmp_path / "pareto.png").unlink()
    assert draw(Results(folder), tmp_path) == []
    assert not (tmp_path / "pareto.png").exists()


def test_a_document_is_filled_between_its_marks_and_one_without_a_block_is_refused_by_name(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("Before.\n<!-- one -->\nold\n<!-- /one -->\nAfter.\n<!-- two -->\n<!-- /two -->\n")
    fill(path, {"one": "new\n", "two": "also new\n"})
    filled = "Before.\n<!-- one -->\nnew\n<!-- /one -->\nAfter.\n<!-- two -->\nalso new\n<!-- /two -->\n"
    assert path.read_text() == filled
    for text in (filled, filled.replace("<!-- /two -->", "")):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"page.md: There is no block '(three|two)': put <!-- (three|two) -->"):
            fill(path, {"one": "newer\n", "two": "newer\n", "three": "new\n"})
        assert path.read_text() == text


def test_the_front_page_has_one_row_per_method_from_three_records():
    """The numbers are looked up here in the records themselves."""
    lines = render_front(RESULTS).splitlines()
    rows = {method.latency: line.strip("| ").split(" | ") for method, line in zip(METHODS, lines[2:], strict=False)}
    assert len(rows) == 6 and lines[8] == "" and len(lines) == 10
    cells = {path.name: read(path) for path in (RESULTS / "frontier" / "cells").glob("*.json")}
    records = (read(RESULTS / "latency" / "models" / f"{name}.json") for name in ("llava-1.5-7b", "smolvlm2-500m"))
    large, timed = ({row["method"]: row for row in record["rows"] if row["image_tokens"] == 576} for record in records)
    for latency, *names in (
        ("vanilla", "vanilla.json"),
        ("latent", *(f"latent_rank56_split1_fitted1200_seed{seed}.json" for seed in (1, 2, 3))),
        ("read_everywhere", "kv_substitution_split2_untrained.json"),
        ("fastv", "fastv_layer3_keep0.5.json"),
    ):
        _, accuracy, _, flops, *costs = rows[latency]
        assert accuracy == f"{100 * sum(cells[name]['row']['mean'] for name in names) / len(names):.1f}"
        assert flops == f"{cells[names[0]]['prefill_flops_ratio']:.3f}"
        counted, measured = (record[latency]["ratio_to_vanilla"] for record in (large, timed))
        ratios = (counted["prefill_flops"], counted["kv_bytes"], measured["prefill_without_tower_ms"])
        assert costs == [f"{ratio:.3f}" for ratio in ratios]


def test_a_method_of_the_front_page_that_was_not_measured_says_so(tmp_path):
    copytree(RESULTS / "latency" / "models", tmp_path / "latency" / "models")
    (tmp_path / "frontier" / "cells").mkdir(parents=True)
    for name in ("grid.json", "cells/vanilla.json"):
        copyfile(RESULTS / "frontier" / name, tmp_path / "frontier" / name)
    text = render_front(tmp_path)
    assert text.count("not measured") == len(METHODS) - 1 and "0 fits of the latent" in text


def test_a_sweep_that_was_measured_in_two_runs_is_one_table_and_names_both(tmp_path):
    record = read(RESULTS / "latency" / "models_tokens" / "smolvlm2-500m.json")
    sizes = sorted({row["image_tokens"] for row in record["rows"]})
    for place, own, threads in (("", sizes[:-1], 1), ("large", sizes[-1:], 7)):
        folder = tmp_path / "latency" / "models_tokens" / place
        folder.mkdir(parents=True, exist_ok=True)
        part = {**record, "threads": threads, "rows": [row for row in record["rows"] if row["image_tokens"] in own]}
        (folder / "smolvlm2-500m.json").write_text(json.dumps(part))
    text, whole = render_models_tokens(tmp_path), render_models_tokens(RESULTS)
    rows = [line for line in text.splitlines() if line.startswith("| smolvlm2-500m")]
    assert rows == [line for line in whole.splitlines() if line.startswith("| smolvlm2-500m")] and rows
    assert "1 thread," in text and "7 threads," in text


@pytest.mark.parametrize(("clock", "named"), [("cpu", "processor time"), ("wall", "wall time"), (None, "wall time")])
def test_records_name_their_clock_or_are_of_wall_time(clock, named, tmp_path):
    for name in ("512x32.json", "peaks/512x32.json"):
        record = read(RESULTS / "latency" / name)
        record.pop("clock", None)
        path = tmp_path / "latency" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record | ({"clock": clock} if clock else {})))
    assert f", {named}, medians of" in render_latency(tmp_path)


@pytest.mark.parametrize(
    "document", ["README.md", "docs/accuracy.md", "docs/minibench.md", "docs/performance.md", "docs/training.md"]
)
def test_the_documents_are_made_from_the_results(document, made):
    text = (ROOT / document).read_text(encoding="utf-8")
    for name, block in made[document].items():
        assert between_marks(text, name) == block, name


def test_table_2_is_made_from_the_results():
    rows = tables.table2(Results(RESULTS / "minibench"))
    assert read(RESULTS / "minibench" / "table2.json")["rows"] == rows


def test_one_command_fills_every_document_and_draws_every_figure(made, tmp_path, monkeypatch, capsys):
    copytree(RESULTS, tmp_path / "results")
    (tmp_path / "docs").mkdir()
    for document, texts in made.items():
        marks = (f"<!-- {name} -->\n<!-- /{name} -->\n" for name in texts)
        (tmp_path / document).write_text("".join(marks), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    main(parse_args([]))
    for document, texts in made.items():
        filled = (tmp_path / document).read_text(encoding="utf-8")
        assert {name: between_marks(filled, name) for name in texts} == texts
    drawn = {path.name for path in (tmp_path / "docs").glob("*.png")}
    assert drawn == {"accuracy_by_cost.png", "latency_kv.png", "latency_roofline.png", "latency_text.png"}
    assert f"blocks of {len(made)} documents were filled" in capsys.readouterr().out


def test_two_runs_make_the_same_bytes(tmp_path):
    """Every document, table and figure, from copies of results/, in processes whose sets and dicts hash otherwise."""
    for seed in ("1", "2"):
        folder = tmp_path / seed
        copytree(RESULTS, folder / "results")
        copytree(ROOT / "docs", folder / "docs")
        copyfile(ROOT / "README.md", folder / "README.md")
        for picture in (*folder.rglob("*.png"), *folder.rglob("*.svg")):
            picture.write_bytes(b"")
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-m", "dpvr.reports"], cwd=folder, env=variables, check=True)
    one, two = (
        {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.*")) if path.is_file()}
        for folder in (tmp_path / "1", tmp_path / "2")
    )
    assert one == two
    empty = {str(path) for path, content in one.items() if path.suffix in (".png", ".svg") and not content}
    assert not empty  # every one is drawn anew


def test_a_bar_in_a_cell_does_not_end_it():
    head, rule, row = table(["plan", "x"], [["`o|ll`", "1"]])
    assert row == "| `o\\|ll` | 1 |" and head.count("|") == rule.count("|") == 3
