"""Questions about what was not fitted on, or is harder to read than that: where a plan could break.

    situation        levels
    long answers     everything in a picture of 3, 4, 5 or 6 objects, one fact after the other
    small digit      the digit in a corner, of 26 pixels, the least that is fitted on, down to 8
    crowded          a picture of 6 objects, the most that is fitted on, to 9: a colour, and how many there are
    dialogue         a question after none, one, three or five others about the same picture, which were answered right
    two pictures     at once, or the second with the question, after another question about the first
    other pictures   as drawn, and six things done to them

Of a level's questions the right answers are known. Levels of `small digit`, `dialogue`, `two pictures` and `other
pictures` ask the same questions, so that nothing else differs between them.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from dpvr.data.prompts import Conversation
from dpvr.inference.evaluation import Show, as_drawn, conversation
from minibench.data import make_items, swapped, to_messages
from minibench.questions import CAPTION_REQUESTS, caption, colour_at, count, digit_at
from minibench.scenes import SIDE, Scene, draw_scene

SPLIT = "test"
OBJECTS, CROWDED = (3, 4, 5, 6), (6, 7, 8, 9)  # in a picture
CORNERS = ("top left", "top right", "bottom left", "bottom right")
DIGIT_SIDES = (26, 20, 16, 12, 8)  # pixels, of 96
EARLIER = (0, 1, 3, 5)  # questions before the one that is scored
CAPTION_TOKENS, ANSWER_TOKENS = 80, 10
SINGLE = ("existence", "perception", "scene", "science")  # tasks of one picture whose questions stand alone
NOISE, BLUR = 30.0, 1.5  # a standard deviation, of 255, and a radius in pixels


class Asked(NamedTuple):
    """A question, how it is put, and the right reply: one fact, or several with semicolons between them."""

    make: Callable[[], Conversation]
    answer: str
    max_new_tokens: int = ANSWER_TOKENS


Sets = dict[str, dict[str, list[Asked]]]  # {situation: {level: questions}}
Drawing = Callable[[random.Random], Asked | None]  # None: the scene does not suit


def make_sets(limit: int, seed: int) -> Sets:
    """`limit` questions of each level, the same for the same seed."""

    def drawn(draw: Drawing, name: str) -> list[Asked]:
        rng, found = random.Random(f"limits/{name}/{seed}"), []
        while len(found) < limit:
            if (asked := draw(rng)) is not None:
                found.append(asked)
        return found

    return {
        "long answers": {f"{n} objects": drawn(partial(_everything, n), f"all {n}") for n in OBJECTS},
        "small digit": {f"{side} pixels": drawn(partial(_small_digit, side), "small") for side in DIGIT_SIDES},
        "crowded, colour": {f"{n} objects": drawn(partial(_colour, n), f"colour {n}") for n in CROWDED},
        "crowded, number": {f"{n} objects": drawn(partial(_number, n), f"number {n}") for n in CROWDED},
        "dialogue": {f"after {n}": drawn(partial(_last_turn, n), "dialogue") for n in EARLIER},
        "two pictures": {"at once": _pairs(limit, seed, _at_once), "in turn": _pairs(limit, seed, _in_turn)},
        "other pictures": {name: _shown(limit, seed, show) for name, show in OTHERS.items()},
    }


def facts_right(reply: str, answer: str) -> float:
    """F1 of the facts of a reply; of a single fact, whether it is right."""
    said, true = (text.split("; ") for text in (reply, answer))
    hits = sum(min(said.count(fact), true.count(fact)) for fact in set(true))
    return 2 * hits / (len(said) + len(true))


def _about(scene: Scene, text: str, before: list[tuple[str, str | None]] = ()) -> Callable[[], Conversation]:
    return lambda: Conversation(to_messages([*before, (text, None)]), [scene.draw()])


# -- one question of a level ----------------------------------------------------------------------------------------


def _everything(number: int, rng: random.Random) -> Asked:
    scene = draw_scene(SPLIT, rng, number)
    return Asked(_about(scene, CAPTION_REQUESTS[False]), caption(scene), CAPTION_TOKENS)


def _small_digit(side: int, rng: random.Random) -> Asked | None:
    scene = draw_scene(SPLIT, rng)
    digit = next((digit for digit in scene.digits if digit.place in CORNERS), None)
    if digit is None:
        return None
    margin = side // 2 + 2
    centre = tuple(margin if value < SIDE / 2 else SIDE - margin for value in digit.centre)
    small = replace(digit, size=side, centre=centre)
    changed = replace(scene, objects=tuple(small if thing is digit else thing for thing in scene.objects))
    return Asked(_about(changed, f"Which digit is at the {digit.place}?"), str(digit.digit))


def _colour(number: int, rng: random.Random) -> Asked:
    scene = draw_scene(SPLIT, rng, number)
    thing = rng.choice(scene.shapes)
    return Asked(_about(scene, f"What colour is the thing at the {thing.place}?"), thing.colour)


def _number(number: int, rng: random.Random) -> Asked:
    return Asked(_about(draw_scene(SPLIT, rng, number), "How many objects are there?"), str(number))


def _last_turn(earlier: int, rng: random.Random) -> Asked | None:
    """The questions are drawn before it is known how many are asked, so the last one is the same."""
    scene, turns = draw_scene(SPLIT, rng), {}
    for make in rng.choices((colour_at, digit_at, count), k=60):
        query = make(rng)
        for answer in query.solve(scene):
            turns[query.text] = answer
    (text, answer), *others = turns.items()
    return Asked(_about(scene, text, others[:earlier]), answer) if len(others) >= max(EARLIER) else None


def _at_once(scenes: tuple[Scene, Scene], text: str) -> Conversation:
    return Conversation(to_messages([(text, None)], 2), [scene.draw() for scene in scenes])


def _in_turn(scenes: tuple[Scene, Scene], text: str) -> Conversation:
    """The question comes with the second picture, after the colour of a shape in the first."""
    thing = scenes[0].shapes[0]
    messages = to_messages([(f"What colour is the thing at the {thing.place}?", thing.colour)])
    return Conversation([*messages, *to_messages([(text, None)])], [scene.draw() for scene in scenes])


def _pairs(limit: int, seed: int, put: Callable[[tuple[Scene, Scene], str], Conversation]) -> list[Asked]:
    items = make_items(SPLIT, limit, seed, ["multi_image"])
    return [Asked(partial(put, item.scenes, text), answer) for item in items for text, answer in item.questions]


def _shown(limit: int, seed: int, show: Show) -> list[Asked]:
    items = make_items(SPLIT, max(2, limit), seed, SINGLE)
    questions = [
        Asked(partial(conversation, item, text, show), answer) for item in items for text, answer in item.questions
    ]
    return random.Random(seed).sample(questions, limit)


# -- what is done to pictures ---------------------------------------------------------------------------------------


def noisy(picture: Image.Image) -> Image.Image:
    """Gaussian noise, the same for the same picture."""
    values = np.asarray(picture, dtype=np.float64)
    noise = np.random.default_rng(int(values.sum())).normal(0, NOISE, values.shape)
    return Image.fromarray((values + noise).clip(0, 255).astype(np.uint8))


OTHERS: dict[str, Show] = {
    "as drawn": as_drawn,
    "blurred": lambda picture: picture.filter(ImageFilter.GaussianBlur(BLUR)),
    "noisy": noisy,
    "turned by 20 degrees": lambda picture: picture.rotate(20, Image.Resampling.BICUBIC, fillcolor=(127, 127, 127)),
    "without colour": lambda picture: ImageOps.grayscale(picture).convert("RGB"),
    "negative": ImageOps.invert,
    "red and blue exchanged": swapped,
}
