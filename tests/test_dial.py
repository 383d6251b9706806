"""dial.py: the methods on the dial, their costs, and the points that results/ has of them."""

import json
from pathlib import Path

import pytest

from dpvr.inference.chat import Answerer
from dpvr.inference.controls import Page
from dpvr.inference.dial import Point, measured, show_dial
from dpvr.inference.loading import load

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(Answerer(*load(str(ROOT))))


def row(cost: float, gain: float, **what: object) -> dict:
    return {"what": what, "prefill_flops": cost, "minus_vanilla": [gain, gain - 0.01, gain + 0.01]}


def test_points_are_read_from_the_record_that_is_there_by_cost(tmp_path):
    assert measured(tmp_path) == []
    (tmp_path / "latent").mkdir()
    old = [row(1.0, 0.0), row(0.4, -0.02, latent_split_layer=1, plan="o|ll"), row(0.4, -0.3, layer=1, keep=0.1)]
    (tmp_path / "latent" / "accuracy.json").write_text(json.dumps({"rows": old}))
    assert measured(tmp_path) == [Point("latent", "o|ll", 0.4, -2.0), Point("none", None, 1.0, 0.0)]


def test_every_method_of_dpvr_mini_has_its_measured_point(page):
    assert list(page.settings) == ["none", "late_fusion", "latent"] and page.setting.routing == "latent"
    assert all(setting.measured is not None for setting in page.settings.values())
    assert page.settings["late_fusion"].cost == pytest.approx(0.81, abs=0.005)
    assert page.settings["none"].label == "Vanilla: 1.00 of the compute"
    assert page.settings["latent"].label == "Latent: 0.36 of the compute, -1.4 points"
    assert page.answerer.ways.now == "latent"


def test_the_chosen_point_is_marked(page):
    marked = {routing: page.dial(routing) for routing in page.settings}
    for routing, shown in marked.items():
        assert shown.count("<circle") == len(page.points) and shown.count("r='8'") == 1, routing
    assert len(set(marked.values())) == 3 and "Chosen: late fusion" in marked["late_fusion"]


def test_a_model_that_was_not_measured_says_so(random_mini):
    page = Page(Answerer(*load(random_mini)))
    assert "not measured on this model" in page.dial("late_fusion")
    assert "<circle" not in show_dial([], page.settings["none"])
