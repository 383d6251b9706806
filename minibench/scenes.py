"""Pictures of a few coloured shapes and handwritten digits, the same for the same seed on every machine.

    Split + seed + index -> random.Random -> Scene(background, objects) -> draw() -> 96 x 96 RGB picture

A picture is a 3 x 3 grid of places; two to four of them hold one object each, moved, scaled and tilted a little. The
digits are real handwriting: the 8 x 8 scans of `sklearn.datasets.load_digits`. That data set does not name its
writers, so the splits share writers and are disjoint in *images*: by the index of the scan, see `digit_indices`.
"""

import math
import random
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits

Split = Literal["train", "validation", "test"]

SIDE = 96
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
COLOURS = {
    "red": (215, 35, 35),
    "green": (35, 150, 55),
    "blue": (45, 75, 225),
    "yellow": (240, 210, 30),
    "purple": (140, 50, 175),
    "orange": (245, 130, 20),
    "cyan": (50, 200, 215),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
OVERSAMPLING = 4


@dataclass(frozen=True)
class Object:
    """Something at a place: `centre` (x, y) and `size` in pixels, `tilt` in degrees."""

    place: str
    centre: tuple[int, int]
    size: int
    tilt: int


@dataclass(frozen=True)
class Shape(Object):
    """A coloured shape."""

    colour: str
    shape: str

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Digit(Object):
    """A handwritten digit: `index` is its scan in `load_digits`."""

    digit: int
    index: int

    @property
    def name(self) -> str:
        return f"digit {self.digit}"


@dataclass(frozen=True)
class Scene:
    """Objects in reading order on a grey background, light or dark, with a little grain."""

    brightness: int
    grain: int
    grain_seed: int
    objects: tuple[Shape | Digit, ...]

    @property
    def shapes(self) -> list[Shape]:
        return [thing for thing in self.objects if isinstance(thing, Shape)]

    @property
    def digits(self) -> list[Digit]:
        return [thing for thing in self.objects if isinstance(thing, Digit)]

    def draw(self) -> Image.Image:
        """Return the RGB picture, `SIDE` pixels square."""
        noise = np.random.default_rng(self.grain_seed).integers(-self.grain, self.grain + 1, (SIDE, SIDE, 1))
        picture = Image.fromarray(np.repeat(np.clip(self.brightness + noise, 0, 255).astype(np.uint8), 3, axis=2))
        ink = (20, 20, 20) if self.brightness > 127 else (245, 245, 245)
        for thing in self.objects:
            if isinstance(thing, Shape):
                colour, mask = COLOURS[thing.colour], shape_mask(thing.shape, thing.size, thing.tilt)
            else:
                colour, mask = ink, digit_mask(thing.index, thing.size, thing.tilt)
            corner = (thing.centre[0] - thing.size // 2, thing.centre[1] - thing.size // 2)
            picture.paste(colour, corner, mask)
        return picture


def make_scene(split: Split, seed: int, index: int) -> Scene:
    """Return picture `index` of a seed: at least one shape and one digit, two to four objects in all."""
    rng = random.Random(f"{split}/{seed}/{index}")
    places = sorted(rng.sample(range(len(PLACES)), rng.randint(2, 4)))
    kinds = [Shape, Digit] + [rng.choice((Shape, Shape, Digit)) for _ in places[2:]]
    rng.shuffle(kinds)
    things = [_make_object(kind, place, split, rng) for kind, place in zip(kinds, places, strict=True)]
    brightness = rng.choice((rng.randint(200, 250), rng.randint(10, 60)))
    return Scene(brightness, rng.choice((0, 4, 8)), rng.getrandbits(32), tuple(things))


def _make_object(kind: type[Shape] | type[Digit], place: int, split: Split, rng: random.Random) -> Shape | Digit:
    cell = SIDE // 3
    size = rng.randint(20, 28)
    slack = (cell - size) // 2
    centre = tuple(cell * position + cell // 2 + rng.randint(-slack, slack) for position in (place % 3, place // 3))
    where = (PLACES[place], centre, size, rng.randint(-12, 12))
    if kind is Shape:
        return Shape(*where, rng.choice(list(COLOURS)), rng.choice(SHAPES))
    digit = rng.randrange(10)
    return Digit(*where, digit, rng.choice(digit_indices(split)[digit]))


@cache
def digit_indices(split: Split) -> list[list[int]]:
    """Return the scans of each digit in a split: of nine scans in a row, six train, one validates and two test."""
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {get_args(Split)}, got {split!r}.")
    remainders = {"train": range(6), "validation": range(6, 7), "test": range(7, 9)}[split]
    targets = _digits().target
    return [[int(i) for i in np.flatnonzero(targets == digit) if i % 9 in remainders] for digit in range(10)]


@cache
def _digits():
    return load_digits()


@lru_cache(maxsize=8192)
def digit_mask(index: int, size: int, tilt: int) -> Image.Image:
    """Return the ink of a scan as an 8-bit mask, `size` pixels square."""
    scan = Image.fromarray((_digits().images[index] * 255 / 16).astype(np.uint8))
    return scan.resize((size, size), Image.Resampling.BICUBIC).rotate(tilt, Image.Resampling.BICUBIC)


@lru_cache(maxsize=8192)
def shape_mask(shape: str, size: int, tilt: int) -> Image.Image:
    """Return a shape as an 8-bit mask, `size` pixels square, anti-aliased by drawing it larger."""
    side = size * OVERSAMPLING
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    if shape in ("circle", "ring"):
        pen.ellipse((0, 0, side - 1, side - 1), fill=255)
        if shape == "ring":
            pen.ellipse((0.28 * side, 0.28 * side, 0.72 * side, 0.72 * side), fill=0)
    else:
        turn = math.radians(tilt)
        pen.polygon([_turned(x, y, turn, side) for x, y in _outline(shape)], fill=255)
    return mask.resize((size, size), Image.Resampling.LANCZOS)


def _turned(x: float, y: float, turn: float, side: int) -> tuple[float, float]:
    half = side / 2
    return (
        half + half * (x * math.cos(turn) - y * math.sin(turn)),
        half + half * (x * math.sin(turn) + y * math.cos(turn)),
    )


def _outline(shape: str) -> list[tuple[float, float]]:
    """Return the corners of a shape in [-1, 1] x [-1, 1], y downwards."""
    if shape == "square":
        return [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    if shape == "triangle":
        return [(0, -0.95), (0.9, 0.75), (-0.9, 0.75)]
    if shape == "star":
        radii = (1, 0.42)
        angles = [math.pi * (i / 5 - 0.5) for i in range(10)]
        return [(radii[i % 2] * math.cos(a), radii[i % 2] * math.sin(a)) for i, a in enumerate(angles)]
    arm = 0.3
    quarter = [(-arm, -0.95), (arm, -0.95), (arm, -arm)]
    return [_quarter_turns(x, y, turns) for turns in range(4) for x, y in quarter]


def _quarter_turns(x: float, y: float, turns: int) -> tuple[float, float]:
    for _ in range(turns):
        x, y = -y, x
    return x, y
