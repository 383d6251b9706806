"""minibench/scoring.py: small cases by hand, and intervals against other sources."""

from math import sqrt

import numpy as np
import pytest

from minibench.scoring import (
    constant_replies,
    mean_interval,
    paired_difference,
    score_task,
    summarise,
    unit_score,
    wilson_interval,
)
from minibench.tasks import TASKS, Item


def single(task: str, *answers: str, skill: str = "count", chance: float = 0.25) -> list[Item]:
    """Items of one question each."""
    options = ("A", "B", "C", "D") if set(answers) <= set("ABCD") else ("yes", "no")
    return [Item(task, skill, chance, (), (("?", answer),), (options,)) for answer in answers]


def circular(task: str, *firsts: str) -> list[Item]:
    """Items of four rotations each, by the letter that is right in the first one."""
    letters = ["DCBADCBA"["DCBA".index(first) :][:4] for first in firsts]
    options = (("A", "B", "C", "D"),) * 4
    return [Item(task, "colour", 0.25, (), tuple(("?", letter) for letter in several), options) for several in letters]


def pairs(task: str, num: int) -> list[Item]:
    return [Item(task, "count", 0.5, (), (("first?", "yes"), ("second?", "no")), (("yes", "no"),) * 2)] * num


@pytest.mark.parametrize("task", ["science", "scene", "multi_image", "existence"])
def test_a_single_question_scores_by_accuracy(task):
    items = single(task, "A", "B", "C", "D")
    result = score_task(items, [["A"], ["B"], ["C"], ["A"]])
    assert (result["score"], result["accuracy"], result["n"], result["questions"]) == (0.75, 0.75, 4, 4)
    assert result["chance"] == 0.25


def test_only_the_expected_word_is_right():
    items = single("scene", "A", "A", "A", "A", "A")
    assert score_task(items, [["A"], ["A."], ["a"], [""], ["A. red"]])["score"] == 0.2


@pytest.mark.parametrize("task", ["perception", "cognition"])
def test_mme_is_the_mean_of_accuracy_and_accuracy_plus(task):
    """Four pictures with both, one, one and no answer right: accuracy 4 of 8, accuracy+ 1 of 4."""
    replies = [["yes", "no"], ["yes", "yes"], ["no", "no"], ["no", "yes"]]
    result = score_task(pairs(task, 4), replies)
    assert result["accuracy"] == 0.5 and result["accuracy_plus"] == 0.25
    assert result["score"] == pytest.approx((0.5 + 0.25) / 2)
    assert (result["n"], result["questions"]) == (4, 8)
    assert [unit_score(item, reply) for item, reply in zip(pairs(task, 4), replies, strict=True)] == [1, 0.25, 0.25, 0]


@pytest.mark.parametrize("task", ["choice_en", "choice_cn"])
def test_circular_evaluation_asks_for_all_four_rotations(task):
    items = circular(task, "A", "C", "D")
    assert [answer for _, answer in items[1].questions] == ["C", "B", "A", "D"]
    result = score_task(items, [["A", "D", "C", "B"], ["C", "B", "A", "A"], ["A", "A", "A", "A"]])
    assert result["score"] == pytest.approx(1 / 3)
    assert result["accuracy"] == pytest.approx((4 + 3 + 1) / 12)
    assert (result["n"], result["questions"]) == (3, 12)


def test_existence_has_popes_precision_recall_f1_and_yes_ratio():
    """Three hits, one false alarm, two misses, two right refusals."""
    items = single("existence", "yes", "yes", "yes", "no", "yes", "yes", "no", "no", skill="popular", chance=0.5)
    result = score_task(items, [["yes"]] * 4 + [["no"]] * 4)
    assert result["accuracy"] == 5 / 8
    assert (result["precision"], result["recall"], result["yes_ratio"]) == (3 / 4, 3 / 5, 4 / 8)
    assert result["f1"] == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))


def test_popes_numbers_are_zero_for_a_model_that_never_says_yes():
    result = score_task(single("existence", "yes", "no"), [["no"], ["no"]])
    assert (result["precision"], result["recall"], result["f1"], result["yes_ratio"]) == (0, 0, 0, 0)
    assert result["accuracy"] == 0.5


