"""What the accuracy grid says of the paper's claims: each is a question that paired intervals answer.

within   first - second >= -1 point        yes: the whole interval is; no: none of it is; open: it reaches both sides
better   first - second > 0                yes, no or open in the same way

An interval covers the choice of questions: other questions would give other scores. It does not cover the training
seeds, whose standard deviation stands in the tables.
"""

from collections.abc import Callable
from itertools import product
from math import sqrt
from typing import NamedTuple

from dpvr.reports.grid_results import Interval, Measured, Results
from minibench.tasks import TASKS

TOLERANCE = 0.01
YES, NO, OPEN, NOT_MEASURED = "yes", "no", "open", "not measured"
NONE_FITS = "no such model at this cost"
IN_SHORT = (("plan", "0.45"), ("late_fusion", "0.81"))  # the goal of plans, and late fusion at its own split
TRAINED = {"plan": "a trained plan", "late_fusion": "trained late fusion"}
RIVALS = ("vtw", "random_pruning", "fastv", "kv_substitution")


class Comparison(NamedTuple):
    """Two models on the same questions; without an interval one of them was not measured."""

    label: str
    interval: Interval | None
    answer: str


class Claim(NamedTuple):
    """A claim as a question, the comparisons that answer it, and whether it belongs in the short list."""

    question: str
    comparisons: list[Comparison]
    in_short: bool = True


def within(interval: Interval) -> str:
    _, low, high = interval
    return _answer(low >= -TOLERANCE, high < -TOLERANCE)


def better(interval: Interval) -> str:
    _, low, high = interval
    return _answer(low > 0, high <= 0)


def claims(results: Results) -> list[Claim]:
    """The paper's claims, and those about plans."""
    late, vanilla = results.row("table2", "late_fusion"), results.vanilla
    fusion = {count: results.row("fusion", f"8, K = {count}") for count in (1, 2, 3, 4)}
    depths = {count: results.row("side_branch", f"d_v = {count}") for count in (1, 2, 3)}
    return [
        Claim(
            "Does late fusion stay within 1 point of vanilla?",
            [compare("late fusion - vanilla", late, vanilla, within)],
        ),
        Claim(
            "Does it stay within 1 point of full fine-tuning?",
            [compare("late fusion - all weights", late, results.row("table2", "full"), within)],
        ),
        Claim(
            "Does one fusion layer suffice, within 1 point?",
            [compare(f"K = 1 - K = {count}", fusion[1], fusion[count], within) for count in (2, 3, 4)],
        ),
        Claim("Is multi_image the weak spot of late fusion?", [weak_spot(late, vanilla)]),
        Claim(
            "Does K = 2 improve multi_image?",
            [compare("K = 2 - K = 1, multi_image", fusion[2], fusion[1], better, ("multi_image",))],
        ),
        Claim(
            "Is d_v = 1 enough, within 1 point?",
            [compare(f"d_v = 1 - d_v = {count}", depths[1], depths[count], within) for count in (2, 3)],
        ),
        Claim("Does a trained plan stay within 1 point of vanilla?", plans(results)),
        *at_the_same_cost(results),
        Claim("What does training the side branch gain, by split?", training_gains(results), in_short=False),
        Claim("Does training it longer help?", longer(results), in_short=False),
    ]


def compare(
    label: str,
    first: Measured | None,
    second: Measured | None,
    rule: Callable[[Interval], str],
    tasks: tuple[str, ...] = TASKS,
) -> Comparison:
    """The difference first - second of the mean over tasks, judged by a rule."""
    if first is None or second is None:
        return Comparison(label, None, NOT_MEASURED)
    interval = first.minus(second, tasks)
    return Comparison(label, interval, rule(interval))


def weak_spot(late: Measured | None, vanilla: Measured | None) -> Comparison:
    """Whether late fusion loses more on multi_image than on the other tasks, which have other questions.

    The interval of the difference of two independent differences is MOVER's (Zou and Donner, 2008).
    """
    label = "(late fusion - vanilla) on multi_image - the same on the other tasks"
    if late is None or vanilla is None:
        return Comparison(label, None, NOT_MEASURED)
    here = late.minus(vanilla, ("multi_image",))
    elsewhere = late.minus(vanilla, tuple(task for task in TASKS if task != "multi_image"))
    estimate = here[0] - elsewhere[0]
    below = sqrt((here[0] - here[1]) ** 2 + (elsewhere[2] - elsewhere[0]) ** 2)
    above = sqrt((here[2] - here[0]) ** 2 + (elsewhere[0] - elsewhere[1]) ** 2)
    interval = (estimate, estimate - below, estimate + above)
    return Comparison(label, interval, better((-estimate, -interval[2], -interval[1])))


def training_gains(results: Results) -> list[Comparison]:
    splits = sorted({int(row.name.split(",")[0]) for row in results.tables["splits"]})
    return [
        compare(
            f"split {split}: trained - {name}",
            results.row("splits", f"{split}, trained"),
            results.row("splits", f"{split}, {name}"),
            better,
        )
        for split in splits
        for name in ("untrained identity", "VTW")
    ]


def longer(results: Results) -> list[Comparison]:
    """The rows of the table come in pairs, the shorter training first."""
    rows = [row.name for row in results.tables["training_length"]]
    measured = {name: results.row("training_length", name) for name in rows}
    return [
        compare(f"{more} - {less.rpartition(', ')[2]}", measured[more], measured[less], better)
        for less, more in zip(rows[::2], rows[1::2], strict=True)
    ]


def at_the_same_cost(results: Results) -> list[Claim]:
    """A trained plan and trained late fusion against the best of each rival within the same prefill FLOPs."""
    found = []
    for name, budget in product(TRAINED, budgets(results)):
        rivals = [rival for rival in (*RIVALS, "late_fusion") if rival != name]
        comparisons = [against_the_best(results, budget, name, rival) for rival in rivals]
        question = f"At {budget} of the prefill FLOPs, does {TRAINED[name]} beat the other methods?"
        found.append(Claim(question, comparisons, in_short=(name, budget) in IN_SHORT))
    return found


def against_the_best(results: Results, budget: str, name: str, rival: str) -> Comparison:
    """A row of the frontier against the best row that a rival has within the same budget."""
    rows = [row for row in results.tables["frontier"] if row.name.split(",")[0] == f"{budget} {rival}"]
    if not any(row.planned for row in rows):
        return Comparison(f"{name} - {rival}", None, NONE_FITS)
    best = max((row for row in rows if row.cells), key=lambda row: row.mean, default=None)
    label = best.name.removeprefix(budget).strip() if best else rival
    return compare(f"{name} - {label}", results.row("frontier", f"{budget} {name}"), best, better)


def plans(results: Results) -> list[Comparison]:
    return [
        compare(f"{budget}: plan - vanilla", results.row("frontier", f"{budget} plan"), results.vanilla, within)
        for budget in budgets(results)
    ]


def budgets(results: Results) -> list[str]:
    """Those within which a plan exists."""
    return [row.name.split()[0] for row in results.tables["frontier"] if row.name.endswith(" plan") and row.planned]


def _answer(whole: bool, none: bool) -> str:
    return YES if whole else NO if none else OPEN
