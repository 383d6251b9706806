"""MiniBench's eight tasks, each a small counterpart of one of the paper's benchmarks.

    existence    POPE         yes/no, with random, popular and adversarial negatives
    perception   MME-P        pairs of a yes and a no question: colour, position, count, digit
    cognition    MME-C        the same: sums of digits, comparisons of digits and of counts, ordering
    choice_en    MMBench-EN   four options, in all four rotations (circular evaluation)
    choice_cn    MMBench-CN   the same questions in Chinese
    science      ScienceQA    a text and the picture together: rules to apply, a sum, a subtraction
    scene        SEED-Bench   counting, spatial relation, attribute, instance location
    multi_image  BLINK        two pictures: same or different, which has more, which one holds X

In a test the question is drafted first, then its outcome is drawn, and the picture last. So every outcome of a
question is equally likely, whatever its words, and without the picture no model does better than guessing.

The reply to a question with options is the option and its letter, "red D". In science the reply begins with the
reason, as in ScienceQA's solutions, and the reason must be right as well: "star hot D", "3 plus 4 is 7 A".

    draft(task, rng) -> Draft  --+-- test: draw an outcome, then scenes until one has it     make_item()
                                 +-- training: drafts until one fits the scene at hand       ask()
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from .questions import (
    FREE_QUERIES,
    PAIRS,
    PLURALS,
    Query,
    colour_at,
    colour_of,
    count,
    countable,
    digit_at,
    digit_sum,
    in_chinese,
    place_of_digit,
    place_of_shape,
    presence,
    shape_at,
    side,
)
from .scenes import COLOURS, PLACES, POPULAR, SHAPES, Digit, Scene, Split, companion, draw_scene

SKILLS = {
    "existence": ("random", "popular", "adversarial"),
    "perception": ("colour", "position", "count", "digit"),
    "cognition": ("sum", "larger", "more", "order"),
    "choice_en": ("colour", "shape", "digit", "place", "count", "presence"),
    "choice_cn": ("colour", "shape", "digit", "place", "count", "presence"),
    "science": ("rule", "machine", "remainder"),
    "scene": ("count", "side", "colour", "place"),
    "multi_image": ("same", "more", "holds"),
}
TASKS = tuple(SKILLS)
ONE_PICTURE = tuple(task for task in TASKS if task != "multi_image")
LETTERS = ("A", "B", "C", "D")
PROPERTIES = ("hot", "cold", "wet", "dry", "soft", "hard")
MAX_SCENES = 1_000_000  # drawn for one item; no question needs nearly as many
FREE_FORM_SHARE = 0.5


class Prompt(NamedTuple):
    """One wording of a draft, and the reply that is right for each outcome."""

    text: str
    replies: dict[str, str]


@dataclass(frozen=True)
class Draft:
    """A question whose picture is not drawn yet; all its prompts are scored together.

    Attributes:
        skill: one of `SKILLS[task]`.
        outcomes: the outcomes that are equally likely in a test.
        solve: the outcome for one scene (two for multi_image), None if the question does not fit.
        prompts: four rotations of the options, the two questions of a pair, or one.
        query: the free-form question that it comes down to, which training may ask before it.
    """

    skill: str
    outcomes: tuple[str, ...]
    solve: Callable[..., str | None]
    prompts: tuple[Prompt, ...]
    query: Query | None = None


class Item(NamedTuple):
    """One unit of a test: `questions` are pairs of a prompt and its right reply about the same pictures.

    `options` are all replies that each question could have, and `chance` the share that a guess among them gets right.
    """

    task: str
    skill: str
    chance: float
    scenes: tuple[Scene, ...]
    questions: tuple[tuple[str, str], ...]
    options: tuple[tuple[str, ...], ...]


class Question(NamedTuple):
    """A question about a given picture and its answer."""

    task: str
    text: str
    answer: str


def draft(task: str, skill: str, rng: random.Random) -> Draft:
    """Return a question of a task and one of its skills.

    Raises:
        ValueError: the task or the skill is unknown.
    """
    if task not in SKILLS:
        raise ValueError(f"MiniBench has no task named {task!r}: its tasks are {', '.join(TASKS)}.")
    if skill not in SKILLS[task]:
        raise ValueError(f"The task {task!r} has no skill {skill!r}: its skills are {', '.join(SKILLS[task])}.")
    if task == "existence":
        return _existence(skill, rng)
    if task in ("perception", "cognition"):
        return _pair(skill, rng)
    if task in ("choice_en", "choice_cn"):
        return _choice(skill, _query(skill, rng), rng, chinese=task == "choice_cn", rotations=4)
    if task == "science":
        return _science(skill, rng)
    if task == "scene":
        query = colour_of(rng) if skill == "colour" else _query(skill, rng)
        return _choice(skill, query, rng)
    return _comparison(skill, rng)


def _query(skill: str, rng: random.Random) -> Query:
    makers = {
        "colour": (colour_at, colour_of),
        "shape": (shape_at,),
        "digit": (digit_at,),
        "place": (place_of_shape, place_of_digit),
        "position": (place_of_shape, place_of_digit),
        "count": (count,),
        "presence": (presence,),
        "side": (side,),
        "sum": (digit_sum,),
    }
    return rng.choice(makers[skill])(rng)


def _existence(skill: str, rng: random.Random) -> Draft:
    """POPE: is an object there? Negatives are random pairs, popular pairs, or companions of what is there."""
    colour, shape = rng.choice(POPULAR) if skill == "popular" else rng.choice(PAIRS).split()

    def solve(scene: Scene) -> str | None:
        pairs = [(thing.colour, thing.shape) for thing in scene.shapes]
        if (colour, shape) in pairs:
            return "yes"
        if skill == "adversarial" and (colour, shape) not in [companion(*pair) for pair in pairs]:
            return None
        return "no"

    text = f"Is there {_with_article(f'{colour} {shape}')}?"
    return Draft(skill, ("yes", "no"), solve, (Prompt(text, {"yes": "yes", "no": "no"}),))


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _pair(skill: str, rng: random.Random) -> Draft:
    """MME: two yes/no questions about one picture; exactly one of them is answered yes."""
    query = None
    if skill in ("larger", "more", "order"):
        texts, first_is_true = {"larger": _larger, "more": _more, "order": _order}[skill](rng)
    else:
        query = _query(skill, rng)
        values = rng.sample(query.answers, 2)
        texts = [query.claim.format(answer=value) for value in values]

        def first_is_true(scene: Scene) -> bool | None:
            true = query.solve(scene)
            return None if (values[0] in true) == (values[1] in true) else values[0] in true

    if rng.random() < 0.5:
        texts, first_is_true = texts[::-1], _negated(first_is_true)

    def solve(scene: Scene) -> str | None:
        holds = first_is_true(scene)
        return None if holds is None else "first" if holds else "second"

    replies = ({"first": "yes", "second": "no"}, {"first": "no", "second": "yes"})
    return Draft(skill, ("first", "second"), solve, tuple(map(Prompt, texts, replies)), query)


def _negated(holds: Callable[[Scene], bool | None]) -> Callable[[Scene], bool | None]:
    def negation(scene: Scene) -> bool | None:
        value = holds(scene)
        return None if value is None else not value

    return negation


def _larger(rng: random.Random) -> tuple[list[str], Callable[[Scene], bool | None]]:
    first, second = rng.sample(PLACES, 2)

    def holds(scene: Scene) -> bool | None:
        things = [scene.by_place.get(place) for place in (first, second)]
        if not all(isinstance(thing, Digit) for thing in things) or things[0].digit == things[1].digit:
            return None
        return things[0].digit > things[1].digit

    texts = [f"Is the digit at the {first} {how} than the digit at the {second}?" for how in ("larger", "smaller")]
    return texts, holds


def _more(rng: random.Random) -> tuple[list[str], Callable[[Scene], bool | None]]:
    words = rng.choice((tuple(COLOURS), SHAPES, ("shapes", "digits")))
    first, second = rng.sample(words, 2)

    def number(word: str, scene: Scene) -> int:
        if word in ("shapes", "digits"):
            return len(scene.shapes if word == "shapes" else scene.digits)
        return sum(word in (thing.colour, thing.shape) for thing in scene.shapes)

    def holds(scene: Scene) -> bool | None:
        counts = number(first, scene), number(second, scene)
        return None if counts[0] == counts[1] else counts[0] > counts[1]

    names = [f"{word} things" if word in COLOURS else PLURALS.get(word, word) for word in (first, second)]
    return [f"Are there {how} {names[0]} than {names[1]}?" for how in ("more", "fewer")], holds


def _order(rng: random.Random) -> tuple[list[str], Callable[[Scene], bool | None]]:
    def holds(scene: Scene) -> bool | None:
        columns = [PLACES.index(thing.place) % 3 for thing in scene.digits]
        if len(columns) < 2 or len(set(columns)) < len(columns):
            return None
        digits = [thing.digit for _, thing in sorted(zip(columns, scene.digits, strict=True))]
        steps = {(after > before) - (after < before) for before, after in zip(digits, digits[1:], strict=False)}
        return None if len(steps) > 1 or 0 in steps else steps == {1}

    return [f"From left to right, do the digits go {way}?" for way in ("up", "down")], holds


def _choice(
    skill: str, query: Query, rng: random.Random, num: int = 4, chinese: bool = False, rotations: int = 1
) -> Draft:
    """A query with options of which exactly one is true; MMBench asks it once per rotation of the options."""
    options = tuple(rng.sample(query.answers, num))

    def solve(scene: Scene) -> str | None:
        true = [option for option in options if option in query.solve(scene)]
        return true[0] if len(true) == 1 else None

    text = query.chinese if chinese else query.text
    prompts = tuple(_with_options(text, options[turn:] + options[:turn], chinese) for turn in range(rotations))
    return Draft(skill, options, solve, prompts)


def _with_options(
    text: str, options: tuple[str, ...], chinese: bool = False, reasons: dict[str, str] | None = None
) -> Prompt:
    """Write the options before the question, so that the prompt ends like that of the same question without options.

    The letter follows its option, in the prompt as in the reply, so a model can name it by continuing a pattern that
    it has read. In the reply a reason replaces the option, which is its last word.
    """
    words = [in_chinese(option) if chinese else option for option in options]
    listed = " ".join(f"{word} {letter}" for letter, word in zip(LETTERS, words, strict=False))
    if reasons is not None:
        words = [reasons[option] for option in options]
    replies = [f"{word} {letter}" for letter, word in zip(LETTERS, words, strict=False)]
    return Prompt(f"Options: {listed}\n{text}", dict(zip(options, replies, strict=True)))


def rule_for(kind: str, outcome: str) -> str:
    """Return the rule that gives a shape or a colour its property."""
    return f"{kind} {outcome}"


def addition(number: int, step: int) -> str:
    return f"{number} plus {step} is {number + step}"


def difference(number: int, taken: int) -> str:
    return f"{number} minus {taken} is {number - taken}"


def _science(skill: str, rng: random.Random) -> Draft:
    """ScienceQA: the answer needs a fact from the text and one from the picture."""
    if skill == "rule":
        return _rule(rng)
    if skill == "machine":
        return _machine(rng)
    colour = rng.choice(tuple(COLOURS))
    number = rng.randint(4, 6)
    options = tuple(rng.sample([str(number - taken) for taken in range(4)], 4))

    def solve(scene: Scene) -> str | None:
        taken = sum(thing.colour == colour for thing in scene.shapes)
        return str(number - taken) if len(scene.objects) == number and taken < 4 else None

    reasons = {left: difference(number, number - int(left)) for left in options}
    text = f"Of {number} objects all {colour} things are taken away. How many are left?"
    return Draft(skill, options, solve, (_with_options(text, options, reasons=reasons),))


def _rule(rng: random.Random) -> Draft:
    """Three rules in the text: which one applies to the object in the picture?"""
    query = rng.choice((colour_at, colour_of, shape_at))(rng)
    keys = rng.sample(query.answers, 3)
    rules = dict(zip(keys, rng.sample(PROPERTIES, 3), strict=True))
    options = tuple(rng.sample(tuple(rules.values()), 3))

    def solve(scene: Scene) -> str | None:
        return next((rules[value] for value in query.solve(scene) if value in rules), None)

    reasons = {outcome: rule_for(key, outcome) for key, outcome in rules.items()}
    text = f"Rules: {', '.join(reasons.values())}. How is {query.subject}?"
    return Draft("rule", options, solve, (_with_options(text, options, reasons=reasons),), query)


def _machine(rng: random.Random) -> Draft:
    query, step = digit_at(rng), rng.randint(1, 5)
    options = tuple(str(int(digit) + step) for digit in rng.sample(query.answers, 4))

    def solve(scene: Scene) -> str | None:
        return next((out for digit in query.solve(scene) if (out := str(int(digit) + step)) in options), None)

    reasons = {option: addition(int(option) - step, step) for option in options}
    text = f"A machine adds {step}. {query.subject.capitalize()} goes in. What comes out?"
    return Draft("machine", options, solve, (_with_options(text, options, reasons=reasons),), query)


def _comparison(skill: str, rng: random.Random) -> Draft:
    """BLINK: two pictures."""
    if skill == "same":
        query = rng.choice((colour_at, colour_of, shape_at, digit_at, count))(rng)

        def solve(one: Scene, other: Scene) -> str | None:
            answers = query.solve(one), query.solve(other)
            return None if not all(answers) else "same" if answers[0] == answers[1] else "different"

        return _words(skill, ("same", "different"), solve, f"Same or different: {query.topic}?")
    if skill == "more":
        name, _, _, read = countable(rng)

        def solve(one: Scene, other: Scene) -> str | None:
            counts = read(one), read(other)
            return None if counts[0] == counts[1] else "first" if counts[0] > counts[1] else "second"

        return _words(skill, ("first", "second"), solve, f"Which picture has more {name}?")
    name = rng.choice(PAIRS) if rng.random() < 0.6 else f"digit {rng.randrange(10)}"

    def solve(one: Scene, other: Scene) -> str | None:
        held = [name in [thing.name for thing in scene.objects] for scene in (one, other)]
        return None if held[0] == held[1] else "first" if held[0] else "second"

    return _words(skill, ("first", "second"), solve, f"Which picture has the {name}?")


def _words(skill: str, outcomes: tuple[str, str], solve: Callable[[Scene, Scene], str | None], text: str) -> Draft:
    return Draft(skill, outcomes, solve, (Prompt(text, {outcome: outcome for outcome in outcomes}),))


@lru_cache(maxsize=4096)  # one test of 500 questions a task, asked of every cell of a grid
def make_item(task: str, split: Split, seed: int, index: int) -> Item:
    """Return test item `index` of a task: draft a question, draw its outcome, then draw scenes until one has it.

    The two choice tasks share their random numbers, and so their questions and pictures.
    """
    rng = random.Random(f"items/{split}/{seed}/{task.removesuffix('_cn').removesuffix('_en')}/{index}")
    skill = SKILLS[task][index % len(SKILLS[task])]
    question = draft(task, skill, rng)
    outcome = rng.choice(question.outcomes)
    for _ in range(MAX_SCENES):
        scenes = tuple(draw_scene(split, rng) for _ in range(2 if task == "multi_image" else 1))
        if question.solve(*scenes) == outcome:
            texts = tuple((prompt.text, prompt.replies[outcome]) for prompt in question.prompts)
            options = tuple(tuple(prompt.replies.values()) for prompt in question.prompts)
            return Item(task, skill, 1 / len(question.outcomes), scenes, texts, options)
    raise RuntimeError(f"None of {MAX_SCENES:,} scenes answers {question.prompts[0].text!r} with {outcome!r}.")


def ask(task: str, scenes: tuple[Scene, ...], rng: random.Random) -> list[Question]:
    """Return a training question of a task that fits the given scenes, or nothing if none was found.

    Half of the yes/no and science questions with a `Draft.query` come after that query as a free-form question: "What
    colour is the star? red", then "Is the star blue? no". So the model learns to see first, and then to reason on what
    it has seen. The task "free" is a free-form question alone.

    Outcomes are as balanced as the scenes allow: one is drawn first, and questions are drafted until one has it.
    """
    if task == "free":
        return _free_form_question(scenes, rng)
    for skill in rng.sample(SKILLS[task], len(SKILLS[task])):
        found = _ask(task, skill, scenes, rng)
        if found is not None:
            return _free_form_before(found[0], scenes, rng) + [found[1]]
    return []


def _ask(
    task: str, skill: str, scenes: tuple[Scene, ...], rng: random.Random, tries: int = 40
) -> tuple[Draft, Question] | None:
    aim, spare = rng.random(), None
    for _ in range(tries):
        question = draft(task, skill, rng)
        outcome = question.solve(*scenes)
        if outcome is None:
            continue
        prompt = rng.choice(question.prompts)
        found = question, Question(task, prompt.text, prompt.replies[outcome])
        if outcome == sorted(question.outcomes)[int(aim * len(question.outcomes))]:
            return found
        spare = spare or found
    return spare


def _free_form_before(question: Draft, scenes: tuple[Scene, ...], rng: random.Random) -> list[Question]:
    if question.query is None or rng.random() >= FREE_FORM_SHARE:
        return []
    return [Question("free", question.query.text, answer) for answer in question.query.solve(*scenes)]


def _free_form_question(scenes: tuple[Scene, ...], rng: random.Random, tries: int = 20) -> list[Question]:
    for _ in range(tries):
        query = rng.choice(FREE_QUERIES)(rng)
        for answer in query.solve(*scenes):
            if answer != "0" or rng.random() < 0.3:  # most things are not there
                return [Question("free", query.text, answer)]
    return []
