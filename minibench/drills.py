"""Drills: tables of short answers about one picture or two, for pretraining alone.

    Colours: -> star red, top left blue, ring red, ...        an entry: what is asked about, and the answer last

A question of MiniBench carries two or three tokens of reply in some thirty; a drill asks a dozen things in as many
tokens, each answer's key being given in the reply. What a large language model brings along (letters of options, sums,
rules, Chinese words) and what LLaVA's instruction data teach is practised in this form first; the questions then only
have to be worded.
"""

import random
from collections.abc import Callable, Sequence
from itertools import permutations, product

from .questions import DIGITS, PAIRS, PLURALS, in_chinese
from .scenes import COLOURS, PLACES, SHAPES, Digit, Object, Scene, Shape, companion
from .tasks import LETTERS, PROPERTIES, addition, difference, rule_for

Entry = tuple[str, ...]
Table = Callable[[Sequence[Scene], random.Random], tuple[str, list[Entry]]]

MAX_ENTRIES = 8
CHINESE_SHARE = 0.2
WHICH = ("first", "second")
FAMILIES = (tuple(COLOURS), SHAPES, PLACES, DIGITS, PAIRS, PROPERTIES, ("1", "2", "3", "4", "5"))
WORDS = tuple(dict.fromkeys(word for family in FAMILIES for word in family if " " not in word))


def drill(scenes: Sequence[Scene], rng: random.Random, num_tables: int) -> list[tuple[str, str]]:
    """Return requests and replies: at most `num_tables` different tables, none empty; without scenes about words."""
    tables = (NO_PICTURE, ONE_PICTURE, TWO_PICTURES)[len(scenes)]
    turns: list[tuple[str, str]] = []
    for table in dict.fromkeys(rng.sample(tables, len(tables))):
        request, entries = table(scenes, rng)
        if entries and len(turns) < num_tables:
            entries = rng.sample(entries, min(len(entries), MAX_ENTRIES))
            word = in_chinese if table not in NO_PICTURE and rng.random() < CHINESE_SHARE else str
            turns.append((request, ", ".join(" ".join(map(word, entry)) for entry in entries)))
    return turns


def word_for(thing: Object) -> str:
    return thing.shape if isinstance(thing, Shape) else str(thing.digit)


def alone(scene: Scene) -> dict[str, Object]:
    """Return the shapes and digits that are there once, by their word."""
    words = [word_for(thing) for thing in scene.objects]
    return {word: thing for word, thing in zip(words, scene.objects, strict=True) if words.count(word) == 1}


def count_of(word: str, scene: Scene) -> int:
    """Return how many there are of a colour, a plural of `PLURALS`, "objects", "shapes" or "digits"."""
    whole = {"objects": scene.objects, "shapes": scene.shapes, "digits": scene.digits}
    if word in whole:
        return len(whole[word])
    return sum(word in (thing.colour, PLURALS[thing.shape]) for thing in scene.shapes)


def side_of(place: str, other: str) -> str | None:
    """Return on which side of another place a place is, None if they share neither row nor column."""
    (row, column), (other_row, other_column) = (divmod(PLACES.index(one), 3) for one in (place, other))
    if row == other_row:
        return "left" if column < other_column else "right"
    return ("above" if row < other_row else "below") if column == other_column else None


def filled(entries: list[Entry], words: list[Entry], rng: random.Random) -> list[Entry]:
    """Return entries about the picture, filled up with some that say in words what is to be done with what is seen."""
    entries = rng.sample(entries, min(len(entries), MAX_ENTRIES))
    return entries + rng.sample(words, MAX_ENTRIES - len(entries))


FACING = [pair for pair in permutations(PLACES, 2) if side_of(*pair) is not None]
UNEQUAL = tuple(permutations(range(10), 2))
COUNTABLE = (*COLOURS, *PLURALS.values(), "objects", "shapes", "digits")


