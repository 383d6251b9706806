"""grid.py, grid_run.py and cells.py: what is measured, how a run goes on, and that the files say what was answered."""

import fcntl
import gzip
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from configuration_dpvr import DpvrLlavaConfig
from dpvr.benchmarks import grid_run
from dpvr.benchmarks.cells import BUDGETS, SEEDS, Cell, Grid, GridCosts, unique_cells
from dpvr.benchmarks.grid import main, parse_args
from dpvr.inference.evaluation import Reply, score
from dpvr.pretraining.model import make_model
from dpvr.pretraining.processor import save_processor
from dpvr.pretraining.train import parse_args as parse_pretrain_args
from dpvr.reports.grid_results import Results
from minibench.data import make_items
from modeling_dpvr import DpvrLlavaForConditionalGeneration
from versions_dpvr import LINE_4

ROOT = Path(__file__).parent.parent
TRAINED = "late_fusion_split4_layers6.7_seed1"
CELLS = ["vanilla", TRAINED, "fastv_layer3_keep0.5"]


@pytest.fixture(scope="module")
def costs() -> GridCosts:
    return GridCosts(DpvrLlavaConfig.from_pretrained(ROOT).text_config, 64, 25)


@pytest.fixture(scope="module")
def tables(costs):
    return Grid(costs, num_rows=10).tables()


@pytest.fixture(scope="module")
def random_twelve(tmp_path_factory, minibench_processor) -> str:
    """A random model as deep as dpvr-mini, and narrow."""
    folder = tmp_path_factory.mktemp("random_twelve")
    size = ["--text_layers", "12", "--text_width", "64", "--vision_layers", "2", "--vision_width", "32"]
    torch.manual_seed(0)
    llava = make_model(minibench_processor, parse_pretrain_args(["--output_dir", str(folder), *size]))
    llava.set_attn_implementation("sdpa")
    DpvrLlavaForConditionalGeneration.from_llava(llava, split_layer=8).save_pretrained(folder)
    save_processor(minibench_processor, folder)
    return str(folder)


def test_a_name_means_one_cell_and_table_2_has_all_its_rows(tables):
    cells = [cell for rows in tables.values() for row in rows for cell in row.cells]
    by_name = {cell.name: cell for cell in cells}
    assert all(by_name[cell.name] == cell for cell in cells)
    assert {row.name for row in tables["table2"]} == {
        *("vanilla", "full", "lora_r16", "lora_r64", "fastv", "vtw", "random_pruning", "untrained"),
        *("persistent_context", "kv_substitution", "late_fusion", "text_only"),
    }
    (late,) = (row for row in tables["table2"] if row.name == "late_fusion")
    assert [cell.seed for cell in late.cells] == list(SEEDS)
    assert all(cell.split == "test" for table in tables for row in tables[table] for cell in row.cells) is False
    assert {cell.split for row in tables["learning_rates"] for cell in row.cells} == {"validation"}


def test_what_stands_at_a_budget_fits_it_and_the_next_larger_does_not(costs, tables):
    for row in tables["frontier"]:
        budget = float(row.name.split()[0])
        for cell in row.cells:
            if cell.pruning:
                continue
            assert costs.ratio(cell.fields) <= budget
            if "fusion_layers" not in cell.fields:
                deeper = {**cell.fields, "split_layer": cell.fields["split_layer"] + 1}
                assert costs.ratio(deeper) > budget, row.name
    for budget in BUDGETS:
        found = costs.most_kept("random", budget)
        assert len(found) == 2 or [one["layer"] for one in found] in ([], [1])
        for one in found:
            fits = [kept / 64 for kept in range(1, 65) if pruned_ratio(costs, one["layer"], kept) <= budget]
            assert one["keep"] == max(fits)
    assert [[one["layer"] for one in costs.most_kept("random", budget)] for budget in (0.7, 0.45)] == [[3, 2], [2, 1]]


def pruned_ratio(costs: GridCosts, cut: int, kept: int) -> float:
    """By counting layers: some with all tokens, the others and the last one's single query with what is kept."""
    layer = costs.counted.layers[0].flops
    flops = cut * layer(89, 89) + (11 - cut) * layer(25 + kept, 25 + kept) + layer(1, 25 + kept)
    return (flops + 2 * 192 * 768) / costs.vanilla


def test_what_would_mix_two_grids_is_refused_before_anything_is_measured(random_twelve, tmp_path):
    options = ["--model_name_or_path", random_twelve, "--limit", "4", "--cells", "vanilla", "--output_dir"]
    small = [*options, str(tmp_path / "results"), "--num_rows", "4", "--work_dir", str(tmp_path / "work")]
    assert main(parse_args(small))["measured"] == ["vanilla"]
    before = (tmp_path / "results" / "grid.json").read_bytes()
    with pytest.raises(
        ValueError,
        match="training of this run, .*'num_rows': 5, .* differ from .*'num_rows': 4, .*choose another --output_dir",
    ):
        main(parse_args([*small, "--num_rows", "5"]))
    with pytest.raises(ValueError, match=r"settings of this run, .*'seed': 1"):
        main(parse_args([*small, "--seed", "1"]))
    with pytest.raises(ValueError, match=r"no plans.json in .*python -m dpvr.analysis.probe --find_plan"):
        main(parse_args([*small, "--plans", str(tmp_path)]))
    assert (tmp_path / "results" / "grid.json").read_bytes() == before
    own_plan = tmp_path / "own_plan"
    own_plan.mkdir()
    config = json.loads((Path(random_twelve) / "config.json").read_text()) | {"fusion_layers": [8, 9, 10]}
    (own_plan / "config.json").write_text(json.dumps(config))
    args = parse_args(["--model_name_or_path", str(own_plan)])
    with pytest.raises(
        ValueError, match=r"sets {'fusion_layers': \[8, 9, 10\]}, but .*{'fusion_layers': None}: set these"
    ):
        grid_run.make_grid(args, grid_run.Questions({}, 64, 25))


