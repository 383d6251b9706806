"""Questions about a scene with one-word answers, and a caption of all of it.

    attribute   What colour is the thing at the top left?     -> red        (or its shape -> star)
    existence   Is there a red circle?                        -> yes / no
    digit       Which digit is at the centre?                 -> 7
    caption     Describe the picture.                         -> top left: red star; centre: digit 7

No answer can be had without the picture. Colours, shapes and digits are drawn uniformly and independently of the place
and of the wording. Existence is a coin thrown before the pair is chosen, and every pair is as likely to be asked with
yes as with no. Half of the absent pairs are adversarial: one half of the pair is in the picture.
"""

import random
from dataclasses import dataclass

from .scenes import COLOURS, SHAPES, Scene

KINDS = ("attribute", "existence", "digit")
CAPTION_REQUEST = "Describe the picture."
COLOUR_PHRASINGS = (
    "What colour is the shape at the {place}?",
    "Which colour does the thing at the {place} have?",
    "Name the colour at the {place}.",
)
SHAPE_PHRASINGS = (
    "What shape is at the {place}?",
    "Which shape does the thing at the {place} have?",
    "Name the shape at the {place}.",
)
DIGIT_PHRASINGS = (
    "Which digit is at the {place}?",
    "What digit is written at the {place}?",
    "Read the digit at the {place}.",
)
EXISTENCE_PHRASINGS = (
    "Is there {pair}?",
    "Is there {pair} in the picture?",
    "Does the picture show {pair}?",
    "Can you see {pair}?",
)


@dataclass(frozen=True)
class Question:
    """A question of a kind about a topic, and the one answer that counts as right."""

    kind: str
    topic: str
    text: str
    answer: str


def ask(scene: Scene, kind: str, rng: random.Random) -> Question:
    """Return one question of a kind in `KINDS`.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind == "attribute":
        return _ask_attribute(scene, rng)
    if kind == "existence":
        return _ask_existence(scene, rng)
    if kind == "digit":
        thing = rng.choice(scene.digits)
        text = rng.choice(DIGIT_PHRASINGS).format(place=thing.place)
        return Question(kind, f"digit at {thing.place}", text, str(thing.digit))
    raise ValueError(f"kind must be one of {KINDS}, got {kind!r}.")


def _ask_attribute(scene: Scene, rng: random.Random) -> Question:
    thing = rng.choice(scene.shapes)
    if rng.random() < 0.5:
        what, phrasings, answer = "colour", COLOUR_PHRASINGS, thing.colour
    else:
        what, phrasings, answer = "shape", SHAPE_PHRASINGS, thing.shape
    text = rng.choice(phrasings).format(place=thing.place)
    return Question("attribute", f"{what} at {thing.place}", text, answer)


def _ask_existence(scene: Scene, rng: random.Random) -> Question:
    present = {(thing.colour, thing.shape) for thing in scene.shapes}
    answer = rng.choice(("yes", "no"))
    if answer == "yes":
        colour, shape = rng.choice(sorted(present))
    else:
        colour, shape = rng.choice(_absent_pairs(present, adversarial=rng.random() < 0.5))
    article = "an" if colour[0] in "aeiou" else "a"
    text = rng.choice(EXISTENCE_PHRASINGS).format(pair=f"{article} {colour} {shape}")
    return Question("existence", text, text, answer)


def _absent_pairs(present: set[tuple[str, str]], adversarial: bool) -> list[tuple[str, str]]:
    absent = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in present]
    if not adversarial:
        return absent
    colours, shapes = {colour for colour, _ in present}, {shape for _, shape in present}
    return [(colour, shape) for colour, shape in absent if colour in colours or shape in shapes]


def ask_many(scene: Scene, count: int, rng: random.Random) -> list[Question]:
    """Return `count` questions on different topics in random order, the kinds in turn while they have one."""
    questions: dict[str, Question] = {}
    turn = 0
    while len(questions) < count:
        question = ask(scene, KINDS[turn % len(KINDS)], rng)
        questions.setdefault(question.topic, question)
        turn += 1
    shuffled = list(questions.values())
    rng.shuffle(shuffled)
    return shuffled


def caption(scene: Scene) -> str:
    """Return everything in the picture in reading order."""
    return "; ".join(f"{thing.place}: {thing.name}" for thing in scene.objects)
