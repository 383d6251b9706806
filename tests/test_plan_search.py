"""plan_search.py and plan_report.py: effects against whole DPVR models, and a greedy search followed by hand."""

from collections.abc import Iterator

import pytest
import torch
from conftest import make_llava
from reference import Prompts, randomise_vectors, real_float64
from test_saturation import kl, labels_of, one_row

from dpvr.analysis.costs import PromptCosts
from dpvr.analysis.plan_report import find_plans, most_fusion_layers, share, write_plans
from dpvr.analysis.plan_search import Effect, Plan, ablate, causal_split, effects, greedy_search, read_plan
from modeling_dpvr import DpvrLlavaForConditionalGeneration

DEPTH, LAYOUT, ANSWERS = 5, [[2, 5], [1, 2, 4], [6, 4]], [3, 1, 1]
TOLERANCE = 1e-9


@pytest.fixture(autouse=True, scope="module")
def exact() -> Iterator[None]:
    with real_float64():
        yield


def make_model():
    return randomise_vectors(make_llava(DEPTH))


@torch.no_grad()
def naive_effect(batch: Prompts, plan: Plan) -> Effect:
    """What an untrained DPVR model of the plan does to the answers, row by row."""
    graph = {"fusion_layers": list(plan.fusion_layers)} if plan.fusion_layers else {"routing": "text_only"}
    dpvr = DpvrLlavaForConditionalGeneration.from_llava(make_model(), split_layer=plan.split_layer, **graph)
    distances, changes = [], []
    for row, count in enumerate(ANSWERS):
        _, inputs = one_row(batch, row)
        vanilla, routed = (model(**inputs).logits[0, -count - 1 : -1] for model in (make_model(), dpvr))
        distances.append(kl(vanilla, routed).mean().item())
        changes.append((vanilla.argmax(-1) != routed.argmax(-1)).any().item())
    return Effect(sum(distances) / len(ANSWERS), sum(changes) / len(ANSWERS))


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_effects_of_plans_are_those_of_untrained_models_of_these_plans(side: str) -> None:
    batch = Prompts(LAYOUT, side)
    plans = [
        Plan(1, (1, 3)),
        Plan(1, ()),
        Plan(1, (1, 3, 4)),
        Plan(1, (3,)),
        Plan(2, (4,)),
        Plan(4, (4,)),
        Plan(4, ()),
    ]
    found = effects(make_model(), [(batch.inputs, labels_of(batch))], plans, "test")
    assert list(found) == plans
    for plan in plans:
        want = naive_effect(batch, plan)
        assert abs(found[plan].kl - want.kl) < TOLERANCE
        assert found[plan].changed == want.changed
    assert len({round(effect.kl, 6) for effect in found.values()}) == len(plans)


def test_an_ablation_has_one_layer_reading_alone_and_all_but_it() -> None:
    batch = Prompts(LAYOUT)
    found = ablate(make_model(), lambda: [(batch.inputs, labels_of(batch))], [2])[2]
    assert list(found) == [2, 3, 4]
    assert found[3].on.kl == pytest.approx(naive_effect(batch, Plan(2, (3,))).kl)
    assert found[3].off.kl == pytest.approx(naive_effect(batch, Plan(2, (2, 4))).kl)


def test_the_greedy_search_adds_the_layer_that_lowers_the_kl_most() -> None:
    batch = Prompts(LAYOUT)
    batches, most = lambda: [(batch.inputs, labels_of(batch))], {1: 3, 3: 1}
    path = greedy_search(make_model(), batches, most, ablate(make_model(), batches, most))
    for split, count in most.items():
        steps = sorted((p.fusion_layers for p in path if p.split_layer == split), key=len)
        assert [len(step) for step in steps] == list(range(1, count + 1))
        before: tuple[int, ...] = ()
        for step in steps:
            rivals = [tuple(sorted((*before, layer))) for layer in range(split, DEPTH) if layer not in before]
            kls = {rival: naive_effect(batch, Plan(split, rival)).kl for rival in rivals}
            assert step == min(kls, key=kls.__getitem__)
            before = step