def test_skills_are_scored_apart():
    items = single("scene", "A", "B", skill="count") + single("scene", "C", skill="side")
    assert score_task(items, [["A"], ["A"], ["C"]])["skills"] == {"count": 0.5, "side": 1.0}


@pytest.fixture
def eight_tasks() -> tuple[list[Item], list[list[str]]]:
    """Two items of each task, both right but for one of science and, in one rotation, one of choice_cn."""
    items, replies = [], []
    for task in TASKS:
        made = {"perception": pairs, "cognition": pairs}.get(task)
        own = made(task, 2) if made else circular(task, "A", "B") if "choice" in task else single(task, "A", "B")
        items += own
        replies += [[answer for _, answer in item.questions] for item in own]
        if task in ("science", "choice_cn"):
            replies[-1][0] = "D"
    return items, replies


def test_the_mean_is_over_the_eight_tasks_and_the_six_bench_mean_leaves_mme_out(eight_tasks):
    result = summarise(*eight_tasks)
    wrong = {"science": 0.5, "choice_cn": 0.5}
    assert result["tasks"] == {task: wrong.get(task, 1.0) for task in TASKS}
    assert result["mean"] == pytest.approx(7 / 8) and result["n"] == 16
    assert result["six_bench_mean"] == pytest.approx(5 / 6)
    assert result["details"]["choice_cn"]["accuracy"] == 7 / 8
    assert result["low"] < result["mean"] < result["high"]


def test_the_six_bench_mean_takes_the_twins_of_the_papers_six_and_needs_all_of_them(eight_tasks):
    items, replies = eight_tasks
    six = {"existence", "choice_en", "choice_cn", "science", "scene", "multi_image"}
    for left_out in TASKS:
        kept = [(item, reply) for item, reply in zip(items, replies, strict=True) if item.task != left_out]
        result = summarise(*map(list, zip(*kept, strict=True)))
        assert (result["six_bench_mean"] is None) == (left_out in six)
        assert set(result["tasks"]) == set(TASKS) - {left_out}


def test_the_replies_to_the_tasks_may_come_in_any_order(eight_tasks):
    items, replies = eight_tasks
    assert summarise(items[::-1], replies[::-1])["tasks"] == summarise(items, replies)["tasks"]


def test_a_constant_letter_picks_whatever_stands_there():
    options = (("red A", "blue B", "green C"), ("blue A", "green B", "red C"))
    item = Item("scene", "colour", 1 / 3, (), (("?", "blue B"), ("?", "green B")), options)
    assert constant_replies([item])["tasks"] == {"scene": 1.0}


def test_constant_replies_gives_every_task_its_best_single_reply():
    items = single("scene", "B", "B", "A", "C") + single("existence", "no", "no", "yes") + pairs("cognition", 2)
    result = constant_replies(items + circular("choice_en", "A", "B"))
    assert result["tasks"] == {"scene": 0.5, "existence": pytest.approx(2 / 3), "cognition": 0.25, "choice_en": 0.0}
    assert {task: result["details"][task]["accuracy"] for task in ("cognition", "choice_en")} == {
        "cognition": 0.5,
        "choice_en": 0.25,
    }


# Intervals


def test_the_wilson_interval_matches_published_values():
    """Newcombe 1998, table I, method 3."""
    published = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0, 0.1611)}
    for (right, n), interval in {**published, (1, 29): (0.0061, 0.1718)}.items():
        assert wilson_interval(right, n) == pytest.approx(interval, abs=1e-4)


def test_the_wilson_interval_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for right, n in ((5, 10), (10, 10), (150, 200), (499, 500)):
        theirs = stats.binomtest(right, n).proportion_ci(method="wilson")
        assert wilson_interval(right, n) == pytest.approx((theirs.low, theirs.high), abs=1e-4)


def detail(score: float, low: float, high: float) -> dict[str, float]:
    return {"score": score, "low": low, "high": high}


