"""The dial: the methods that a model can take, what each costs and how well it was measured to answer.

    results/dpvr_mini/*.json  --measured--> points: prefill cost, points of accuracy gained or lost against vanilla
        |
    the model's ways  --settings_of--> a setting per method, with its point if it was measured
        |
    show_dial         a curve of all points; the chosen one is filled

A difference to vanilla is one of the same questions, so points of different records may stand on one curve.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from costs_dpvr import DecoderCosts, prefill_flops
from dpvr.inference.ways import NAMES, VANILLA, StockWays, Ways

RESULTS = Path(__file__).parents[2] / "results" / "dpvr_mini"
PROMPT = (64, 25)  # image and text tokens of MiniBench's median prompt, which the records are of
LATENT = "latent"
ON_DIAL = (VANILLA, "late_fusion", LATENT)
GREEN, GREY = "#009e73", "#767676"


class Point(NamedTuple):
    """A method as it was measured on MiniBench.

    Attributes:
        routing: its routing.
        plan: of its layers, where the record says it.
        cost: prefill FLOPs as a share of vanilla's.
        points: accuracy minus vanilla's on the same questions, percentage points.
    """

    routing: str
    plan: str | None
    cost: float
    points: float


class Setting(NamedTuple):
    """A method that the model can take now: its routing, its prefill cost, and how it was measured, if it was."""

    routing: str
    cost: float
    measured: Point | None

    @property
    def label(self) -> str:
        said = f"{capital(NAMES[self.routing])}: {self.cost:.2f} of the compute"
        if self.measured is None or self.routing == VANILLA:
            return said
        return f"{said}, {self.measured.points:+.1f} points"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def measured(results: Path = RESULTS) -> list[Point]:
    """Return the points of the latents' record, by cost; none where it is not there."""
    path = results / "latent" / "accuracy.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    points = (point for point in map(_point, rows) if point is not None)
    return sorted(points, key=lambda point: point.cost)


def _point(row: dict[str, Any]) -> Point | None:
    """A row's point; None for one of another method, such as pruning."""
    what = row.get("what", {})
    routing = what.get("routing", LATENT if "latent_split_layer" in what else VANILLA if not what else None)
    if routing not in ON_DIAL:
        return None
    return Point(routing, what.get("plan"), row["prefill_flops"], 100 * row["minus_vanilla"][0])


def late_fusion_point(cost: float, results: Path = RESULTS) -> Point | None:
    """Late fusion's point, whose record gives no cost."""
    path = results / "accuracy.json"
    if not path.exists():
        return None
    means = {row["name"]: row["mean"] for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    return Point("late_fusion", None, cost, 100 * (means["late_fusion"] - means["vanilla"]))


def costs_of(ways: StockWays, prompt: tuple[int, int] = PROMPT) -> dict[str, float]:
    """Prefill FLOPs of the ways on the dial, as shares of vanilla's, without those that the model cannot take."""
    costs, before = {}, ways.now
    for routing in dict.fromkeys((*ON_DIAL, ways.own)):
        if routing in ways.choices:
            try:
                ways.choose(routing)
            except ValueError:  # a routing that this model's fields do not allow
                continue
            costs[routing] = ways.prefill_flops(*prompt)
    ways.choose(before)
    return {routing: flops / costs[VANILLA] for routing, flops in costs.items()}


def settings_of(ways: StockWays, points: list[Point]) -> list[Setting]:
    """The methods that a model can take, each with the measured point of its cost."""
    return [
        Setting(
            routing,
            cost,
            next((point for point in points if point.routing == routing and abs(point.cost - cost) < 0.005), None),
        )
        for routing, cost in costs_of(ways).items()
    ]


def points_of(ways: Ways) -> list[Point]:
    """All measured points of dpvr-mini, whose ways these are, at costs that are shares of what stock vanilla computes.

    The records count vanilla's last layer for one token alone, which a stock decoder computes for all.
    """
    costs, model = costs_of(ways), ways.model
    plan, counted = model.config.layer_plan(VANILLA), DecoderCosts.of(model.config.text_config)
    short, stock = (prefill_flops(counted, plan, *PROMPT, short_vanilla=how) for how in (True, False))
    found = [
        point if point.routing == VANILLA else point._replace(cost=point.cost * short / stock) for point in measured()
    ]
    if "late_fusion" in costs and (late := late_fusion_point(costs["late_fusion"])) is not None:
        found.append(late)
    return sorted(found, key=lambda point: point.cost)


def show_dial(points: list[Point], chosen: Setting) -> str:
    """Return the curve of accuracy against prefill cost, the chosen method filled and named; a text without points."""
    if not points:
        return f"<p>{capital(NAMES[chosen.routing])}: accuracy not measured on this model.</p>"
    low = min(-4.0, *(point.points for point in points))
    place = {point: (40 + 240 * point.cost, 15 + 95 * (1 - point.points) / (1 - low)) for point in points}
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in place.values())
    marks = ""
    for point, (x, y) in place.items():
        is_chosen = point == chosen.measured
        colour = GREEN if is_chosen else GREY
        marks += f"<circle cx='{x:.1f}' cy='{y:.1f}' r='{8 if is_chosen else 5}' stroke='{colour}' stroke-width='2' "
        marks += f"fill='{colour if is_chosen else 'var(--background-fill-primary)'}'/>"
        if is_chosen:
            marks += f"<text x='{x:.1f}' y='{y + 24:.1f}' text-anchor='middle'>{NAMES[point.routing]}</text>"
    said = "; ".join(f"{NAMES[each.routing]} {each.cost:.2f}, {each.points:+.1f} points" for each in points)
    return (
        f"<svg class='dial' viewBox='0 0 300 150' role='img' aria-label='Accuracy against prefill cost. {said}. "
        f"Chosen: {NAMES[chosen.routing]}'><path d='M40 10V120H290' fill='none' stroke='currentColor' opacity='.5'/>"
        f"<text x='34' y='{15 + 95 / (1 - low):.0f}' text-anchor='end'>0</text>"
        f"<text x='34' y='114' text-anchor='end'>{low:.0f}</text><text x='40' y='134' text-anchor='middle'>0</text>"
        "<text x='160' y='134' text-anchor='middle'>0.5</text><text x='280' y='134' text-anchor='middle'>1</text>"
        f"<polyline points='{line}' fill='none' stroke='{GREY}' stroke-dasharray='3 3'/>{marks}</svg>"
        "<p>Across: compute of the pass over the prompt. Up: accuracy on MiniBench, points against vanilla. Hollow: "
        "measured, not chosen.</p>"
    )
