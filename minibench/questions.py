"""Queries: questions about one picture, written before the picture is drawn.

    Query = wording in English and Chinese, the possible answers, and solve(scene) -> the true ones

`tasks.py` turns a query into yes/no pairs, multiple choice or comparisons of two pictures. A query that does not fit a
scene (it asks for the star, and there are two stars) has no true answer there.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from .scenes import COLOURS, PLACES, SHAPES, Digit, Object, Scene, Shape

NO_ANSWER: frozenset[str] = frozenset()
DIGITS = tuple(str(digit) for digit in range(10))
PAIRS = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
PLURALS = {shape: f"{shape}es" if shape == "cross" else f"{shape}s" for shape in SHAPES}
SIDES = ("left", "right", "above", "below")

CHINESE_WORDS = dict(
    zip(
        (*PLACES, *COLOURS, *SHAPES, "objects", "shapes", "digits"),
        "左上 上方 右上 左边 中间 右边 左下 下方 右下 红色 绿色 蓝色 黄色 紫色 橙色 "
        "圆形 方形 三角形 星形 十字 圆环 东西 形状 数字".split(),
        strict=True,
    )
)
CHINESE = CHINESE_WORDS | {
    f"{colour} {shape}": CHINESE_WORDS[colour] + CHINESE_WORDS[shape] for colour in COLOURS for shape in SHAPES
}


@dataclass(frozen=True)
class Query:
    """A question with a family of answers.

    Attributes:
        skill: the skill that it tests, such as "colour".
        text: the question in English, `chinese` the same in Chinese.
        claim: the yes/no question whether an answer is true, with "{answer}" in its place.
        subject: the thing it is about.
        topic: what is asked for, as the noun of "Same or different: ...".
        answers: all possible answers.
        solve: the true ones for a scene; empty if the question does not fit the scene.
    """

    skill: str
    text: str
    chinese: str
    claim: str
    subject: str
    topic: str
    answers: tuple[str, ...]
    solve: Callable[[Scene], frozenset[str]]


def in_chinese(word: str) -> str:
    """Return an answer in Chinese; numbers stay."""
    return CHINESE.get(word, word)


def _at(place: str, kind: type[Object], read: Callable[[Object], str]) -> Callable[[Scene], frozenset[str]]:
    """Return a solver that reads the object at a place, if it is of this kind."""

    def solve(scene: Scene) -> frozenset[str]:
        thing = scene.by_place.get(place)
        return frozenset((read(thing),)) if isinstance(thing, kind) else NO_ANSWER

    return solve


def _of(is_meant: Callable[[Object], bool], read: Callable[[Object], str]) -> Callable[[Scene], frozenset[str]]:
    """Return a solver that reads the object that is meant, if there is exactly one."""

    def solve(scene: Scene) -> frozenset[str]:
        found = [thing for thing in scene.objects if is_meant(thing)]
        return frozenset((read(found[0]),)) if len(found) == 1 else NO_ANSWER

    return solve


def _is_shape(shape: str) -> Callable[[Object], bool]:
    return lambda thing: isinstance(thing, Shape) and thing.shape == shape


def colour_at(rng: random.Random) -> Query:
    place = rng.choice(PLACES)
    return Query(
        "colour",
        f"What colour is the thing at the {place}?",
        f"{CHINESE[place]}的东西是什么颜色？",
        f"Is the thing at the {place} {{answer}}?",
        f"the thing at the {place}",
        f"the colour at the {place}",
        tuple(COLOURS),
        _at(place, Shape, lambda thing: thing.colour),
    )


def shape_at(rng: random.Random) -> Query:
    place = rng.choice(PLACES)
    return Query(
        "shape",
        f"What shape is at the {place}?",
        f"{CHINESE[place]}是什么形状？",
        f"Is the thing at the {place} a {{answer}}?",
        f"the thing at the {place}",
        f"the shape at the {place}",
        SHAPES,
        _at(place, Shape, lambda thing: thing.shape),
    )


def digit_at(rng: random.Random) -> Query:
    place = rng.choice(PLACES)
    return Query(
        "digit",
        f"Which digit is at the {place}?",
        f"{CHINESE[place]}是哪个数字？",
        f"Is the digit at the {place} {{answer}}?",
        f"the digit at the {place}",
        f"the digit at the {place}",
        DIGITS,
        _at(place, Digit, lambda thing: str(thing.digit)),
    )


def colour_of(rng: random.Random) -> Query:
    shape = rng.choice(SHAPES)
    return Query(
        "colour",
        f"What colour is the {shape}?",
        f"{CHINESE[shape]}是什么颜色？",
        f"Is the {shape} {{answer}}?",
        f"the {shape}",
        f"the colour of the {shape}",
        tuple(COLOURS),
        _of(_is_shape(shape), lambda thing: thing.colour),
    )


def place_of_shape(rng: random.Random) -> Query:
    shape = rng.choice(SHAPES)
    return _place_query(f"the {shape}", CHINESE[shape], _is_shape(shape))


def place_of_digit(rng: random.Random) -> Query:
    digit = rng.randrange(10)
    return _place_query(f"the digit {digit}", f"数字{digit}", lambda thing: thing.name == f"digit {digit}")


def _place_query(name: str, chinese: str, is_meant: Callable[[Object], bool]) -> Query:
    return Query(
        "place",
        f"Where is {name}?",
        f"{chinese}在哪里？",
        f"Is {name} at the {{answer}}?",
        name,
        f"the place of {name}",
        PLACES,
        _of(is_meant, lambda thing: thing.place),
    )


def countable(rng: random.Random) -> tuple[str, str, tuple[str, ...], Callable[[Scene], int]]:
    """Return something to count: its plural in English and Chinese, the possible counts, and its count in a scene."""
    kind = rng.choice(("all", "shape", "shape", "colour", "colour"))
    if kind == "shape":
        shape = rng.choice(SHAPES)
        few = ("0", "1", "2", "3")
        return PLURALS[shape], CHINESE[shape], few, lambda scene: sum(thing.shape == shape for thing in scene.shapes)
    if kind == "colour":
        colour = rng.choice(tuple(COLOURS))
        name, chinese = f"{colour} things", f"{CHINESE[colour]}的东西"
        return name, chinese, ("0", "1", "2", "3"), lambda scene: sum(s.colour == colour for s in scene.shapes)
    whole, counts, read = rng.choice(
        (
            ("objects", ("3", "4", "5", "6"), lambda scene: len(scene.objects)),
            ("shapes", ("1", "2", "3", "4"), lambda scene: len(scene.shapes)),
            ("digits", ("1", "2", "3", "4"), lambda scene: len(scene.digits)),
        )
    )
    return whole, CHINESE[whole], counts, read


def count(rng: random.Random) -> Query:
    name, chinese, counts, read = countable(rng)
    return Query(
        "count",
        f"How many {name} are there?",
        f"有几个{chinese}？",
        f"Is the number of {name} {{answer}}?",
        f"the {name}",
        f"the number of {name}",
        counts,
        lambda scene: frozenset((str(read(scene)),)),
    )


def side(rng: random.Random) -> Query:
    """Two shapes in one row or one column."""
    first, second = rng.sample(SHAPES, 2)

    def solve(scene: Scene) -> frozenset[str]:
        places = [
            [PLACES.index(thing.place) for thing in scene.shapes if thing.shape == shape] for shape in (first, second)
        ]
        if [len(found) for found in places] != [1, 1]:
            return NO_ANSWER
        (row, column), (other_row, other_column) = (divmod(found[0], 3) for found in places)
        if row == other_row:
            return frozenset(("left" if column < other_column else "right",))
        if column == other_column:
            return frozenset(("above" if row < other_row else "below",))
        return NO_ANSWER

    return Query(
        "side",
        f"On which side of the {second} is the {first}?",
        f"{CHINESE[first]}在{CHINESE[second]}的哪一边？",
        f"Is the {first} on this side of the {second}: {{answer}}?",
        f"the {first}",
        f"the side of the {second} that the {first} is on",
        SIDES,
        solve,
    )


def presence(rng: random.Random) -> Query:
    """Which pair of colour and shape is in the picture; every pair that is there is a true answer."""
    return Query(
        "presence",
        "Which of these is in the picture?",
        "图中有哪一个？",
        "Is there a {answer}?",
        "the picture",
        "what is there",
        PAIRS,
        lambda scene: frozenset(thing.name for thing in scene.shapes),
    )


def digit_sum(rng: random.Random) -> Query:
    """The sum of the digits, of a picture with exactly two."""

    def solve(scene: Scene) -> frozenset[str]:
        if len(scene.digits) != 2:
            return NO_ANSWER
        return frozenset((str(sum(thing.digit for thing in scene.digits)),))

    return Query(
        "sum",
        "What do the digits add up to?",
        "数字的和是多少？",
        "Do the digits add up to {answer}?",
        "the digits",
        "the sum of the digits",
        tuple(str(number) for number in range(2, 17)),
        solve,
    )


FREE_QUERIES = (colour_at, shape_at, digit_at, colour_of, place_of_shape, place_of_digit, count, side, digit_sum)

CAPTION_REQUESTS = {False: "Describe the picture.", True: "请描述这张图片。"}


def caption(scene: Scene, chinese: bool = False) -> str:
    """Return everything in the picture in reading order."""
    if not chinese:
        return "; ".join(f"{thing.place}: {thing.name}" for thing in scene.objects)
    names = [CHINESE[thing.name] if isinstance(thing, Shape) else f"数字 {thing.digit}" for thing in scene.objects]
    return "; ".join(f"{CHINESE[thing.place]}: {name}" for thing, name in zip(scene.objects, names, strict=True))
