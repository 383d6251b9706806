"""frontier_cells.py and reports/frontier.py: latents and their rivals at the same cost, measured and shown."""

import gzip
import json
from pathlib import Path

import pytest

from configuration_dpvr import DpvrLlavaConfig
from dpvr.benchmarks.cells import Cell, unique_cells
from dpvr.benchmarks.frontier_cells import BUDGETS, ENOUGH, STEP, FrontierGrid, ShortCosts, latent
from dpvr.benchmarks.grid import main, parse_args
from dpvr.benchmarks.grid_run import PLANS, load, read_plans
from dpvr.reports import frontier
from dpvr.reports.grid_results import Results
from modeling_dpvr import DpvrLlavaForConditionalGeneration

ROOT = Path(__file__).parent.parent
FITTED = "latent_rank48_split1_fitted10_seed1"


@pytest.fixture(scope="module")
def costs() -> ShortCosts:
    return ShortCosts(DpvrLlavaConfig.from_pretrained(ROOT).text_config, 64, 25)


def test_a_name_means_one_cell_and_every_row_of_chance_has_three_seeds(costs):
    tables = FrontierGrid(costs, 10, read_plans(PLANS, costs)).tables()
    cells = [cell for rows in tables.values() for row in rows for cell in row.cells]
    assert all({cell.name: cell for cell in cells}[cell.name] == cell for cell in cells)
    for row in (row for name in ("frontier", "reduction", "rows") for row in tables[name] if row.cells):
        by_chance = any(cell.training or cell.fit_rows or "random" in row.name for cell in row.cells)
        assert len(row.cells) == (3 if by_chance else 1), row.name
        assert len({cell.name for cell in row.cells}) == len(row.cells)
    assert len(unique_cells(tables["ranks"])) == 24


def test_a_latent_at_a_budget_fits_it_and_the_next_dearer_does_not(costs):
    for budget in BUDGETS:
        found = costs.best_latent(budget)
        if found is None:
            continue
        assert costs.ratio(found) <= budget < costs.ratio({**found, "latent_rank": found["latent_rank"] + STEP})
        split = found["latent_split_layer"]
        assert costs.ratio(latent(split + 1, ENOUGH)) > budget
        if found.get("latent_stride", 1) > 1:
            assert costs.ratio(latent(0, ENOUGH)) > budget and found["latent_rank"] >= ENOUGH
    assert costs.best_latent(0.2) is None and costs.best_latent(1.0)["latent_split_layer"] > 6


def test_early_plans_fit_their_budgets_and_have_no_row_where_none_was_found(costs):
    plans = read_plans(PLANS, costs)
    rows = {row.name: row for row in FrontierGrid(costs, 10, plans).trained() if "early plan" in row.name}
    assert list(rows) == ["0.70 late_fusion, early plan", "0.45 late_fusion, early plan"]
    for row in rows.values():
        assert costs.ratio(row.cells[0].fields) <= float(row.name[:4]) and row.cells[0].fields["fusion_layers"]
    assert not any("early plan" in row.name for row in FrontierGrid(costs, 10).trained())


def test_costs_of_latents_are_those_of_a_model_that_has_them(costs):
    model = DpvrLlavaForConditionalGeneration.from_pretrained(ROOT, routing="latent")
    assert costs.of(model) == pytest.approx(costs.ratio(latent(1, 48)))
    model.set_routing("none")
    assert costs.of(model) == 1.0


def test_a_fitted_latent_is_measured_and_stands_in_its_table(tmp_path):
    words = ["--grid", "frontier", "--limit", "2", "--model_name_or_path", str(ROOT)]
    folders = ["--output_dir", str(tmp_path / "frontier"), "--work_dir", str(tmp_path / "work")]
    outcome = main(parse_args([*words, *folders, "--cells", "vanilla", "latent", FITTED]))
    assert outcome["measured"] == ["vanilla", "latent", FITTED]
    results = Results(tmp_path / "frontier")
    row = results.row("rows", "10 pictures")
    own = ShortCosts(DpvrLlavaConfig.from_pretrained(ROOT).text_config, *results.prompt.values())
    assert [cell["name"] for cell in row.cells] == [FITTED] and row.flops == pytest.approx(own.ratio(latent(1, 48)))
    shown = frontier.blocks(tmp_path)
    replies = [
        json.loads(gzip.decompress((tmp_path / "frontier" / "cells" / f"{name}.replies.json.gz").read_bytes()))
        for name in (FITTED, "vanilla")
    ]
    pairs = [pair for items in zip(*replies, strict=True) for pair in zip(*items, strict=True)]
    equal = sum(one == other for one, other in pairs) / len(pairs)
    line = next(line for line in shown["rows"].splitlines() if line.startswith("| 10 pictures |"))
    assert f"| {equal:.1%} |" in line and f"| {100 * row.mean:.1f} |" in line and "| 1 |" in line
    assert "30 pictures" in shown["rows"].split("Not measured: ")[1]
    left = sum(1 for row in results.tables["frontier"] if row.planned) - 2  # vanilla and dpvr-mini's latent are there
    assert shown["frontier"].split("Not measured: ")[1].startswith(f"{left} more rows of this table.")
    assert (tmp_path / "accuracy_by_cost.png") in frontier.draw(tmp_path, tmp_path)


def test_a_latent_is_read_at_the_tokens_that_its_cell_says(costs):
    fields = latent(1, ENOUGH, latent_stride=4)
    cells = [
        Cell(fields, fit_rows=10, pruning=one) for one in (None, {"rank": "attention"}, {"rank": "random", "seed": 2})
    ]
    models = [load(cell, Path(), str(ROOT)) for cell in cells]
    choices = [vars(model).get("choice") for model in models]
    assert choices[0] is None and [(one.rank, one.seed) for one in choices[1:]] == [("attention", 0), ("random", 2)]
    own, by_attention, by_chance = (costs.of(model) for model in models)
    assert own == by_chance < by_attention < own * 1.01 and len({cell.name for cell in cells}) == 3


def test_rows_are_told_apart_by_what_they_are():
    class Row:
        def __init__(self, name: str, **fields: str):
            self.name, self.cells = name, [{"cell": {"fields": {"routing": "none", **fields}}}]

    names = ("vanilla", "0.45 vtw", "0.45 fastv", "random_pruning", "lora_r16", "full", "kv_substitution, split 1")
    assert [frontier.kind_of(Row(name)) for name in names] == [
        *("vanilla", "vtw", "fastv", "random_pruning", "lora", "full", "kv_substitution"),
    ]
    assert frontier.kind_of(Row("split 1, all", routing="latent")) == "latent"
    assert Cell({"routing": "latent"}).name == "latent"
