"""A second reading of MiniBench's English questions, straight from their text, to check the answers by.

    text -> stem and options -> noun phrase ("the colour at the left") -> its value in the scene -> reply

It shares no code with minibench/questions.py and minibench/tasks.py. A question whose phrase has no value, or not just
one true option, is an error here.
"""

import re

from minibench.scenes import Digit, Object, Scene, Shape

COLOURS = "red|green|blue|yellow|purple|orange"
SHAPES = "circle|square|triangle|star|cross|ring"
PHRASES = (  # a question and the noun phrase it asks for
    (r"What colour is the thing at the (.+)\?", r"the colour at the \1"),
    (r"What shape is at the (.+)\?", r"the shape at the \1"),
    (r"Which digit is at the (.+)\?", r"the digit at the \1"),
    (r"What colour is the (\w+)\?", r"the colour of the \1"),
    (r"Where is (.+)\?", r"the place of \1"),
    (r"How many (.+) are there\?", r"the number of \1"),
    (r"On which side of the (\w+) is the (\w+)\?", r"the side of the \1 that the \2 is on"),
    (r"What do the digits add up to\?", "the sum of the digits"),
)
CLAIMS = (  # a yes/no question, the noun phrase it is about, and what it is said to be
    (rf"Is the thing at the (.+) ({COLOURS})\?", r"the colour at the \1", r"\2"),
    (rf"Is the thing at the (.+) a ({SHAPES})\?", r"the shape at the \1", r"\2"),
    (r"Is the digit at the (.+) (\d)\?", r"the digit at the \1", r"\2"),
    (rf"Is the ({SHAPES}) ({COLOURS})\?", r"the colour of the \1", r"\2"),
    (rf"Is (the (?:{SHAPES}|digit \d)) at the (.+)\?", r"the place of \1", r"\2"),
    (r"Is the number of (.+) (\d)\?", r"the number of \1", r"\2"),
    (r"Do the digits add up to (\d+)\?", "the sum of the digits", r"\1"),
)


def reply(text: str, *scenes: Scene) -> str:
    """The right reply to a question in English about one picture or two."""
    stem, options = stem_and_options(text)
    if len(scenes) == 2:
        return _compare(stem, *scenes)
    if reason := _science(stem, scenes[0]):
        return _only(f"{reason} {letter}" for letter, option in options.items() if option == reason.split()[-1])
    if stem == "Which of these is in the picture?":
        true = {thing.name for thing in scenes[0].shapes}
    else:
        true = {_ask(stem, scenes[0]) or _check(stem, scenes[0])}
    if not options:
        return _only(true)
    return _only(f"{option} {letter}" for letter, option in options.items() if option in true)


def stem_and_options(text: str) -> tuple[str, dict[str, str]]:
    """A question without its options, and these by their letters."""
    *head, stem = text.split("\n")
    entries = re.findall(r" (.+?) ([A-D])(?= |$)", head[0].removeprefix("Options:")) if head else []
    return stem, {letter: option for option, letter in entries}


def _only(found) -> str:
    (one,) = found
    return one


def _matching(scene: Scene, name: str) -> list[Object]:
    """The objects that a name in singular or plural, such as "crosses", "red things", "digit 3", is about."""
    kinds = {"objects": Object, "shapes": Shape, "digits": Digit}
    if name in kinds:
        return [thing for thing in scene.objects if isinstance(thing, kinds[name])]
    for word in (name, name.removesuffix("s"), name.removesuffix("es"), name.removesuffix(" things")):
        if word in SHAPES.split("|") or word in COLOURS.split("|"):
            return [thing for thing in scene.shapes if word in (thing.colour, thing.shape)]
    return [thing for thing in scene.objects if thing.name == name]


def _cell(place: str) -> tuple[int, int]:
    """Row and column of a place's name."""
    words = place.split()
    return ("bottom" in words) - ("top" in words), ("right" in words) - ("left" in words)


def value(phrase: str, scene: Scene) -> str:
    """What a noun phrase stands for in a scene."""
    if match := re.fullmatch(r"the (colour|shape|digit) at the (.+)", phrase):
        kind, place = match.groups()
        return str(_only(vars(thing)[kind] for thing in scene.objects if thing.place == place))
    if match := re.fullmatch(r"the colour of the (.+)", phrase):
        return _only(_matching(scene, match[1])).colour
    if match := re.fullmatch(r"the place of the (.+)", phrase):
        return _only(_matching(scene, match[1])).place
    if match := re.fullmatch(r"the number of (.+)", phrase):
        return str(len(_matching(scene, match[1])))
    if match := re.fullmatch(r"the side of the (\w+) that the (\w+) is on", phrase):
        (row, column), (other_row, other_column) = (_cell(_only(_matching(scene, n)).place) for n in match.group(2, 1))
        if row == other_row:
            return "left" if column < other_column else "right"
        assert column == other_column, phrase
        return "above" if row < other_row else "below"
    assert phrase == "the sum of the digits" and len(scene.digits) == 2, phrase
    return str(sum(thing.digit for thing in scene.digits))


def _ask(stem: str, scene: Scene) -> str | None:
    for pattern, phrase in PHRASES:
        if match := re.fullmatch(pattern, stem):
            return value(match.expand(phrase), scene)
    return None