def test_a_budget_is_kept_and_its_plan_is_the_best_that_was_searched(monkeypatch) -> None:
    costs = PromptCosts(make_model().config.text_config, 12, 6)
    worth = {1: 0.5, 2: 0.9, 3: 0.2, 4: 0.1}  # what a layer's reading takes off the KL

    def pretended(model, batches, plans, description):
        return {
            plan: Effect(3 - plan.split_layer / 9 - sum(worth[at] for at in plan.fusion_layers), 0.5) for plan in plans
        }

    monkeypatch.setattr("dpvr.analysis.plan_search.effects", pretended)
    monkeypatch.setattr("dpvr.analysis.plan_report.effects", pretended)
    budgets = [0.7, 0.6]
    found = find_plans(make_model(), list, list, budgets, costs)
    for budget in budgets:
        plan = found["plans"][str(budget)]
        rivals = [p for p in found["frontier"] if p["fusion_layers"] and p["prefill_flops_ratio"] <= budget]
        assert plan["prefill_flops_ratio"] <= budget and plan["kl"] == min(p["kl"] for p in rivals)
        assert 2 in plan["fusion_layers"]
    tight = share(costs, Plan(1, (4,)))  # what is read best does not fit, the last layer alone does
    assert find_plans(make_model(), list, list, [tight], costs)["plans"][str(tight)]["fusion_layers"] == (4,)
    config = make_model().config
    assert most_fusion_layers(costs, config, 1.0)[1] == 4 and not most_fusion_layers(costs, config, 0.1)
    with pytest.raises(
        ValueError, match=r"budget is 0\.1 of vanilla's.* needs 0\.\d+: give --find_plan larger budgets"
    ):
        find_plans(make_model(), list, list, [0.6, 0.1], costs)


def test_the_flops_of_a_plan_are_those_of_the_model_it_makes() -> None:
    costs = PromptCosts(make_model().config.text_config, 12, 6)
    model = DpvrLlavaForConditionalGeneration.from_llava(make_model(), split_layer=2, fusion_layers=[2, 4])
    expected = model.prefill_flops(12, 6) / model.prefill_flops(12, 6, routing="none")
    assert share(costs, Plan(2, (2, 4))) == expected
    text_only = model.prefill_flops(12, 6, routing="text_only") / model.prefill_flops(12, 6, routing="none")
    assert share(costs, Plan(2, ())) == text_only


def test_a_plan_file_holds_dpvr_fields_and_nothing_else(tmp_path) -> None:
    plan = {"split_layer": 2, "fusion_layers": (2, 3), "prefill_flops_ratio": 0.4, "changed": 0.1, "kl": 0.2}
    (path,) = write_plans({"plans": {"0.45": plan}}, tmp_path)
    assert path.name == "plan_0.45.yaml"
    assert read_plan(path) == {"routing": "late_fusion", "split_layer": 2, "fusion_layers": [2, 3]}
    path.write_text("split_layer: 2\nfusion_layer: [2]\n")
    with pytest.raises(ValueError, match=r"holds \{'split_layer': 2, 'fusion_layer': \[2\]\}, and a plan is YAML"):
        read_plan(path)
    with pytest.raises(ValueError, match=r"no plan file 'no_such\.yaml': dpvr\.analysis\.probe --find_plan"):
        read_plan("no_such.yaml")


def test_the_causal_split_is_the_first_that_changes_few_answers(monkeypatch) -> None:
    shares = {1: 0.5, 2: 0.04, 3: 0.06, 4: 0.0}
    found = {Plan(split, ()): Effect(1.0, share) for split, share in shares.items()}
    monkeypatch.setattr("dpvr.analysis.plan_search.effects", lambda *args: found)
    assert causal_split(make_model(), [], 0.05) == 2
    with pytest.raises(ValueError, match=r"more than -1% of the answers, 0\.0% at the best one: set --split_layer"):
        causal_split(make_model(), [], -0.01)