def test_plans_replace_the_provisional_ones(costs, tmp_path):
    assert grid_run.read_plans(tmp_path, costs) == {}
    tried = [(3, [5, 7], 0.2), (1, [11], 0.9), (9, [9, 10, 11], 0.0), (2, [], 0.1)]  # split, layers, KL
    points = [{"split_layer": split, "fusion_layers": layers, "kl": kl} for split, layers, kl in tried]
    (tmp_path / "plans.json").write_text(json.dumps({"frontier": points}))
    plan = {"routing": "late_fusion", "split_layer": 3, "fusion_layers": [5, 7]}
    found = grid_run.read_plans(tmp_path, costs)
    rows = {row.name: row for row in Grid(costs, 10, found).frontier()}
    assert [cell.fields for cell in rows["0.55 plan"].cells] == [plan] * 3
    assert found[0.45] == {"routing": "late_fusion", "split_layer": 1, "fusion_layers": [11]}
    assert all(costs.ratio(fields) <= budget for budget, fields in found.items()) and 0.28 not in found
    with pytest.raises(ValueError, match=r"plans for the budgets \[0.5\], and the grid has only"):
        Grid(costs, 10, {0.5: plan})


def test_cells_are_selected_by_table_name_or_pattern_with_the_slow_baselines_last(tables):
    cells = grid_run.select(tables, ["table2"])
    assert cells[0].name == "vanilla" and [cell.is_baseline for cell in cells[-3:]] == [True] * 3
    assert [cell.name for cell in grid_run.select(tables, ["late_fusion_split8_k2_*"])] == [
        f"late_fusion_split8_k2_seed{seed}" for seed in SEEDS
    ]
    everything = grid_run.select(tables, ["*"])
    assert {cell.name for cell in everything} == {c.name for rows in tables.values() for c in unique_cells(rows)}
    with pytest.raises(ValueError, match="named 'vanila'. There are table2, "):
        grid_run.select(tables, ["vanila"])


@pytest.mark.skipif(LINE_4, reason="training is for transformers 5.18 and newer")
def test_a_killed_grid_goes_on_and_its_answers_reproduce_its_scores(random_twelve, tmp_path, monkeypatch):
    options = ["--model_name_or_path", random_twelve, "--num_rows", "4", "--limit", "4"]
    folders = ["--output_dir", str(tmp_path / "results"), "--work_dir", str(tmp_path / "work")]
    args = parse_args([*options, *folders, "--cells", *CELLS])
    train = grid_run.train

    def killed(cell, folder, base, lock):
        folder.mkdir()
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(grid_run, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        main(args)
    monkeypatch.setattr(grid_run, "train", train)
    first = tmp_path / "results" / "cells" / "vanilla.json"
    before = first.stat().st_mtime_ns
    outcome = main(args)
    assert outcome["finished"] == CELLS[:1] + CELLS[2:] and outcome["measured"] == [TRAINED]
    assert first.stat().st_mtime_ns == before and not (tmp_path / "work" / TRAINED).exists()

    items = make_items("test", 4, 0)
    for name in CELLS:
        path = tmp_path / "results" / "cells" / f"{name}.json"
        cell = json.loads(path.read_text())
        texts = json.loads(gzip.decompress(path.with_suffix(".replies.json.gz").read_bytes()))
        replies = [[Reply(text, 1, True) for text in several] for several in texts]
        assert score(items, replies)["details"] == cell["row"]["details"]
        assert grid_run.right(items, replies) == cell["right"]
    trained = json.loads((tmp_path / "results" / "cells" / f"{TRAINED}.json").read_text())
    assert trained["training"]["recipe"]["seed"] == 1 and trained["training"]["data"]["fingerprint"] == [4, 7, 1]
    assert trained["trainable_parameters"] > 0 and 0 < trained["prefill_flops_ratio"] < 1
    results = Results(tmp_path / "results")
    row = results.row("fusion", "4, layers 6 7")
    assert row.tasks == trained["row"]["tasks"]
    assert results.row("table2", "late_fusion") is None


def test_a_cell_that_another_run_works_at_is_left_to_it(tmp_path):
    cell = Cell({"routing": "none"})
    with grid_run.claimed(cell, tmp_path) as lock:
        assert lock is not None
        with grid_run.claimed(cell, tmp_path) as other:
            assert other is None
        with (tmp_path / "vanilla.lock").open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with grid_run.claimed(cell, tmp_path) as lock:
        assert lock is not None


def test_a_cell_with_another_definition_is_measured_anew(tmp_path):
    args = parse_args(["--output_dir", str(tmp_path)])
    cell = Cell({"routing": "late_fusion", "split_layer": 4}, {"method": "dpvr", "num_rows": 1000})
    document = {"cell": json.loads(json.dumps(asdict(cell))), "settings": grid_run.settings(args)}
    grid_run.write(grid_run.cell_file(tmp_path, cell), json.dumps(document).encode())
    assert grid_run.is_finished(cell, args)
    assert not grid_run.is_finished(Cell(cell.fields, {"method": "dpvr", "num_rows": 5000}), args)
    assert not grid_run.is_finished(cell, parse_args(["--output_dir", str(tmp_path), "--limit", "7"]))
    assert [path.name for path in Path(tmp_path, "cells").iterdir()] == [f"{cell.name}.json"]