def colours(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    (scene,) = scenes
    entries = [(thing.place, thing.colour) for thing in scene.shapes]
    return "Colours:", entries + [(word, thing.colour) for word, thing in alone(scene).items() if word in SHAPES]


def things(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    (scene,) = scenes
    return "Things:", [(thing.place, word_for(thing)) for thing in scene.objects]


def places(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    (scene,) = scenes
    return "Where:", [(word, thing.place) for word, thing in alone(scene).items()]


def numbers(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    (scene,) = scenes
    there = [word for word in COUNTABLE if count_of(word, scene)]
    absent = [word for word in COUNTABLE if word not in there]
    return "How many:", [(word, str(count_of(word, scene))) for word in there + rng.sample(absent, 2)]


def sides(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    (scene,) = scenes
    things = permutations(alone(scene).items(), 2)
    entries = [
        (word, "and", other_word, side_of(one.place, other.place)) for (word, one), (other_word, other) in things
    ]
    entries = [entry for entry in entries if entry[-1] is not None]
    return "Which side:", filled(entries, [(one, "and", other, side_of(one, other)) for one, other in FACING], rng)


def presence(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    (scene,) = scenes
    there = dict.fromkeys(thing.name for thing in scene.shapes)
    near = [" ".join(companion(thing.colour, thing.shape)) for thing in scene.shapes]
    near += [f"{one.colour} {other.shape}" for one, other in permutations(scene.shapes, 2)]
    absent = [name for name in dict.fromkeys(near) if name not in there]
    absent = rng.sample(absent, min(len(absent), 2)) + [name for name in rng.sample(PAIRS, 3) if name not in there]
    return "Is there:", [(name, "yes") for name in there] + [(name, "no") for name in dict.fromkeys(absent)]


def claims(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    entries = []
    for table in (colours, things, places, numbers):
        _, facts = table(scenes, rng)
        for *key, value in rng.sample(facts, min(len(facts), 3)):
            family = next(family for family in (tuple(COLOURS), SHAPES, PLACES, DIGITS) if value in family)
            if rng.random() < 0.5:
                entries.append((*key, value, "yes"))
            else:
                entries.append((*key, rng.choice([other for other in family if other != value]), "no"))
    return "Is it so:", entries


def comparisons(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    (scene,) = scenes
    pairs = [(one, other) for one, other in permutations(scene.digits, 2) if one.digit != other.digit]
    entries = [
        (one.place, "and", other.place, "larger" if one.digit > other.digit else "smaller") for one, other in pairs
    ]
    digits = [thing.digit for thing in sorted(scene.digits, key=lambda thing: PLACES.index(thing.place) % 3)]
    columns = {PLACES.index(thing.place) % 3 for thing in scene.digits}
    if len(columns) == len(digits) > 1 and len(set(digits)) == len(digits):
        if digits in (sorted(digits), sorted(digits, reverse=True)):
            entries.append(("order", "up" if digits == sorted(digits) else "down"))
    numbers = [(str(one), "and", str(other), "larger" if one > other else "smaller") for one, other in UNEQUAL]
    return "Larger or smaller:", filled(entries, numbers, rng)


def sums(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    (scene,) = scenes
    pairs = permutations(scene.digits, 2)
    entries = [(one.place, "and", other.place, str(one.digit + other.digit)) for one, other in pairs]
    if len(scene.digits) == 2:
        entries.append(("digits", str(sum(thing.digit for thing in scene.digits))))
    numbers = [(str(one), "and", str(other), str(one + other)) for one, other in product(range(10), repeat=2)]
    return "Sums:", filled(entries, numbers, rng)


def more(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    (scene,) = scenes
    there = [word for word in COUNTABLE[:-3] if count_of(word, scene)] + ["shapes", "digits"]
    entries = []
    for one, other in permutations(there, 2):
        difference = count_of(one, scene) - count_of(other, scene)
        if difference:
            entries.append((one, other, "more" if difference > 0 else "fewer"))
    return "More or fewer:", entries


def machine(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    (scene,) = scenes
    step = rng.randint(1, 5)
    entries = [(thing.place, *addition(thing.digit, step).split()) for thing in scene.digits]
    return f"A machine adds {step}:", entries


def remainders(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    (scene,) = scenes
    there = sorted({thing.colour for thing in scene.shapes})
    number = len(scene.objects)
    return "Left without:", [(colour, *difference(number, count_of(colour, scene)).split()) for colour in there]


def rules(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    (scene,) = scenes
    by_colour = rng.random() < 0.5
    keys = rng.sample(tuple(COLOURS) if by_colour else SHAPES, 6)
    outcomes = dict(zip(keys, rng.sample(PROPERTIES, 6), strict=True))
    text = ", ".join(rule_for(key, outcomes[key]) for key in keys)

    def rule(key: str, thing: Shape) -> Entry:
        kind = thing.colour if by_colour else thing.shape
        return key, kind, outcomes[kind]

    entries = [rule(thing.place, thing) for thing in scene.shapes]
    if by_colour:
        entries += [rule(word, thing) for word, thing in alone(scene).items() if word in SHAPES]
    return f"Rules: {text}.", entries


def letters(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    """Options in the form that the questions have, to be named with their letters: no picture is needed."""
    chinese = rng.random() < 0.4
    options = rng.sample(rng.choice(FAMILIES), 4)
    entries = [(in_chinese(word) if chinese else word, letter) for word, letter in zip(options, LETTERS, strict=True)]
    return "Options: " + " ".join(" ".join(entry) for entry in entries), entries


def given(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    """Words that go with others, here alone."""
    keys = rng.sample(WORDS, rng.randint(4, MAX_ENTRIES))
    entries = [(key, rng.choice(WORDS)) for key in keys]
    return f"Given: {', '.join(map(' '.join, entries))}.", entries


def listed(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    words = rng.sample(WORDS, 2 * rng.randint(3, MAX_ENTRIES))
    there, absent = words[::2], words[1::2]
    entries = [(word, "yes") for word in there] + [(word, "no") for word in absent]
    return f"Listed: {', '.join(there)}.", entries


def of_each(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    entries = [
        (which, thing.place, thing.name if isinstance(thing, Shape) else word_for(thing))
        for which, scene in zip(WHICH, scenes, strict=True)
        for thing in scene.objects
    ]
    return "Things:", entries


def numbers_of_each(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    words = rng.sample([word for word in COUNTABLE if any(count_of(word, scene) for scene in scenes)], 4)
    return "How many:", [
        (which, word, str(count_of(word, scene))) for which, scene in zip(WHICH, scenes, strict=True) for word in words
    ]


def presence_in_each(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    names = sorted({thing.name for scene in scenes for thing in scene.objects})
    entries = []
    for which, scene in zip(WHICH, scenes, strict=True):
        there = {thing.name for thing in scene.objects}
        entries += [(which, name, "yes" if name in there else "no") for name in names]
    return "Is there:", entries


def same(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    one, other = scenes
    entries = []

    def compare(key: Entry, first: object, second: object) -> None:
        entries.append((*key, "same" if first == second else "different"))

    for place in PLACES:
        if place not in one.by_place or place not in other.by_place:
            continue
        first, second = one.by_place[place], other.by_place[place]
        if isinstance(first, Shape) and isinstance(second, Shape):
            compare(("colour", place), first.colour, second.colour)
            compare(("shape", place), first.shape, second.shape)
        elif isinstance(first, Digit) and isinstance(second, Digit):
            compare(("digit", place), first.digit, second.digit)
    for shape in SHAPES:
        if shape in alone(one) and shape in alone(other):
            compare(("colour", shape), alone(one)[shape].colour, alone(other)[shape].colour)
    for word in rng.sample([word for word in COUNTABLE if count_of(word, one) or count_of(word, other)], 4):
        compare(("number", word), count_of(word, one), count_of(word, other))
    return "Same or different:", entries


def which_has_more(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    entries = []
    for word in COUNTABLE:
        first, second = (count_of(word, scene) for scene in scenes)
        if first != second:
            entries.append((word, "first" if first > second else "second"))
    return "Which has more:", entries


def which_holds(scenes: Sequence[Scene], rng: random.Random) -> tuple[str, list[Entry]]:
    first, second = ({thing.name for thing in scene.objects} for scene in scenes)
    entries = [(name, "first") for name in first - second] + [(name, "second") for name in second - first]
    return "Which has it:", sorted(entries)


NO_PICTURE: tuple[Table, ...] = (letters, given, listed)
# What takes longest to learn comes more often.
ONE_PICTURE: tuple[Table, ...] = (
    colours,
    things,
    places,
    *[numbers] * 2,
    *[sides] * 3,
    *[presence] * 2,
    claims,
    *[comparisons] * 2,
    *[sums] * 3,
    more,
    machine,
    remainders,
    rules,
    letters,
)
TWO_PICTURES: tuple[Table, ...] = (
    of_each,
    numbers_of_each,
    presence_in_each,
    same,
    *[which_has_more] * 2,
    *[which_holds] * 2,
)
