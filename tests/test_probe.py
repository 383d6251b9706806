"""probe.py and its modules: from rows to curves, a recommendation and figures; a stopped run resumes."""

import json

import pytest
import torch
from PIL import Image

from dpvr.analysis import probe_samples
from dpvr.analysis.curves import summarise
from dpvr.analysis.probe import main, parse_args
from train_sft import main as train
from train_sft import parse_args as parse
from versions_dpvr import LINE_4

pytestmark = pytest.mark.skipif(LINE_4, reason="what it measures is tested on both lines, the script with 5 alone")


def run(model: str, folder, *options: str) -> dict:
    return main(parse_args(["--model", model, "--output_dir", str(folder), "--batch_size", "3", *options]))


def test_it_writes_curves_and_figures_and_resumes_where_it_was_stopped(random_mini, tmp_path, capsys, monkeypatch):
    whole = run(random_mini, tmp_path / "whole", "--num_samples", "5", "--json")
    *shown, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == whole and set(whole["advice"]) <= set(shown)
    layers = [line.split() for line in shown if line.split()[:1] in (["0"], ["1"], ["2"], ["3"])]
    assert [float(row[3]) for row in layers] == pytest.approx(whole["attention_mass"]["median"], abs=5e-4)
    assert [row[-1] for row in layers[:-1]] == [f"{x:.1%}" for x in whole["withdrawal"]["text_only"]["changed"]]
    assert whole == json.loads((tmp_path / "whole" / "saturation.json").read_text())
    assert [Image.open(tmp_path / "whole" / "saturation.png").size] == [(1500, 1050)]
    assert (tmp_path / "whole" / "saturation.svg").read_text().startswith("<?xml")
    for name in ("cosine", "logit_lens_kl"):
        for kind in ("image", "text"):
            curve = whole[name][kind]
            assert [len(curve[line]) for line in ("q25", "median", "q75")] == [4] * 3
            assert all(low <= high for low, high in zip(curve["q25"], curve["q75"], strict=True))
    assert len(whole["attention_mass"]["median"]) == 4
    assert all(len(curve["changed"]) == 3 for curve in whole["withdrawal"].values())
    routed = whole["routed"]
    assert (routed["routing"], routed["split_layer"], routed["identical"]) == ("late_fusion", 2, True)
    assert [len(routed["shared_cosine"][kind]) for kind in ("image", "text")] == [2, 2]
    assert min(min(cosine) for cosine in routed["shared_cosine"].values()) > 0.9998
    assert routed["attention_mass"]["median"][2] == 0 < routed["attention_mass"]["median"][3]

    measure, batches = probe_samples.measure, []

    def stopped(*args, **kwargs):
        if batches:
            raise KeyboardInterrupt
        batches.append(1)
        return measure(*args, **kwargs)

    monkeypatch.setattr(probe_samples, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(random_mini, tmp_path / "stopped", "--num_samples", "5")
    with (tmp_path / "stopped" / "samples.jsonl").open("a") as file:
        file.write('{"image_tokens": 1')  # a line that was cut off
    monkeypatch.setattr(probe_samples, "measure", measure)
    again = run(random_mini, tmp_path / "stopped", "--num_samples", "5")
    lines = [(tmp_path / name / "samples.jsonl").read_text().splitlines() for name in ("whole", "stopped")]
    assert len(lines[0]) == 6 and lines[0] == lines[1]
    assert {name: again[name] for name in again if name != "command"} == {
        name: whole[name] for name in whole if name != "command"
    }
    with pytest.raises(ValueError, match="other settings .seed was '0' and is '1'.: use another --output_dir"):
        run(random_mini, tmp_path / "whole", "--num_samples", "5", "--seed", "1")


def test_it_finds_a_plan_that_training_takes(random_mini, tmp_path, capsys):
    options = ["--num_samples", "8", "--plan_samples", "8", "--find_plan", "0.9", "0.8", "--tuned_lens", "4"]
    found = run(random_mini, tmp_path, *options)
    assert len(found["tuned_lens_kl"]["image"]["median"]) == 4
    plans = json.loads((tmp_path / "plans.json").read_text())
    assert [plan["prefill_flops_ratio"] < float(budget) for budget, plan in plans["plans"].items()] == [True, True]
    assert (tmp_path / "plan_frontier.svg").read_text().startswith("<?xml")
    assert f"python train_sft.py --plan {tmp_path / 'plan_0.8.yaml'}" in capsys.readouterr().out
    options = ["--model_name_or_path", random_mini, "--max_steps", "1", "--num_rows", "2", "--eval_questions", "0"]
    options += [
        "--plan",
        str(tmp_path / "plan_0.8.yaml"),
        "--output_dir",
        str(tmp_path / "out"),
        "--report_to",
        "none",
    ]
    plan, record = plans["plans"]["0.8"], train(*parse(options))
    assert {name: record["dpvr"][name] for name in ("split_layer", "fusion_layers")} == {
        name: plan[name] for name in ("split_layer", "fusion_layers")
    }
    for again in (["--split_layer", "2"], ["--split-layer", "2"], ["--split_layer=2"]):
        with pytest.raises(ValueError, match="--split_layer is given on the command line and in the plan"):
            parse([*options, *again])
    config = tmp_path / "recipe.yaml"
    config.write_text("split_layer: 1\nnum_rows: 2\n")
    args, _, _ = parse([*options, f"--config={config}"])
    assert args.split_layer == plan["split_layer"]  # a recipe's own split gives way
    with pytest.raises(ValueError, match="--split_layer takes a number of layers, such as 18, or auto, not 'two'"):
        parse(["--split_layer", "two"])


def test_training_finds_its_split_by_itself(random_mini, tmp_path, monkeypatch):
    monkeypatch.setattr("dpvr.training.models.TOLERANCE", 1.0)  # with random weights the answers change anyhow
    options = ["--model_name_or_path", random_mini, "--max_steps", "1", "--num_rows", "2", "--eval_questions", "0"]
    options += ["--split_layer", "auto", "--output_dir", str(tmp_path / "out"), "--report_to", "none"]
    assert train(*parse(options))["dpvr"]["split_layer"] == 1


def test_rows_without_pictures_are_counted_and_never_measured(random_mini, tmp_path):
    Image.new("RGB", (96, 96)).save(tmp_path / "black.png")
    said = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "a star"}]
    seen = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a star"}]
    rows = [{"conversations": said}, {"image": "black.png", "conversations": seen}, {"conversations": said}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = ["--data", str(tmp_path / "rows.json"), "--image_folder", str(tmp_path)]
    found = run(random_mini, tmp_path / "out", *data)
    assert (found["num_samples"], found["rows_without_pictures"]) == (1, 2)
    (tmp_path / "rows.json").write_text(json.dumps([{"conversations": said}]))
    with pytest.raises(ValueError, match="No row of .*rows.json.* has a picture"):
        run(random_mini, tmp_path / "none", *data)


def sample(lens: list[float], changed: list[bool]) -> dict:
    removal = {graph: [0.0] * len(changed) for graph in ("text_only", "late_fusion")}
    return {
        "image_tokens": 4,
        "text_tokens": 6,
        "cosine": {kind: [1.0] * len(lens) for kind in ("image", "text")},
        "attention_mass": [[0.5, 0.1]] * len(lens),
        "logit_lens_kl": {"image": lens, "text": lens},
        "tuned_lens_kl": {"image": [], "text": []},
        "removal_kl": removal,
        "removal_changed": {graph: changed for graph in removal},
    }


def test_the_splits_are_those_of_the_two_rules():
    lens = [2.0, 2.1, 2.0, 1.9, 1.8, 1.7, 1.0, 0.0]
    late, early = [True] * 4 + [False] * 3, [True] + [False] * 6
    found = summarise([sample(lens, late), sample(lens, early)], 0.5, range(1, 8))
    assert found["transition"]["image"] == 6 and found["papers_split"] == 2
    assert found["recommended_split"] == 2
    assert found["withdrawal"]["text_only"]["changed"] == [1, 0.5, 0.5, 0.5, 0, 0, 0]
    assert summarise([sample(lens, late)], 0.0, range(1, 8))["recommended_split"] == 5
    assert summarise([sample(lens, [True] * 7)], 0.5, range(1, 8))["recommended_split"] is None
    assert found["attention_mass"]["median"] == pytest.approx([0.3] * 8)
    assert torch.tensor(found["attention_mass"]["median_by_head"]).shape == (8, 2)
