"""Auxiliary tasks for pretraining: tables of short answers about one picture or two, or about words alone.

    Colours: -> star red, top left blue, ring red, ...        an entry: a key, and the answer last

A question of MiniBench has two or three reply tokens in some thirty; an auxiliary task has a dozen answers in as many
tokens, because the reply gives each answer's key. Which key comes next is random, so keys carry no loss: theirs would
be five sixths of the total. The skills that LLaVA gets from a large language model and from its instruction data
(letters of options, sums, rules, Chinese words) are practised in this form first; what is left to learn is how the
questions are worded.
"""

import random
from collections.abc import Callable, Sequence
from itertools import permutations, product
from typing import NamedTuple

from minibench.questions import DIGITS, PAIRS, PLURALS, in_chinese
from minibench.scenes import COLOURS, PLACES, SHAPES, Digit, Object, Scene, Shape, companion
from minibench.tasks import LETTERS, PROPERTIES, addition, difference, rule_for


class Entry(NamedTuple):
    """A key, which says what is asked about, and the answer, both as words and names."""

    key: tuple[str, ...]
    answer: tuple[str, ...]


class Turn(NamedTuple):
    """A request and its reply; `loss_mask` says of every word of the reply whether it carries loss."""

    request: str
    reply: str
    loss_mask: tuple[bool, ...]


Table = Callable[[Sequence[Scene], random.Random], tuple[str, list[Entry]]]

MAX_ENTRIES = 8
CHINESE_SHARE = 0.2
WHICH = ("first", "second")
FAMILIES = (tuple(COLOURS), SHAPES, PLACES, DIGITS, PAIRS, PROPERTIES, ("1", "2", "3", "4", "5"))
WORDS = tuple(dict.fromkeys(word for family in FAMILIES for word in family if " " not in word))


def auxiliary_turns(scenes: Sequence[Scene], rng: random.Random, num_tables: int) -> list[Turn]:
    """Return at most `num_tables` different tables, none empty: about the scenes, or without any about words."""
    tables = (NO_PICTURE, ONE_PICTURE, TWO_PICTURES)[len(scenes)]
    turns: list[Turn] = []
    for table in dict.fromkeys(rng.sample(tables, len(tables))):
        request, entries = table(scenes, rng)
        if entries and len(turns) < num_tables:
            word = in_chinese if table not in NO_PICTURE and rng.random() < CHINESE_SHARE else str
            turns.append(_turn(request, rng.sample(entries, min(len(entries), MAX_ENTRIES)), word))
    return turns


def _turn(request: str, entries: list[Entry], word: Callable[[str], str]) -> Turn:
    replies, loss_mask = [], []
    for entry in entries:
        texts = [" ".join(map(word, part)) for part in entry]
        replies.append(" ".join(texts))
        loss_mask += [is_answer for is_answer, text in enumerate(texts) for _ in text.split()]
    return Turn(request, ", ".join(replies), tuple(map(bool, loss_mask)))


def fact(*words: str) -> Entry:
    """Return an entry whose last word or name is the answer."""
    return Entry(words[:-1], words[-1:])


def balanced(entries: list[Entry], rng: random.Random, num: int = MAX_ENTRIES) -> list[Entry]:
    """Return at most `num` entries with answers as balanced as they can be: one of each answer in turn."""
    left: dict[tuple[str, ...], list[Entry]] = {}
    for entry in rng.sample(entries, len(entries)):
        left.setdefault(entry.answer, []).append(entry)
    chosen: list[Entry] = []
    while left and len(chosen) < num:
        for answer in rng.sample(list(left), len(left)):
            chosen.append(left[answer].pop())
            if not left[answer]:
                del left[answer]
    return chosen[:num]


def word_for(thing: Object) -> str:
    return thing.shape if isinstance(thing, Shape) else str(thing.digit)


def single_objects(scene: Scene) -> dict[str, Object]:
    """Return the shapes and digits that occur exactly once in a scene, by their word."""
    words = [word_for(thing) for thing in scene.objects]
    return {word: thing for word, thing in zip(words, scene.objects, strict=True) if words.count(word) == 1}


