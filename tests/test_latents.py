"""latents.py: latents beside what costs as much, on the same questions."""

import json
from types import SimpleNamespace

import pytest

from dpvr.benchmarks.latents import main, parse_args
from dpvr.benchmarks.latents_run import best_plan, fit_fields
from dpvr.training.latent_fit import fit_latent
from minibench.tasks import TASKS
from modeling_dpvr import DpvrLlavaForConditionalGeneration
from processors_dpvr import load_processor


@pytest.fixture(scope="module")
def with_latent(random_mini, tmp_path_factory) -> str:
    """The random mini with a latent of rank 8 past layer 1."""
    from dpvr.data.prompts import AnsweredPrompts, in_batches
    from minibench.data import MiniBench

    folder, processor = tmp_path_factory.mktemp("with_latent"), load_processor(random_mini)
    model = DpvrLlavaForConditionalGeneration.from_pretrained(
        random_mini, routing="latent", latent_rank=8, latent_split_layer=1
    ).eval()
    rows = MiniBench("train", 8, questions_per_row=1)
    prompts = AnsweredPrompts(processor, (rows[index] for index in range(8)), 8)
    fit_latent(model, (inputs for inputs, _ in in_batches(prompts, 8)))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def test_every_latent_is_followed_by_what_costs_no_more(with_latent, tmp_path, capsys):
    words = ["--model", with_latent, "--fit", "0:4", "--fit_rows", "8", "--limit", "2", "--plans", str(tmp_path)]
    main(parse_args([*words, "--output", str(tmp_path / "latents.json")]))
    document = json.loads((tmp_path / "latents.json").read_text())
    vanilla, *rows = document["rows"]
    assert vanilla["prefill_flops"] == vanilla["equal"] == 1 and vanilla["minus_vanilla"][0] == 0
    assert set(vanilla["tasks"]) == set(TASKS) and vanilla["mean"] == sum(vanilla["tasks"].values()) / len(TASKS)
    budgets = {row["name"]: row["prefill_flops"] for row in rows if row["beside"] is None}
    assert list(budgets) == ["latent 1", "latent 2"] and budgets["latent 2"] < budgets["latent 1"] < 1
    beside = [row for row in rows if row["beside"]]
    assert {row["name"] for row in beside} >= {"FastV", "random pruning"}
    for row in beside:
        assert row["prefill_flops"] <= budgets[row["beside"]] and "latent_minus_this" in row
    printed = capsys.readouterr().out
    assert "latent minus it" in printed and "2 validation questions of each task" in printed


def test_a_repository_without_a_latent_and_a_fit_of_no_numbers_are_refused(random_mini):
    with pytest.raises(ValueError, match="has no latent: name a repository with one"):
        main(parse_args(["--model", random_mini]))
    with pytest.raises(ValueError, match="--fit takes split:rank, .* such as 0:24:4:norm, not '3'"):
        fit_fields("3")
    assert fit_fields("1:24:2")["latent_stride"] == 2 and fit_fields("1:24:2")["latent_score"] is None
    assert fit_fields("1:24:4:norm")["latent_score"] == "norm"


def test_of_the_plans_that_were_tried_the_nearest_within_the_cost_is_compared(tmp_path):
    costs = SimpleNamespace(ratio=lambda fields: fields["split_layer"] / 10)
    assert best_plan(tmp_path, costs, 0.5) is None
    points = [(1, [2], 0.5), (4, [6], 0.2), (5, [], 0.1), (6, [7], 0.0)]
    tried = [{"split_layer": split, "fusion_layers": layers, "kl": kl} for split, layers, kl in points]
    (tmp_path / "plans.json").write_text(json.dumps({"frontier": tried}))
    assert best_plan(tmp_path, costs, 0.5)["split_layer"] == 4 and best_plan(tmp_path, costs, 0.05) is None
