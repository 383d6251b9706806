"""views.py and comparison.py: what is said of an answer, in words that its numbers allow."""

from dataclasses import replace

import pytest
import torch

from dpvr.analysis.attention import TextToImage
from dpvr.inference.chat import Beside
from dpvr.inference.comparison import FEWEST, MOST, Comparison, Ratio, is_decided, ratio_of
from dpvr.inference.runs import Readout
from dpvr.inference.views import digits, ratios, show_comparison, show_inside, show_line, verdict

OWN = Readout("latent", 2.0, 9.0, 30.0, 41.0, 12.0, 6.0, 166.7, 4.8, 0.39, 64, 25, 3)
VANILLA = replace(OWN, routing="none", prefill=52.0, first_token=63.0, prefill_gflops=1.0)


def compared(ratio: Ratio, texts: tuple[str, str] = ("blue", "blue")) -> Comparison:
    return Comparison(texts, (VANILLA, OWN), ratio, 20)


def text_of(page: str) -> str:
    """What a person reads of it: without tags, and so without what stands in their attributes."""
    return "".join(part.partition(">")[2] for part in f">{page}".split("<"))


@pytest.mark.parametrize(
    ("answer", "varies", "end"),
    [
        ("blue", False, ", same answer"),
        ("red", False, "; without DPVR the answer is “blue”"),
        ("red", True, ""),
    ],
)
def test_the_line_under_an_answer_says_what_was_spared_and_whether_the_answers_agree(answer, varies, end):
    line = show_line(answer, OWN, Beside("blue", VANILLA, OWN), varies=varies)
    said = text_of(line[: line.index("</summary>")])
    assert (
        said == f"First word after 41 ms; without DPVR 63 ms. 0.39 of the {'compute' if varies else 'compute' + end}"
    )


def test_the_line_says_no_more_than_was_measured():
    assert text_of(show_line("a", OWN)).startswith("First word after 41 ms.")
    assert "This is the model without DPVR." in text_of(show_line("a", VANILLA))
    assert "<b>x" not in show_line("a", OWN, Beside("<b>x", VANILLA, OWN))


def test_the_details_give_each_number_once():
    details = show_line("blue", OWN, Beside("blue", VANILLA, OWN))
    said = text_of(details[details.index("<table") :])
    for name in ("First word", "Preparing", "Encoding pictures", "Prefill", "Image tokens", "Text tokens"):
        assert said.count(name) == (2 if name == "Prefill" else 1), name  # Prefill, and Prefill, GFLOPs


@pytest.mark.parametrize(
    ("value", "said"), [(1234.5, "1,234 ms"), (41.3, "41 ms"), (6.34, "6.3 ms"), (0.281, "0.28 ms"), (None, "–")]
)
def test_numbers_have_sensible_digits(value, said):
    assert digits(value) == said


@pytest.mark.parametrize(
    ("ratio", "said"),
    [
        (
            Ratio(0.47, 0.45, 0.50),
            "DPVR's prefill takes 0.47 of vanilla's time (0.45 to 0.50, 95% interval",
        ),
        (Ratio(0.97, 0.94, 1.02), "There is no difference to see: 0.97"),
        (Ratio(1.20, 1.15, 1.24), "DPVR is slower here"),
        (
            Ratio(0.50, 0.20, 1.40),
            "The machine is too busy to tell: the ratio of the prefill times lies from 0.20",
        ),
    ],
)
def test_the_verdict_is_what_the_interval_allows(ratio, said):
    assert text_of(verdict(compared(ratio))).startswith(said)


def test_a_comparison_says_in_words_whether_the_answers_agree():
    assert "Both answer “blue”." in show_comparison(compared(Ratio(0.5, 0.49, 0.51)))
    page = show_comparison(compared(Ratio(0.5, 0.49, 0.51), ("<i>red", "blue")))
    assert "The answers differ: vanilla says “&lt;i&gt;red”, latent “blue”." in page
    assert ratios(compared(Ratio(0.5, 0.49, 0.51)))["prefill"] == 30 / 52


def test_rounds_end_when_the_interval_is_narrow_or_patience_is_over():
    steady, wild = [10.0] * FEWEST, [10.0, 30.0, 3.0] * MOST
    assert not is_decided(steady[:-1], steady[:-1]) and is_decided(steady, steady)
    assert not is_decided(steady, wild[:FEWEST]) and is_decided([10.0] * MOST, wild[:MOST])
    found = ratio_of([10.0] * 20, [float(index) for index in range(1, 21)])
    assert found.low < found.estimate == 1.05 < found.high and found.high - found.low > 0.5
    covered = 0
    torch.manual_seed(0)
    for _ in range(200):
        rounds = torch.randn(15).exp().mul(0.5).tolist()  # their median is 0.5
        low, high = ratio_of([1.0] * 15, rounds)[1:]
        covered += low <= 0.5 <= high
    assert covered >= 182  # 95% and more, as order statistics round


def attention(last_layer: float) -> TextToImage:
    maps = torch.full((3, 1, 4), 1e-12)
    maps[1] = torch.tensor([[0.5, 0.1, 0.0, 0.0]])
    maps[2] = last_layer / 4
    return TextToImage([0.1, 0.2, 0.3], 2, maps[2], maps)


def test_a_map_is_shown_where_its_mass_is_material_with_the_mass_in_the_caption():
    pictures = torch.rand(1, 3, 8, 8)
    page = show_inside({"none": attention(0.0), "latent": attention(0.0)}, pictures)
    figures, layers = page.split("<details>")
    assert figures.count("<img") == 2 and "In layer 1, counted from 0" in figures
    assert layers.count("<img") == 2 and layers.count("<td>0%</td>") == 4  # layers 0 and 2 of both
    assert "vanilla</b>: 60% of its attention is on the picture." in page
    faint = attention(0.0)
    faint.maps[1] = 1e-3
    page = show_inside({"none": attention(0.0), "latent": faint}, pictures)
    assert page.split("<details>")[0].count("<img") == 1
    assert "latent</b>: 0% of its attention is on the picture; no map, as less than 5% is too little to show." in page
