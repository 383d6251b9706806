"""Scores of MiniBench's tasks, each as in the benchmark that the task is a counterpart of, all between 0 and 1.

    existence                accuracy, and POPE's precision, recall, F1 and yes-ratio
    perception, cognition    MME: the mean of accuracy (questions) and accuracy+ (pictures with both answers right)
    choice_en, choice_cn     MMBench's circular evaluation: right only if right in all four rotations of the options
    the others               accuracy

Replies are compared verbatim: anything but the expected text is wrong.
"""

from collections import defaultdict
from collections.abc import Sequence
from math import sqrt
from typing import Any

from .tasks import TASKS, Item

Units = dict[str, list[float]]  # {task: the score of every item}

SIX_BENCH = ("existence", "choice_en", "choice_cn", "science", "scene", "multi_image")
CHOICES = ("choice_en", "choice_cn")  # the same questions in two languages
Z = 1.96


def unit_score(item: Item, replies: list[str]) -> float:
    """Return an item's share of its task's score, in [0, 1]."""
    return unit(item.task, [reply == answer for reply, (_, answer) in zip(replies, item.questions, strict=True)])


def unit(task: str, right: list[bool]) -> float:
    """Return the score of an item whose questions were answered right or not."""
    if task in ("perception", "cognition"):
        return (sum(right) / len(right) + all(right)) / 2
    return float(all(right))


def score_task(items: list[Item], replies: list[list[str]]) -> dict[str, Any]:
    """Score the items of one task.

    Returns:
        "score" with its 95 % interval "low", "high"; "n", the number of items; "accuracy" of single questions, of
        which there are "questions", and its "chance" by guessing; "skills", the score by skill; and what the
        counterpart also reports.
    """
    units = [unit_score(item, reply) for item, reply in zip(items, replies, strict=True)]
    pairs = [
        (reply, answer)
        for item, several in zip(items, replies, strict=True)
        for reply, (_, answer) in zip(several, item.questions, strict=True)
    ]
    skills = defaultdict(list)
    for item, unit in zip(items, units, strict=True):
        skills[item.skill].append(unit)
    low, high = wilson_interval(sum(units), len(units))
    result = {
        "score": _mean(units),
        "low": low,
        "high": high,
        "n": len(items),
        "accuracy": _mean([reply == answer for reply, answer in pairs]),
        "chance": _mean([item.chance for item in items]),
        "questions": len(pairs),
        "skills": {skill: _mean(scores) for skill, scores in skills.items()},
    }
    if items[0].task == "existence":
        result |= pope_statistics(pairs)
    if items[0].task in ("perception", "cognition"):
        result["accuracy_plus"] = 2 * result["score"] - result["accuracy"]
    return result


def pope_statistics(pairs: list[tuple[str, str]]) -> dict[str, float]:
    """Return POPE's precision, recall, F1 ("yes" is the positive class) and yes-ratio of (reply, answer) pairs."""
    said = sum(reply == "yes" for reply, _ in pairs)
    true = sum(answer == "yes" for _, answer in pairs)
    hits = sum(reply == answer == "yes" for reply, answer in pairs)
    return {
        "precision": hits / said if said else 0.0,
        "recall": hits / true if true else 0.0,
        "f1": 2 * hits / (said + true) if said + true else 0.0,
        "yes_ratio": said / len(pairs),
    }


def summarise(items: list[Item], replies: list[list[str]]) -> dict[str, Any]:
    """Score all tasks.

    Returns:
        "tasks": {task: score}; "mean" over the tasks and "six_bench_mean" over `SIX_BENCH` (None without all of
        them); "low" and "high" of the mean; "n", the number of items; "details": {task: see `score_task`}.
    """
    details = {}
    for task in TASKS:
        chosen = [(item, reply) for item, reply in zip(items, replies, strict=True) if item.task == task]
        if chosen:
            details[task] = score_task(*map(list, zip(*chosen, strict=True)))
    scores = {task: detail["score"] for task, detail in details.items()}
    low, high = mean_interval(details)
    six = [scores[task] for task in SIX_BENCH if task in scores]
    return {
        "tasks": scores,
        "mean": _mean(list(scores.values())),
        "low": low,
        "high": high,
        "six_bench_mean": _mean(six) if len(six) == len(SIX_BENCH) else None,
        "n": len(items),
        "details": details,
    }


def constant_replies(items: list[Item]) -> dict[str, Any]:
    """Return the summary of the best constant reply to each task, a majority baseline: always one word or letter."""
    replies: dict[str, list[list[str]]] = {}
    for task in dict.fromkeys(item.task for item in items):
        own = [item for item in items if item.task == task]
        constants = [[[_pick(options, index) for options in item.options] for item in own] for index in range(4)]
        replies[task] = max(constants, key=lambda constant: sum(map(unit_score, own, constant)))[::-1]
    return summarise(items, [replies[item.task].pop() for item in items])


def _pick(options: tuple[str, ...], index: int) -> str:
    """The option whose letter has this index, or for words the one at this index in alphabetical order."""
    return sorted(options, key=lambda option: option.split()[-1])[min(index, len(options) - 1)]


def wilson_interval(right: float, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a mean of n values in [0, 1] with the sum `right`.

    The interval is made for proportions; values between 0 and 1, such as MME's, vary less, so for them it is
    conservative.
    """
    share = right / n
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * sqrt(share * (1 - share) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(details: dict[str, dict[str, Any]]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of the tasks' scores, by MOVER (Zou and Donner 2008).

    Tasks are independent, except the two choice tasks: they share pictures and questions, so their deviations are
    added as if fully correlated.
    """

    def half_width(bound: str) -> float:
        deviations = {task: abs(detail[bound] - detail["score"]) for task, detail in details.items()}
        choices = sum(deviations.pop(task, 0.0) for task in CHOICES)
        return sqrt(choices**2 + sum(deviation**2 for deviation in deviations.values())) / len(details)

    mean = _mean([detail["score"] for detail in details.values()])
    return mean - half_width("low"), mean + half_width("high")


def paired_difference(first: Units, second: Units, tasks: Sequence[str] = TASKS) -> tuple[float, float, float]:
    """Return the difference (first - second) of two models' means over tasks, on the same questions, and its 95 %
    interval over questions.

    Args:
        first, second: {task: the score of every item}, in the same order.
        tasks: which tasks to average.

    Two items are added to every task, as if each model had won half of one and tied in the rest. Without them, two
    models that agree on every question would get an interval of width 0 ("Wald+2", Agresti and Min 2005; the interval
    is centred a little nearer to 0 than the observed difference). The two choice tasks ask the same questions, item by
    item, so their differences are added first; the other tasks are independent.
    """
    differences = {task: [a - b for a, b in zip(first[task], second[task], strict=True)] for task in tasks}
    estimate = _mean([_mean(values) for values in differences.values()])
    groups = [(values, 1) for task, values in differences.items() if task not in CHOICES]
    if choices := [differences[task] for task in CHOICES if task in differences]:
        groups.append(([sum(both) for both in zip(*choices, strict=True)], len(choices)))
    centre = squares = 0.0
    for values, most in groups:
        n, total = len(values) + 2, sum(values)
        centre += total / n
        squares += (sum(value * value for value in values) + most * most - total * total / n) / n**2
    half = Z * sqrt(squares) / len(tasks)
    return estimate, centre / len(tasks) - half, centre / len(tasks) + half


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
