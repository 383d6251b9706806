"""What plan_search.py finds for budgets of prefill FLOPs: a table, the frontier as a figure, and plan files.

budgets --> number of fusion layers that fit each split --> search on half of the prompts
                                                                |
plans.json, plan_frontier.png, .svg,                        frontier on the other half
plan_0.45.yaml for `train_sft.py --plan`      <-----------------'
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from transformers import PretrainedConfig, PreTrainedModel

from dpvr.analysis.costs import PromptCosts
from dpvr.analysis.curves import BLACK, BLUE, GREEN, ORANGE, save
from dpvr.analysis.plan_search import Effect, Plan, ablate, effects, greedy_search, readers, splits, write_plan
from dpvr.data.prompts import Batch


class Point(NamedTuple):
    """A plan, its share of vanilla's prefill FLOPs, and its effect on held-out prompts."""

    plan: Plan
    flops: float
    effect: Effect

    def as_json(self) -> dict[str, Any]:
        return {**self.plan._asdict(), "prefill_flops_ratio": self.flops, **self.effect._asdict()}


def find_plans(
    model: PreTrainedModel,
    searched: Callable[[], Iterable[Batch]],
    held_out: Callable[[], Iterable[Batch]],
    budgets: list[float],
    costs: PromptCosts,
) -> dict[str, Any]:
    """Search for the plan of each budget; the document of plans.json.

    Args:
        searched, held_out: give the batches to choose plans by, and those to measure the chosen ones on.
        budgets: shares of vanilla's prefill FLOPs.

    Raises:
        ValueError: if a budget is too small for any split with one fusion layer.
    """
    allowed, last = splits(model.config), readers(model.config, 1)[-1]
    cheapest = share(costs, Plan(allowed[0], (last,)))
    if min(budgets) < cheapest:
        raise ValueError(
            f"A budget is {min(budgets)} of vanilla's prefill FLOPs, and the cheapest plan (split_layer "
            f"{allowed[0]}, one fusion layer) needs {cheapest:.3f}: give --find_plan larger budgets."
        )
    most = most_fusion_layers(costs, model.config, max(budgets))
    ablations = ablate(model, searched, most)
    path = greedy_search(model, searched, most, ablations)
    path |= {Plan(split, (layer,)): found.on for split in ablations for layer, found in ablations[split].items()}
    baselines = [Plan(split, layers) for split in allowed for layers in ((), (last,))]
    found = effects(model, held_out(), list(dict.fromkeys([*path, *baselines])), "Frontier")
    points = {plan: Point(plan, share(costs, plan), effect) for plan, effect in found.items()}
    return {
        "tokens": dict(zip(("image", "text"), costs.tokens, strict=True)),
        "plans": {str(budget): points[best_within(budget, path, costs)].as_json() for budget in budgets},
        "frontier": [point.as_json() for point in sorted(points.values(), key=lambda point: point.flops)],
        "readings_alone": {
            split: {layer: {"on": a.on._asdict(), "off": a.off._asdict()} for layer, a in by_layer.items()}
            for split, by_layer in ablations.items()
        },
    }


def best_within(budget: float, path: dict[Plan, Effect], costs: PromptCosts) -> Plan:
    """The plan with the lowest KL on the searched prompts within a budget."""
    return min((plan for plan in path if share(costs, plan) <= budget), key=lambda plan: path[plan].kl)


def share(costs: PromptCosts, plan: Plan) -> float:
    """A plan's share of vanilla's prefill FLOPs; a plan without fusion layers is the routing text_only."""
    routing = "late_fusion" if plan.fusion_layers else "text_only"
    return costs.share(routing=routing, split_layer=plan.split_layer, fusion_layers=plan.fusion_layers or None)