def count_of(word: str, scene: Scene) -> int:
    """Count the objects of a colour, of a plural in `PLURALS`, or all "objects", "shapes" or "digits"."""
    whole = {"objects": scene.objects, "shapes": scene.shapes, "digits": scene.digits}
    if word in whole:
        return len(whole[word])
    return sum(word in (thing.colour, PLURALS[thing.shape]) for thing in scene.shapes)


def side_of(place: str, other: str) -> str | None:
    """Return on which side of `other` a place lies, None if they share neither row nor column."""
    (row, column), (other_row, other_column) = (divmod(PLACES.index(one), 3) for one in (place, other))
    if row == other_row:
        return "left" if column < other_column else "right"
    return ("above" if row < other_row else "below") if column == other_column else None


def filled(entries: list[Entry], words: list[Entry], rng: random.Random) -> list[Entry]:
    """Return entries about the picture, filled up to `MAX_ENTRIES` with entries of the same task about words alone."""
    entries = rng.sample(entries, min(len(entries), MAX_ENTRIES))
    return entries + rng.sample(words, MAX_ENTRIES - len(entries))


FACING = [pair for pair in permutations(PLACES, 2) if side_of(*pair) is not None]
UNEQUAL = tuple(permutations(range(10), 2))
COUNTABLE = (*COLOURS, *PLURALS.values(), "objects", "shapes", "digits")


