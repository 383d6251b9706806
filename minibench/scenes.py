"""Pictures of coloured shapes and handwritten digits, the same for the same seed on every machine.

    random.Random -> Scene(background, objects, drawing order) -> draw() -> 96 x 96 RGB picture

A picture is a 3 x 3 grid of places; three to six of them hold one object each, moved, scaled and tilted, so that
neighbours may overlap. The background is plain or textured, light or dark.

Objects co-occur as in photos: six "popular" pairs of colour and shape are drawn more than twice as often as others,
and a shape often comes with its `companion`, another shape of its colour. POPE's popular and adversarial negatives
need both.

The digits are real handwriting: the 8 x 8 scans of `sklearn.datasets.load_digits`. That data set does not name its
writers, so the splits share writers and are disjoint in *images*: by the index of the scan, see `digit_indices`.
"""

import math
import random
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image, ImageDraw

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
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
POPULAR = tuple(zip(COLOURS, SHAPES, strict=True))
POPULAR_SHARE = 0.25
COMPANION_SHARE = 0.25
SAME_SHAPE_SHARE = 0.15
BACKGROUNDS = ("plain", "grain", "gradient", "stripes", "checks")
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
    """A handwritten digit: `index` is its scan in `load_digits`, `warp` a change of handwriting, see `digit_mask`."""

    digit: int
    index: int
    warp: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        return f"digit {self.digit}"