def most_fusion_layers(costs: PromptCosts, config: PretrainedConfig, budget: float) -> dict[int, int]:
    """Per split, how many deep layers may read the image within a budget; splits where none may are left out.

    The last layer reads at the lowest cost, since only the last token queries there.
    """
    most = {}
    for split in splits(config):
        *deep, last = readers(config, split)
        cheapest = [Plan(split, (*deep[:n], last)) for n in range(len(deep) + 1)]
        fitting = [len(plan.fusion_layers) for plan in cheapest if share(costs, plan) <= budget]
        if fitting:
            most[split] = max(fitting)
    return most


def table(document: dict[str, Any]) -> str:
    """The plan of each budget, and the ablation of each deep layer at its split."""
    lines = [f"{'budget':>7}{'FLOPs':>8}{'split':>7}{'KL':>8}{'changed':>9}  fusion layers"]
    for budget, plan in document["plans"].items():
        lines.append(
            f"{budget:>7}{plan['prefill_flops_ratio']:>8.3f}{plan['split_layer']:>7}{plan['kl']:>8.3f}"
            f"{plan['changed']:>9.1%}  {' '.join(map(str, plan['fusion_layers']))}"
        )
    for split in dict.fromkeys(plan["split_layer"] for plan in document["plans"].values()):
        lines.append(f"\nSplit {split}: answers that change when one deep layer alone reads the image, or all but it")
        lines.append(f"{'layer':>7}{'alone':>9}{'all but':>9}")
        for layer, found in document["readings_alone"][split].items():
            lines.append(f"{layer:>7}{found['on']['changed']:>9.1%}{found['off']['changed']:>9.1%}")
    return "\n".join(lines)


def write_plans(document: dict[str, Any], folder: Path) -> list[Path]:
    """A plan file per budget."""
    paths = []
    for budget, found in document["plans"].items():
        paths.append(folder / f"plan_{budget}.yaml")
        cost = f"{found['prefill_flops_ratio']:.3f} of vanilla's prefill FLOPs"
        comment = f"{cost}; {found['changed']:.1%} of the answers change before training"
        write_plan(Plan(found["split_layer"], tuple(found["fusion_layers"])), paths[-1], comment)
    return paths


def draw_frontier(document: dict[str, Any], folder: Path) -> None:
    """Effects of plans against their FLOPs: every searched plan, the chosen ones, late fusion and text only."""
    figure = Figure(figsize=(10, 4.2), facecolor="white", layout="constrained")
    last = max(max(point["fusion_layers"], default=0) for point in document["frontier"])
    text = [point for point in document["frontier"] if not point["fusion_layers"]]
    late = [point for point in document["frontier"] if list(point["fusion_layers"]) == [last]]
    searched = [point for point in document["frontier"] if point not in text]
    for axis, what, label in zip(
        figure.subplots(1, 2), ("changed", "kl"), ("share of answers that change", "KL to vanilla, nats"), strict=True
    ):
        for points, colour, style, name in (
            (text, ORANGE, "o--", "text only, every split"),
            (late, GREEN, "s--", "late fusion, every split"),
            (_pareto_front(searched, what), BLUE, "^-", "searched plans, Pareto front"),
        ):
            axis.plot(*_xy(points, what), style, color=colour, label=name, markersize=5)
        axis.plot(*_xy(searched, what), ".", color=BLUE, alpha=0.35, markersize=4)
        chosen = document["plans"].values()
        axis.plot(*_xy(chosen, what), "*", color=BLACK, markersize=11, label="plan chosen for a budget")
        axis.set(xlabel="prefill FLOPs, share of vanilla's", ylabel=label)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    save(figure, folder / "plan_frontier")


def _xy(points: Iterable[dict[str, Any]], what: str) -> tuple[list[float], list[float]]:
    points = list(points)
    return [point["prefill_flops_ratio"] for point in points], [point[what] for point in points]


def _pareto_front(points: list[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    """The Pareto front: points, in the order of their FLOPs, that are better than every cheaper point."""
    kept: list[dict[str, Any]] = []
    for point in sorted(points, key=lambda point: (point["prefill_flops_ratio"], point[what])):
        if not kept or point[what] < kept[-1][what]:
            kept.append(point)
    return kept