def test_the_interval_of_a_mean_adds_the_distances_of_its_parts_in_squares():
    parts = [detail(0.8, 0.7, 0.85), detail(0.5, 0.3, 0.6), detail(0.2, 0.0, 0.3)]
    low, high = mean_interval(dict(zip(("existence", "science", "scene"), parts, strict=True)))
    assert low == pytest.approx(0.5 - sqrt(0.1**2 + 0.2**2 + 0.2**2) / 3)
    assert high == pytest.approx(0.5 + sqrt(0.05**2 + 0.1**2 + 0.1**2) / 3)
    assert mean_interval({"scene": detail(0.8, 0.7, 0.85)}) == pytest.approx((0.7, 0.85))


def test_the_choice_tasks_count_as_one_since_they_share_their_pictures():
    parts = {"scene": detail(0.5, 0.3, 0.6), "choice_en": detail(0.5, 0.4, 0.6), "choice_cn": detail(0.5, 0.3, 0.6)}
    low, high = mean_interval(parts)
    assert low == pytest.approx(0.5 - sqrt(0.2**2 + (0.1 + 0.2) ** 2) / 3)
    assert high == pytest.approx(0.5 + sqrt(0.1**2 + (0.1 + 0.1) ** 2) / 3)


def test_a_paired_interval_is_the_published_one():
    """40 of 160 right in the first alone, 20 in the second alone: 0.0309 to 0.2160 (diffpropci.mp of R's PropCIs)."""
    first, second = [1.0] * 40 + [0.0] * 120, [0.0] * 40 + [1.0] * 20 + [0.0] * 100
    estimate, low, high = paired_difference({"scene": first}, {"scene": second}, ("scene",))
    assert estimate == 20 / 160 and (round(low, 4), round(high, 4)) == (0.0309, 0.2160)


def test_a_paired_interval_over_tasks_is_the_one_by_hand():
    """Differences 1, 0, 0, 0 and 0, 0, -1, -1: sums of squares 1 + 1 and 2 + 1 over six items with the two more."""
    first = {"scene": [1.0, 1.0, 0.0, 1.0], "science": [0.0, 1.0, 0.0, 0.0]}
    second = {"scene": [0.0, 1.0, 0.0, 1.0], "science": [0.0, 1.0, 1.0, 1.0]}
    estimate, low, high = paired_difference(first, second, ("scene", "science"))
    half, centre = 1.96 * sqrt((2 - 1 / 6) / 36 + (3 - 4 / 6) / 36) / 2, (1 / 6 - 2 / 6) / 2
    assert (estimate, low, high) == pytest.approx((-0.125, centre - half, centre + half))
    equal = 1.96 / 6  # four questions do not make two models the same
    assert paired_difference(first, first, ("scene",)) == pytest.approx((0, -equal, equal))
    choices = {"choice_en": [1.0, 0.0], "choice_cn": [1.0, 0.0]}
    assert paired_difference(choices, choices, tuple(choices)) == pytest.approx((0, -1.96 / 4, 1.96 / 4))


def test_a_paired_interval_covers_and_knows_that_the_choice_tasks_go_together():
    """Against a bootstrap over items, the choice tasks' resampled together."""
    draw = np.random.default_rng(0)
    english = draw.integers(0, 2, (2, 60)).astype(float)
    chinese = np.where(draw.random((2, 60)) < 0.95, english, 1 - english)
    scene = draw.integers(0, 2, (2, 40)).astype(float)
    first, second = ({"choice_en": english[i], "choice_cn": chinese[i], "scene": scene[i]} for i in (0, 1))
    _, low, high = paired_difference(first, second, tuple(first))
    choices, scenes = draw.integers(0, 60, (4000, 60)), draw.integers(0, 40, (4000, 40))
    means = [(english[0] - english[1])[choices], (chinese[0] - chinese[1])[choices], (scene[0] - scene[1])[scenes]]
    bootstrap = np.quantile(sum(values.mean(1) for values in means) / 3, (0.025, 0.975))
    assert (low, high) == pytest.approx(tuple(bootstrap), abs=0.01)
    assert high - low == pytest.approx(bootstrap[1] - bootstrap[0], rel=0.05)