def colours(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    (scene,) = scenes
    entries = [fact(thing.place, thing.colour) for thing in scene.shapes]
    entries += [fact(word, thing.colour) for word, thing in single_objects(scene).items() if word in SHAPES]
    return "Colours:", entries


def things(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    (scene,) = scenes
    return "Things:", [fact(thing.place, word_for(thing)) for thing in scene.objects]


def places(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    (scene,) = scenes
    return "Where:", [fact(word, thing.place) for word, thing in single_objects(scene).items()]


def numbers(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    (scene,) = scenes
    return "How many:", balanced([fact(word, str(count_of(word, scene))) for word in COUNTABLE], rng)


def sides(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    (scene,) = scenes
    things = permutations(single_objects(scene).items(), 2)
    entries = [
        fact(word, "and", other_word, side)
        for (word, one), (other_word, other) in things
        if (side := side_of(one.place, other.place)) is not None
    ]
    return "Which side:", filled(entries, [fact(one, "and", other, side_of(one, other)) for one, other in FACING], rng)


def presence(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    (scene,) = scenes
    there = list(dict.fromkeys(thing.name for thing in scene.shapes))
    absent = similar_pairs(scene) + rng.sample(PAIRS, 3)
    entries = [fact(name, "yes") for name in there]
    entries += [fact(name, "no") for name in dict.fromkeys(absent) if name not in there]
    return "Is there:", balanced(entries, rng)


def similar_pairs(scene: Scene) -> list[str]:
    """Return hard negatives: absent pairs of a colour and a shape that are both present, and absent companions."""
    near = [" ".join(companion(thing.colour, thing.shape)) for thing in scene.shapes]
    near += [f"{one.colour} {other.shape}" for one, other in permutations(scene.shapes, 2)]
    there = {thing.name for thing in scene.shapes}
    return [name for name in dict.fromkeys(near) if name not in there]


def choice(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    """Several lists of three pairs, of each of which exactly one is in the picture."""
    (scene,) = scenes
    there = list(dict.fromkeys(thing.name for thing in scene.shapes))
    absent = similar_pairs(scene) + [name for name in rng.sample(PAIRS, 12) if name not in there]
    entries, lists = [], []
    for letter, name in zip(LETTERS, rng.sample(there, len(there)), strict=False):
        options = rng.sample([name, *rng.sample(list(dict.fromkeys(absent)), 2)], 3)
        lists.append(f"{letter} {', '.join(options)}")
        entries.append(fact(letter, name))
    return f"Which is there: {'; '.join(lists)}.", entries


def claims(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    entries = []
    for table in (colours, things, places, numbers):
        _, facts = table(scenes, rng)
        for key, (value,) in rng.sample(facts, min(len(facts), 4)):
            family = next(family for family in (tuple(COLOURS), SHAPES, PLACES, DIGITS) if value in family)
            if rng.random() < 0.5:
                entries.append(fact(*key, value, "yes"))
            else:
                entries.append(fact(*key, rng.choice([other for other in family if other != value]), "no"))
    return "Is it so:", entries


def comparisons(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    (scene,) = scenes
    pairs = [(one, other) for one, other in permutations(scene.digits, 2) if one.digit != other.digit]
    entries = [
        fact(one.place, "and", other.place, "larger" if one.digit > other.digit else "smaller") for one, other in pairs
    ]
    numbers = [fact(str(one), "and", str(other), "larger" if one > other else "smaller") for one, other in UNEQUAL]
    return "Larger or smaller:", filled(entries, numbers, rng)


def order(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    """Whether the digits go up from left to right, if no two share a column; the other entries are in words."""
    (scene,) = scenes
    lines = [tuple(rng.sample(range(10), rng.choice((2, 2, 3)))) for _ in range(40)]
    columns = [PLACES.index(thing.place) % 3 for thing in scene.digits]
    entries = []
    if len(set(columns)) == len(columns) > 1:
        digits = tuple(thing.digit for _, thing in sorted(zip(columns, scene.digits, strict=True)))
        if (way := direction_of(digits)) is not None:
            entries = [Entry(("digits",), (way,)), Entry(("in words",), (*map(str, digits), way))]
    words = [fact(*map(str, line), way) for line in lines if (way := direction_of(line)) is not None]
    return "Up or down:", entries + balanced(words, rng, 4)


def direction_of(digits: Sequence[int]) -> str | None:
    rising = tuple(sorted(set(digits)))
    return {rising: "up", rising[::-1]: "down"}.get(tuple(digits))


def sums(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    (scene,) = scenes
    pairs = permutations(scene.digits, 2)
    entries = [fact(one.place, "and", other.place, str(one.digit + other.digit)) for one, other in pairs]
    whole = [fact("digits", str(sum(thing.digit for thing in scene.digits)))] if len(scene.digits) == 2 else []
    numbers = [fact(str(one), "and", str(other), str(one + other)) for one, other in product(range(10), repeat=2)]
    return "Sums:", whole + filled(entries, numbers, rng)[len(whole) :]


def more(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    (scene,) = scenes
    there = [word for word in COUNTABLE[:-3] if count_of(word, scene)] + ["shapes", "digits"]
    entries = []
    for one, other in permutations(there, 2):
        difference = count_of(one, scene) - count_of(other, scene)
        if difference:
            entries.append(fact(one, other, "more" if difference > 0 else "fewer"))
    return "More or fewer:", entries


def machine(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    (scene,) = scenes
    step = rng.randint(1, 5)
    entries = [Entry((thing.place,), tuple(addition(thing.digit, step).split())) for thing in scene.digits]
    return f"A machine adds {step}:", entries


def remainders(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    (scene,) = scenes
    number = len(scene.objects)
    entries = [Entry((key,), tuple(difference(number, count_of(key, scene)).split())) for key in COLOURS]
    return "Left without:", balanced(entries, rng, 4)


def rules(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    (scene,) = scenes
    by_colour = rng.random() < 0.5
    keys = rng.sample(tuple(COLOURS) if by_colour else SHAPES, 6)
    outcomes = dict(zip(keys, rng.sample(PROPERTIES, 6), strict=True))
    text = ", ".join(rule_for(key, outcomes[key]) for key in keys)

    def rule(key: str, thing: Shape) -> Entry:
        kind = thing.colour if by_colour else thing.shape
        return Entry((key,), (kind, outcomes[kind]))

    entries = [rule(thing.place, thing) for thing in scene.shapes]
    if by_colour:
        entries += [rule(word, thing) for word, thing in single_objects(scene).items() if word in SHAPES]
    return f"Rules: {text}.", entries


def letters(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    """Options as in the questions, each to be named with its letter; needs no picture."""
    chinese = rng.random() < 0.4
    options = rng.sample(rng.choice(FAMILIES), 4)
    entries = [
        fact(in_chinese(word) if chinese else word, letter) for word, letter in zip(options, LETTERS, strict=True)
    ]
    return "Options: " + " ".join(" ".join(key + answer) for key, answer in entries), entries


def given(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    """Pairs of words given in the request, to be recalled."""
    keys = rng.sample(WORDS, rng.randint(4, MAX_ENTRIES))
    entries = [fact(key, rng.choice(WORDS)) for key in keys]
    return f"Given: {', '.join(' '.join(key + answer) for key, answer in entries)}.", entries


def listed(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    words = rng.sample(WORDS, 2 * rng.randint(3, MAX_ENTRIES))
    there, absent = words[::2], words[1::2]
    entries = [fact(word, "yes") for word in there] + [fact(word, "no") for word in absent]
    return f"Listed: {', '.join(there)}.", entries


def of_each(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    entries = [
        fact(which, thing.place, thing.name if isinstance(thing, Shape) else word_for(thing))
        for which, scene in zip(WHICH, scenes, strict=True)
        for thing in scene.objects
    ]
    return "Things:", entries


def numbers_of_each(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    entries = [
        fact(which, word, str(count_of(word, scene)))
        for which, scene in zip(WHICH, scenes, strict=True)
        for word in COUNTABLE
    ]
    return "How many:", balanced(entries, rng)


def presence_in_each(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    names = sorted({thing.name for scene in scenes for thing in scene.objects})
    entries = []
    for which, scene in zip(WHICH, scenes, strict=True):
        there = {thing.name for thing in scene.objects}
        entries += [fact(which, name, "yes" if name in there else "no") for name in names]
    return "Is there:", balanced(entries, rng)


def same(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    one, other = scenes
    entries = []

    def compare(first: object, second: object, *key: str) -> None:
        entries.append(fact(*key, "same" if first == second else "different"))

    for place in PLACES:
        if place not in one.by_place or place not in other.by_place:
            continue
        first, second = one.by_place[place], other.by_place[place]
        if isinstance(first, Shape) and isinstance(second, Shape):
            compare(first.colour, second.colour, "colour", place)
            compare(first.shape, second.shape, "shape", place)
        elif isinstance(first, Digit) and isinstance(second, Digit):
            compare(first.digit, second.digit, "digit", place)
    for shape in SHAPES:
        if shape in single_objects(one) and shape in single_objects(other):
            compare(single_objects(one)[shape].colour, single_objects(other)[shape].colour, "colour", shape)
    for word in COUNTABLE:
        if count_of(word, one) or count_of(word, other):
            compare(count_of(word, one), count_of(word, other), "number", word)
    return "Same or different:", balanced(entries, rng)


def which_has_more(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    entries = []
    for word in COUNTABLE:
        first, second = (count_of(word, scene) for scene in scenes)
        if first != second:
            entries.append(fact(word, "first" if first > second else "second"))
    return "Which has more:", balanced(entries, rng)


def which_holds(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    first, second = ({thing.name for thing in scene.objects} for scene in scenes)
    entries = [fact(name, "first") for name in first - second] + [fact(name, "second") for name in second - first]
    return "Which has it:", balanced(sorted(entries), rng)


NO_PICTURE: tuple[Table, ...] = (letters, given, listed)
# The tables that take longest to learn come more often.
ONE_PICTURE: tuple[Table, ...] = (
    colours,
    things,
    places,
    *[numbers] * 4,
    *[sides] * 2,
    presence,
    *[choice] * 3,
    *[claims] * 2,
    *[comparisons] * 2,
    *[order] * 2,
    *[sums] * 3,
    *[more] * 2,
    machine,
    *[remainders] * 2,
    rules,
    letters,
)
TWO_PICTURES: tuple[Table, ...] = (
    of_each,
    numbers_of_each,
    presence_in_each,
    *[same] * 3,
    *[which_has_more] * 2,
    *[which_holds] * 2,
)
