"""Layer plans that no model can have, in every way they can be given: refused before rows and models are read."""

import pytest
import yaml
from lines import NEEDS_TRAINING

import train_sft

pytestmark = NEEDS_TRAINING
PLANS = {  # of a model of four layers, split at 2
    "split past the last layer": ({"split_layer": 99}, "split_layer"),
    "split at the last layer": ({"split_layer": 4}, "split_layer"),
    "split at none": ({"split_layer": 0}, "split_layer"),
    "negative split": ({"split_layer": -1}, "split_layer"),
    "half a layer": ({"split_layer": 2.5}, "split_layer"),
    "split that is a word": ({"split_layer": "first"}, "split_layer"),
    "fusion below the split": ({"fusion_layers": [1]}, "fusion_layers"),
    "fusion past the last layer": ({"fusion_layers": [3, 9]}, "fusion_layers"),
    "fusion twice": ({"fusion_layers": [3, 3]}, "fusion_layers"),
    "more fusion layers than layers": ({"num_fusion_layers": 3}, "num_fusion_layers"),
    "no fusion layer": ({"num_fusion_layers": 0}, "num_fusion_layers"),
    "two counts of fusion layers": ({"num_fusion_layers": 2, "fusion_layers": [3]}, "fusion_layers"),
    "routing unknown": ({"routing": "late_fussion"}, "late_fussion"),
    "routing empty": ({"routing": ""}, "routing"),
    "nothing to train": ({"routing": "text_only"}, "nothing to train"),
    "nothing to route": ({"routing": "none"}, "nothing to train"),
    "no side layer": ({"num_side_layers": 0}, "num_side_layers"),
    "negative side layers": ({"num_side_layers": -1}, "num_side_layers"),
    "start unknown": ({"side_branch_init": "zeros"}, "zeros"),
    "auto and routing unknown": ({"split_layer": "auto", "routing": "late"}, "late"),
    "auto and fusion past the last layer": ({"split_layer": "auto", "fusion_layers": [9]}, "fusion_layers"),
}
AS_YAML = {
    "fusion a number": ({"fusion_layers": 3}, "fusion_layers"),
    "fusion words": ({"fusion_layers": ["last"]}, "fusion_layers"),
    "fusion a mapping": ({"fusion_layers": {"3": True}}, "fusion_layers"),
    "fusion true": ({"fusion_layers": [True]}, "fusion_layers"),
    "fusion empty": ({"fusion_layers": []}, "fusion_layers"),
    "split true": ({"split_layer": True}, "split_layer"),
    "split a list": ({"split_layer": [2]}, "split_layer"),
    "routing a list": ({"routing": ["late_fusion"]}, "routing"),
    "routing a number": ({"routing": 3}, "routing"),
    "side layers a word": ({"num_side_layers": "two"}, "num_side_layers"),
    "side layers half": ({"num_side_layers": 1.5}, "num_side_layers"),
    "start a number": ({"side_branch_init": 1}, "side_branch_init"),
}


def train(base: str, out, words: list[str], monkeypatch) -> None:
    from dpvr.training import run

    def read(*_, **__):
        raise AssertionError("it was read before the plan was checked")

    for name in ("load_processor", "load_rows", "load_model", "find_split"):
        monkeypatch.setattr(run, name, read)
    train_sft.main(*train_sft.parse_args(["--model_name_or_path", base, "--output_dir", str(out), *words]))


def check(base: str, tmp_path, words: list[str], said: str, monkeypatch, capsys) -> None:
    with pytest.raises((ValueError, SystemExit)) as error:
        train(base, tmp_path / "out", words, monkeypatch)
    message = str(error.value) if error.type is not SystemExit else capsys.readouterr().err
    assert said in message and not (tmp_path / "out").exists()


@pytest.mark.parametrize("plan", PLANS)
def test_flags_of_a_plan_that_cannot_be(random_mini, tmp_path, monkeypatch, capsys, plan):
    fields, said = PLANS[plan]
    words = []
    for name, value in fields.items():
        words += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    check(random_mini, tmp_path, words, said, monkeypatch, capsys)


@pytest.mark.parametrize("way", ["--config", "--plan"])
@pytest.mark.parametrize("plan", [*PLANS, *AS_YAML])
def test_yaml_of_a_plan_that_cannot_be(random_mini, tmp_path, monkeypatch, capsys, plan, way):
    fields, said = {**PLANS, **AS_YAML}[plan]
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(fields))
    check(random_mini, tmp_path, [way, str(tmp_path / "given.yaml")], said, monkeypatch, capsys)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("way", ["flag", "--config", "--plan"])
def test_any_plan_for_a_baseline(random_mini, tmp_path, monkeypatch, capsys, method, way):
    (tmp_path / "given.yaml").write_text("split_layer: 2\n")
    words = ["--split_layer", "2"] if way == "flag" else [way, str(tmp_path / "given.yaml")]
    said = f"--method {method} trains the vanilla model, which has no split_layer"
    check(random_mini, tmp_path, ["--method", method, *words], said, monkeypatch, capsys)


def test_a_plan_that_can_be_is_read_on(random_mini, tmp_path, monkeypatch):
    with pytest.raises(AssertionError, match="it was read before"):
        train(random_mini, tmp_path / "out", ["--split_layer", "1", "--fusion_layers", "2", "3"], monkeypatch)