@dataclass(frozen=True)
class Background:
    """A grey surface: `brightness` in 0..255, a texture of `BACKGROUNDS` and its strength in steps of grey."""

    brightness: int
    texture: str
    strength: int
    seed: int

    def draw(self) -> np.ndarray:
        """Return `uint8[SIDE, SIDE]`."""
        rng = np.random.default_rng(self.seed)
        y, x = np.mgrid[0:SIDE, 0:SIDE]
        across = x * (turn := rng.uniform(-1, 1)) + y * (1 - abs(turn))
        if self.texture == "grain":
            pattern = rng.uniform(-1, 1, (SIDE, SIDE))
        elif self.texture == "gradient":
            pattern = across / (SIDE / 2) - 1
        elif self.texture == "stripes":
            pattern = np.sin(across * rng.uniform(0.3, 0.9))
        elif self.texture == "checks":
            side = rng.integers(5, 14)
            pattern = (x // side + y // side) % 2 * 2.0 - 1
        else:
            pattern = np.zeros((SIDE, SIDE))
        return np.clip(self.brightness + self.strength * pattern, 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Scene:
    """Objects in reading order; `drawing_order` holds their indices, the last one lies on top."""

    background: Background
    objects: tuple[Shape | Digit, ...]
    drawing_order: tuple[int, ...]

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        return tuple(thing for thing in self.objects if isinstance(thing, Shape))

    @cached_property
    def digits(self) -> tuple[Digit, ...]:
        return tuple(thing for thing in self.objects if isinstance(thing, Digit))

    @cached_property
    def by_place(self) -> dict[str, Shape | Digit]:
        return {thing.place: thing for thing in self.objects}

    @property
    def from_back_to_front(self) -> list[Shape | Digit]:
        return [self.objects[index] for index in self.drawing_order]

    def draw(self) -> Image.Image:
        """Return the RGB picture, `SIDE` pixels square."""
        picture = Image.fromarray(self.background.draw()).convert("RGB")
        ink = (20, 20, 20) if self.background.brightness > 127 else (245, 245, 245)
        for thing in self.from_back_to_front:
            if isinstance(thing, Shape):
                colour, mask = COLOURS[thing.colour], shape_mask(thing.shape, thing.size, thing.tilt)
            else:
                colour, mask = ink, digit_mask(thing.index, thing.size, thing.tilt, thing.warp)
            corner = (thing.centre[0] - thing.size // 2, thing.centre[1] - thing.size // 2)
            picture.paste(colour, corner, mask)
        return picture


def companion(colour: str, shape: str) -> tuple[str, str]:
    """The pair that most often comes with this one: the same colour, the next shape."""
    return colour, SHAPES[(SHAPES.index(shape) + 1) % len(SHAPES)]


def make_scene(split: Split, seed: int, index: int) -> Scene:
    """Return picture `index` of a seed, see `draw_scene`."""
    return draw_scene(split, random.Random(f"{split}/{seed}/{index}"))


def draw_scene(split: Split, rng: random.Random, count: int | None = None) -> Scene:
    """Return `count` objects, from two to nine, else three to six; one to four are digits, at least one is a shape."""
    count = rng.randint(3, 6) if count is None else count
    places = sorted(rng.sample(range(len(PLACES)), count))
    num_digits = rng.randint(1, min(4, count - 1))
    digits = set(rng.sample(range(count), num_digits))
    pairs = _draw_pairs(count - num_digits, rng)
    things = tuple(
        _make_digit(place, split, rng) if position in digits else Shape(*_where(place, rng), *pairs.pop())
        for position, place in enumerate(places)
    )
    brightness = rng.choice((rng.randint(195, 250), rng.randint(10, 60)))
    texture = rng.choice(BACKGROUNDS)
    background = Background(brightness, texture, rng.randint(5, 20), rng.getrandbits(32))
    return Scene(background, things, tuple(rng.sample(range(count), count)))


def draw_scene_with_repeats(split: Split, rng: random.Random) -> Scene:
    """Return a scene with at least two shapes of a kind or a colour; three or more in every other case."""
    least = rng.choice((2, 3))
    while True:
        scene = draw_scene(split, rng)
        kinds = Counter(word for thing in scene.shapes for word in (thing.colour, thing.shape))
        if max(kinds.values()) >= least:
            return scene


def _draw_pairs(count: int, rng: random.Random) -> list[tuple[str, str]]:
    """Return colours and shapes, popular pairs and companions more often than others, in random order."""
    pairs: list[tuple[str, str]] = []
    while len(pairs) < count:
        habit = rng.random()
        if pairs and habit < COMPANION_SHARE:
            pair = companion(*rng.choice(pairs))
        elif pairs and habit < COMPANION_SHARE + SAME_SHAPE_SHARE:
            pair = (rng.choice(tuple(COLOURS)), rng.choice(pairs)[1])
        elif rng.random() < POPULAR_SHARE:
            pair = rng.choice(POPULAR)
        else:
            pair = (rng.choice(tuple(COLOURS)), rng.choice(SHAPES))
        pairs.append(pair)
    rng.shuffle(pairs)
    return pairs


def _where(place: int, rng: random.Random) -> tuple[str, tuple[int, int], int, int]:
    cell, size = SIDE // 3, rng.randint(26, 34)
    low, high = size - size // 2, SIDE - (size - size // 2)  # inside the picture
    x, y = (
        min(max(cell * position + cell // 2 + rng.randint(-5, 5), low), high) for position in (place % 3, place // 3)
    )
    return PLACES[place], (x, y), size, rng.randint(-15, 15)


def _make_digit(place: int, split: Split, rng: random.Random) -> Digit:
    digit = rng.randrange(10)
    return Digit(*_where(place, rng), digit, rng.choice(digit_indices(split)[digit]))


@cache
def digit_indices(split: Split) -> list[list[int]]:
    """Return the scans of each digit in a split: of ten scans in a row, seven train, one validates and two test."""
    if split not in get_args(Split):
        raise ValueError(f"MiniBench has no split {split!r}: choose one of {', '.join(get_args(Split))}.")
    remainders = {"train": range(7), "validation": range(7, 8), "test": range(8, 10)}[split]
    targets = _digits().target
    return [[int(i) for i in np.flatnonzero(targets == digit) if i % 10 in remainders] for digit in range(10)]


@cache
def _digits() -> Any:
    from sklearn.datasets import load_digits  # seconds to import, and commands take names from this module

    return load_digits()


@lru_cache(maxsize=8192)
def digit_mask(index: int, size: int, tilt: int, warp: tuple[float, ...] = ()) -> Image.Image:
    """Return the ink of a scan as an 8-bit mask, `size` pixels square.

    `warp` holds width, height and slant of the writing, as shares of what they are, and the exponent of its ink."""
    scan = Image.fromarray((_digits().images[index] * 255 / 16).astype(np.uint8))
    mask = scan.resize((size, size), Image.Resampling.BICUBIC).rotate(tilt, Image.Resampling.BICUBIC)
    if not warp:
        return mask
    width, height, slant, exponent = warp
    half = size / 2
    inverse = (1 / width, slant, half - half / width - half * slant, 0, 1 / height, half - half / height)
    ink = [round(255 * (value / 255) ** exponent) for value in range(256)]
    return mask.transform((size, size), Image.Transform.AFFINE, inverse, Image.Resampling.BICUBIC).point(ink)


def warped(scene: Scene, rng: random.Random) -> Scene:
    """Return the scene in other handwriting: its digits wider, higher, slanted, thicker or thinner at random.

    The train split has some 1,260 scans, few for a vision tower that is to read writing it never saw."""
    objects = tuple(
        replace(
            thing,
            warp=(rng.uniform(0.75, 1.1), rng.uniform(0.85, 1.1), rng.uniform(-0.3, 0.3), 2 ** rng.uniform(-0.9, 0.9)),
        )
        if isinstance(thing, Digit)
        else thing
        for thing in scene.objects
    )
    return replace(scene, objects=objects)


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