def _check(stem: str, scene: Scene) -> str:
    """The reply to a yes/no question."""
    for pattern, phrase, said in CLAIMS:
        if match := re.fullmatch(pattern, stem):
            return "yes" if value(match.expand(phrase), scene) == match.expand(said) else "no"
    if match := re.fullmatch(r"Is there (a|an) (.+)\?", stem):
        assert (match[1] == "an") == (match[2][0] in "aeiou")
        return "yes" if _matching(scene, match[2]) else "no"
    if match := re.fullmatch(r"Is the (digit at the .+) (larger|smaller) than the (digit at the .+)\?", stem):
        more, (first, second) = match[2] == "larger", (int(value(f"the {match[n]}", scene)) for n in (1, 3))
    elif match := re.fullmatch(r"Are there (more|fewer) (.+) than (.+)\?", stem):
        more, (first, second) = match[1] == "more", (len(_matching(scene, match[n])) for n in (2, 3))
    else:
        match = re.fullmatch(r"From left to right, do the digits go (up|down)\?", stem)
        ordered = sorted(scene.digits, key=lambda thing: _cell(thing.place)[1])
        columns, digits = [_cell(thing.place)[1] for thing in ordered], [thing.digit for thing in ordered]
        assert len(set(columns)) == len(columns) > 1 and len(set(digits)) == len(digits)
        assert digits in (sorted(digits), sorted(digits)[::-1])
        more, first, second = match[1] == "up", digits[-1], digits[0]
    assert first != second, stem
    return "yes" if (first > second) == more else "no"


def _science(stem: str, scene: Scene) -> str | None:
    if match := re.fullmatch(r"Rules: (.+)\. How is (.+)\?", stem):
        rules = dict(rule.split() for rule in match[1].split(", "))
        place = match[2].removeprefix("the thing at the ")
        subject = [thing for thing in scene.objects if thing.place == place] or _matching(scene, match[2][4:])
        (thing,) = subject
        return _only(f"{name} {rules[name]}" for name in rules if thing in _matching(scene, name))
    if match := re.fullmatch(r"A machine adds (\d)\. The (digit at the .+) goes in\. What comes out\?", stem):
        digit = int(value(f"the {match[2]}", scene))
        return f"{digit} plus {match[1]} is {digit + int(match[1])}"
    if match := re.fullmatch(r"Of (\d) objects all (\w+ things) are taken away\. How many are left\?", stem):
        number, taken = len(scene.objects), len(_matching(scene, match[2]))
        assert number == int(match[1]), stem
        return f"{number} minus {taken} is {number - taken}"
    return None


def _compare(stem: str, *scenes: Scene) -> str:
    if match := re.fullmatch(r"Same or different: (.+)\?", stem):
        return "same" if len({value(match[1], scene) for scene in scenes}) == 1 else "different"
    match = re.fullmatch(r"Which picture has (?:more|the) (.+)\?", stem)
    first, second = (len(_matching(scene, match[1])) for scene in scenes)
    assert first != second and (" more " in stem or 0 in (first, second)), stem
    return "first" if first > second else "second"


# Chinese

WORDS = {
    "左上": "top left", "上方": "top", "右上": "top right", "左边": "left", "中间": "centre", "右边": "right",
    "左下": "bottom left", "下方": "bottom", "右下": "bottom right", "红色": "red", "绿色": "green", "蓝色": "blue",
    "黄色": "yellow", "紫色": "purple", "橙色": "orange", "圆形": "circle", "方形": "square", "三角形": "triangle",
    "星形": "star", "十字": "cross", "圆环": "ring",
}  # fmt: skip
COUNTED = {"东西": "objects", "形状": "shapes", "数字": "digits", "十字": "crosses"}
STEMS = (
    (r"图中有哪一个？", "Which of these is in the picture?", ()),
    (r"数字的和是多少？", "What do the digits add up to?", ()),
    (r"(.+)的东西是什么颜色？", "What colour is the thing at the {}?", (1,)),
    (r"(.+)是什么颜色？", "What colour is the {}?", (1,)),
    (r"(.+)是什么形状？", "What shape is at the {}?", (1,)),
    (r"(.+)是哪个数字？", "Which digit is at the {}?", (1,)),
    (r"数字(\d)在哪里？", "Where is the digit {}?", (1,)),
    (r"(.+)在哪里？", "Where is the {}?", (1,)),
    (r"(.+)在(.+)的哪一边？", "On which side of the {} is the {}?", (2, 1)),
)


def in_english(text: str) -> str:
    """A Chinese question or answer, word by word in English; English stays."""
    if text.isascii():
        return text
    if match := re.fullmatch(r"(\S+) ([ABCD])", text):
        return f"{_word(match[1])} {match[2]}"
    stem, options = stem_and_options(text)
    lettered = " ".join(f"{_word(word)} {letter}" for letter, word in options.items())
    return f"Options: {lettered}\n{_stem(stem)}" if options else _stem(stem)


def _stem(stem: str) -> str:
    if match := re.fullmatch(r"有几个(.+)？", stem):
        name = match[1]
        if name not in COUNTED:
            colour = name.removesuffix("的东西")
            name = f"{_word(name)}s" if colour == name else f"{_word(colour)} things"
        return f"How many {COUNTED.get(name, name)} are there?"
    for pattern, english, groups in STEMS:
        if match := re.fullmatch(pattern, stem):
            return english.format(*(_word(match[group]) for group in groups))
    return _word(stem)


def _word(word: str) -> str:
    """A place, a colour, a shape or a coloured shape; numbers stay."""
    if word in WORDS or word.isdigit():
        return WORDS.get(word, word)
    return f"{WORDS[word[:2]]} {WORDS[word[2:]]}"
