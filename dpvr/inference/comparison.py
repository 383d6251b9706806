"""Vanilla and DPVR on one question: both answers, and the prefill's time, measured in turn until the ratio is known.

    vision tower, projector     once: it is the same for both, so its output is kept and shared
        |
    vanilla, DPVR | DPVR, vanilla | vanilla, DPVR ...     rounds of one prefill each; a ratio per round
        |
    median of the ratios, and its 95% interval            until that is narrow, or patience ends: then nothing is said

The interval is that of order statistics, which takes no distribution for granted. Rounds end by the interval's width
and never by where it lies, so that its coverage holds (Chow and Robbins, 1965, doi:10.1214/aoms/1177700156).
"""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy.stats import quantile_test

from dpvr.inference.runs import Readout

NARROW = 0.15  # width of an interval as a share of the ratio
WARM_UP = 2  # rounds that are not counted
FEWEST, MOST = 12, 100  # counted rounds
PATIENCE = 15  # seconds after which no round begins


class Ratio(NamedTuple):
    """DPVR's prefill time over vanilla's: the median of the rounds, and its 95% interval."""

    estimate: float
    low: float
    high: float

    @property
    def is_narrow(self) -> bool:
        return self.high - self.low <= NARROW * self.estimate


class Comparison(NamedTuple):
    """The same question under vanilla and another routing.

    Attributes:
        texts: both answers.
        medians: both readouts; prefill is the median of the rounds, vision the one pass that both share.
        ratio: of the prefill times.
        repetitions: the rounds that were counted.
    """

    texts: tuple[str, str]
    medians: tuple[Readout, Readout]
    ratio: Ratio
    repetitions: int

    @property
    def is_same_answer(self) -> bool:
        return self.texts[0] == self.texts[1]


def ratio_of(vanilla: Sequence[float], own: Sequence[float]) -> Ratio:
    """Return the ratio of the prefill times of at least six rounds."""
    ratios = [mine / theirs for theirs, mine in zip(vanilla, own, strict=True)]
    low, high = quantile_test(ratios).confidence_interval(0.95)
    return Ratio(statistics.median(ratios), float(low), float(high))


def is_decided(vanilla: Sequence[float], own: Sequence[float]) -> bool:
    """Whether no further round is needed."""
    return len(own) >= MOST or (len(own) >= FEWEST and ratio_of(vanilla, own).is_narrow)
