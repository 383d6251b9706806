"""accuracy.py and accuracy_rows.py: which model each row measures, and what is printed and written."""

import json

import pytest
import torch

from dpvr.benchmarks import accuracy_rows
from dpvr.benchmarks.accuracy import main, parse_args
from dpvr.inference.evaluation import grey
from minibench.tasks import TASKS
from modeling_dpvr import DpvrLlavaForConditionalGeneration

NAMES = ["vanilla", "untrained", "late_fusion", "blind"]


@pytest.fixture
def trained(random_mini, tmp_path) -> DpvrLlavaForConditionalGeneration:
    """A model whose side branch is no longer as it started."""
    model = DpvrLlavaForConditionalGeneration.from_pretrained(random_mini)
    with torch.no_grad():
        for parameter in model.side_branch.parameters():
            parameter.add_(1.0)
    return model


def test_the_last_line_is_one_json_document_with_a_row_per_model(random_mini, tmp_path, capsys):
    arguments = ["--model_name_or_path", random_mini, "--limit", "2", "--seed", "3"]
    main(parse_args([*arguments, "--output", str(tmp_path / "new" / "a.json"), "--json"]))
    printed = capsys.readouterr()
    document = json.loads(printed.out.splitlines()[-1])
    assert [row["name"] for row in document["rows"]] == NAMES
    assert [row["routing"] for row in document["rows"]] == ["none", "late_fusion", "late_fusion", "none"]
    for row in document["rows"]:
        assert list(row["tasks"]) == list(TASKS) and row["n"] == 6 * 2 + 2
        assert row["mean"] == pytest.approx(sum(row["tasks"].values()) / 8)
        assert row["low"] <= row["mean"] <= row["high"] and 0 <= row["six_bench_mean"] <= 1
    assert document["limit"] == 2 and document["seed"] == 3 and document["dpvr"]["split_layer"] == 2
    assert {"command", "commit", "hardware", "versions"} <= document.keys()
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == document
    assert all(name in printed.err for name in NAMES)  # progress bars
    assert "run the custom code" not in printed.out


def test_each_row_sees_its_own_model(trained, monkeypatch):
    seen = {}
    start = {name: weight.clone() for name, weight in trained.side_branch.state_dict().items()}

    def look(model, processor, *, show, description, **options):
        weights = model.side_branch.state_dict()
        is_trained = all(torch.equal(weight, start[name]) for name, weight in weights.items())
        seen[description] = (model.config.routing, show is grey, is_trained, options)
        return {}

    monkeypatch.setattr(accuracy_rows, "evaluate", look)
    rows = accuracy_rows.measure(trained, None, num_questions=7, seed=1, batch_size=2)
    options = {"num_questions": 7, "seed": 1, "batch_size": 2}
    assert seen["vanilla"][:2] == ("none", False) and seen["blind"][:2] == ("none", True)
    assert seen["late_fusion"] == ("late_fusion", False, True, options)
    assert seen["untrained"] == ("late_fusion", False, False, options)
    assert [row["name"] for row in rows] == NAMES
    fresh = trained.model.language_model.layers[2].state_dict()
    assert all(torch.equal(weight, fresh[name[2:]]) for name, weight in trained.side_branch.state_dict().items())


def test_a_row_bears_the_name_of_its_routing(trained, monkeypatch):
    monkeypatch.setattr(accuracy_rows, "evaluate", lambda *_, **__: {})
    trained.set_routing("kv_substitution")
    rows = accuracy_rows.measure(trained, None)
    assert [row["name"] for row in rows] == ["vanilla", "untrained", "kv_substitution", "blind"]


def test_a_model_without_a_side_branch_in_use_is_refused(trained, tmp_path):
    trained.set_routing("text_only")
    trained.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="is 'text_only', which reads no side branch, .*: save the model with late_fusion"
    ):
        accuracy_rows.load(str(tmp_path))
