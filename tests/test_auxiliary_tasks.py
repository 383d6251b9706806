"""auxiliary_tasks.py: every entry of every table, read back from its words by other means than it was made."""

import random
import re
from collections import Counter

import pytest

from dpvr.pretraining.auxiliary_tasks import NO_PICTURE, ONE_PICTURE, TWO_PICTURES, auxiliary_turns, balanced, fact
from dpvr.pretraining.rows import PretrainingRows
from minibench.data import MiniBench
from minibench.questions import CHINESE
from minibench.scenes import COLOURS, SHAPES, Scene, make_scene

PLACE = re.compile(r"^(top|bottom)?\s*(left|right)?$|^centre$")
ENGLISH = {chinese: english for english, chinese in CHINESE.items()}


def seen(scene: Scene) -> list[dict]:
    """The scene as plain facts."""
    facts = []
    for thing in scene.objects:
        looks = vars(thing)
        word = looks.get("shape") or str(looks["digit"])
        facts.append(
            {"place": thing.place, "at": at(thing.place), "word": word, "colour": looks.get("colour"), **looks}
        )
    return facts


def find(facts: list[dict], key: str) -> list[dict]:
    """What a key of one word or place means."""
    return [fact for fact in facts if key in (fact["place"], fact["word"])]


def at(place: str) -> tuple[int, int]:
    """The row and column of a place."""
    return (0 if "top" in place else 2 if "bottom" in place else 1), (
        0 if "left" in place else 2 if "right" in place else 1
    )


def digit(facts: list[dict], word: str) -> int:
    """A digit that is named, or that stands at a place."""
    return int(word) if word.isdigit() else find(facts, word)[0]["digit"]


def number(facts: list[dict], key: str) -> int:
    singular = {"crosses": "cross"}.get(key, key[:-1])
    if key == "objects":
        return len(facts)
    if key in ("shapes", "digits"):
        return sum((fact["colour"] is None) == (key == "digits") for fact in facts)
    return sum(fact["colour"] == key or fact["word"] == singular for fact in facts)


def split(text: str) -> list[str]:
    """Cut an entry into places and words."""
    return [word for word in re.findall(r"(?:top|bottom) (?:left|right)|\S+", text) if word != "and"]


def holds(request: str, entry: str, pictures: list[list[dict]]) -> bool:
    *key, value = split(entry)
    facts = pictures[0] if pictures else []
    if request.startswith("Given: "):
        return entry in re.split("Given: |, |[.]", request)
    if request.startswith("Listed: "):
        return (value == "yes") == (key[0] in re.split("Listed: |, |[.]", request))
    if request.startswith("Rules: "):
        (fact,) = find(facts, key[0])
        kind = key[1]
        return kind in (fact["colour"], fact["word"]) and f"{kind} {value}" in re.split("Rules: |, |[.]", request)
    if request.startswith("A machine adds"):
        (fact,) = find(facts, key[0])
        step = int(request.split()[3].rstrip(":"))
        return key[1:] == [str(fact["digit"]), "plus", str(step), "is"] and int(value) == fact["digit"] + step
    if request.startswith("Options"):
        return f" {entry} " in f"{re.sub('(?<=[A-C]) ', '  ', request.removeprefix('Options:'))} "
    if request == "Colours:":
        return [fact["colour"] for fact in find(facts, key[0])] == [value]
    if request == "Where:":
        return [fact["place"] for fact in find(facts, key[0])] == [value]
    if request == "Things:" and len(pictures) == 1:
        return [fact["word"] for fact in find(facts, key[0])] == [value]
    if request == "Things:":
        which, place, *looks = split(entry)
        (fact,) = find(pictures[which == "second"], place)
        return " ".join(looks) == (f"{fact['colour']} {fact['word']}" if fact["colour"] else fact["word"])
    if request == "How many:":
        *which, what = key
        return number(pictures[which == ["second"]], what) == int(value)
    if request == "Which side:":
        things, value = entry.rsplit(" ", 1)  # "top left and top left": the top left is on the left of the top
        one, other = (
            at(thing) if PLACE.match(thing) else find(facts, thing)[0]["at"] for thing in things.split(" and ")
        )
        down, right = (b - a for a, b in zip(other, one, strict=True))
        return {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}[value] == (
            (down > 0) - (down < 0),
            (right > 0) - (right < 0),
        )
    if request == "Is there:":
        *which, colour, word = key
        there = [[fact["colour"] or "digit", fact["word"]] for fact in pictures[which == ["second"]]]
        return (value == "yes") == ([colour, word] in there)
    if request == "Is it so:":
        known, claimed = key
        if claimed.isdigit() and not find(facts, known):
            return (value == "yes") == (number(facts, known) == int(claimed))
        (fact,) = find(facts, known)
        return (value == "yes") == (claimed in (fact["colour"], fact["word"], fact["place"]))
    if request == "Up or down:":
        digits = [fact["digit"] for fact in sorted(facts, key=lambda fact: fact["at"][1]) if not fact["colour"]]
        if key[0] == "in":
            assert key == ["in", "words", *map(str, digits)]
        elif key != ["digits"]:
            digits = list(map(int, key))
        return digits == sorted(set(digits), reverse=value == "down") and len(digits) > 1
    if request.startswith("Which is there: "):
        there = [f"{fact['colour']} {fact['word']}" for fact in facts if fact["colour"]]
        lists = dict(text.split(" ", 1) for text in request.removeprefix("Which is there: ").rstrip(".").split("; "))
        options = lists[key[0]].split(", ")
        return [option for option in options if option in there] == [" ".join([*key[1:], value])] and len(options) == 3
    if request == "Larger or smaller:":
        one, other = (digit(facts, word) for word in key)
        return one != other and (value == "larger") == (one > other)
    if request == "Sums:":
        words = [fact["place"] for fact in facts if fact["colour"] is None] if key == ["digits"] else key
        return int(value) == sum(digit(facts, word) for word in words)
    if request == "More or fewer:":
        difference = number(facts, key[0]) - number(facts, key[1])
        return difference != 0 and (value == "more") == (difference > 0)
    if request == "Left without:":
        taken = sum(fact["colour"] == key[0] for fact in facts)
        return key[1:] == [str(len(facts)), "minus", str(taken), "is"] and int(value) == len(facts) - taken
    if request == "Same or different:":
        kind, what = key
        if kind == "number":
            answers = [number(facts, what) for facts in pictures]
        else:
            answers = [find(facts, what)[0][kind] for facts in pictures]
        return (value == "same") == (answers[0] == answers[1])
    if request == "Which has more:":
        first, second = (number(facts, key[0]) for facts in pictures)
        return first != second and (value == "first") == (first > second)
    assert request == "Which has it:"
    held = [any([fact["colour"] or "digit", fact["word"]] == key for fact in facts) for facts in pictures]
    return held == [value == "first", value == "second"]


@pytest.mark.parametrize(("tables", "num_pictures"), [(NO_PICTURE, 0), (ONE_PICTURE, 1), (TWO_PICTURES, 2)])
def test_every_entry_of_every_table_is_true(tables, num_pictures):
    entries = Counter()
    for seed in range(300):
        scenes = [make_scene("train", seed, index) for index in range(num_pictures)]
        turns = auxiliary_turns(scenes, random.Random(seed), len(tables))
        assert len({turn.request for turn in turns}) == len(turns)
        assert 0 < len(turns) <= len(set(tables))
        for request, reply, _ in turns:
            kind = "letters" if request.startswith("Options") else re.sub("[:0-9].*", "", request)
            for entry in reply.split(", "):
                if kind != "letters":
                    for chinese in sorted(ENGLISH, key=len, reverse=True):
                        entry = entry.replace(chinese, ENGLISH[chinese])
                assert holds(request, entry, [seen(scene) for scene in scenes]), (request, entry, scenes)
                entries[kind] += 1
    assert len(entries) == len(set(tables)) and min(entries.values()) > 100, entries


def test_a_false_entry_is_told_from_a_true_one():
    facts = [seen(make_scene("train", 0, index)) for index in range(2)]
    shape = next(fact for fact in facts[0] if fact["colour"])
    others = {"Colours:": set(COLOURS) - {shape["colour"]}, "Things:": set(SHAPES) - {shape["word"]}}
    for request, wrong in others.items():
        assert not any(holds(request, f"{shape['place']} {word}", facts[:1]) for word in wrong)


def test_only_the_answers_carry_loss():
    scene = make_scene("train", 0, 0)
    loss_mask = Counter()
    for seed in range(200):
        for request, reply, flags in auxiliary_turns((scene,), random.Random(seed), 30):
            assert len(flags) == len(reply.split())
            kept = " ".join(word for word, is_loss_mask in zip(reply.split(), flags, strict=True) if is_loss_mask)
            if request.startswith("A machine adds 3:"):
                assert re.fullmatch(r"(\d plus 3 is \d+(, )?)+", kept)
            elif request == "Larger or smaller:":
                assert set(kept.replace(",", "").split()) <= {"larger", "smaller"}
            elif request == "Colours:" and kept.isascii():
                assert set(kept.replace(",", "").split()) <= set(COLOURS)
            elif request == "Up or down:":
                assert re.fullmatch(r"(((\d )*(up|down))(, )?)+", kept)
            else:
                continue
            loss_mask[request] += 1
    assert len(loss_mask) == 4, loss_mask


def test_even_entries_have_every_answer_as_often_as_there_are_entries():
    entries = [fact(str(number), "yes" if number < 3 else "no") for number in range(20)]
    answers = Counter(answer for _, (answer,) in balanced(entries, random.Random(0)))
    assert answers == {"yes": 3, "no": 5}
    assert len(set(balanced(entries, random.Random(0), 30))) == 20


def test_rows_hold_auxiliary_tasks_in_their_share_and_are_the_same_when_read_again():
    rows = PretrainingRows("train", 300, auxiliary_share=0.4, seed=3)
    again = PretrainingRows("train", 300, auxiliary_share=0.4, seed=3)
    texts = [[message["content"][-1]["text"] for message in rows[index]["messages"]] for index in range(300)]
    assert texts == [[message["content"][-1]["text"] for message in again[index]["messages"]] for index in range(300)]
    auxiliary = sum(bool(re.match(r".*:$|Rules: |Options: [^\n]*$", row[0])) for row in texts)
    assert 80 < auxiliary < 160


def test_half_of_the_text_only_rows_have_the_caption_of_the_scene_in_place_of_its_picture():
    text_rows, seen_rows = (
        PretrainingRows("train", 40, auxiliary_share=1.0, text_only_share=share, seed=6) for share in (1.0, 0.0)
    )
    captions = 0
    for index in range(40):
        row = text_rows[index]
        assert row["images"] == [] and len(seen_rows[index]["images"]) in (1, 2)
        text = row["messages"][0]["content"][0]["text"]
        facts = [line.split(": ") for line in text.split("\n")[0].split("; ")]
        if PLACE.match(facts[0][0]):
            captions += 1
            assert 3 <= len(facts) <= 6 and all(PLACE.match(place) for place, _ in facts)
        else:
            assert re.match("(Given|Listed|Options): ", text)
    assert 10 < captions < 30


def test_the_caption_share_sets_how_many_rows_ask_for_a_caption_and_without_shares_rows_are_minibenchs():
    def request(row: dict) -> str:
        return row["messages"][0]["content"][-1]["text"]

    def captions(share: float) -> int:
        requests = ("Describe the picture.", "请描述这张图片。")
        return sum(request(row) in requests for row in PretrainingRows("train", 200, 2, caption_share=share))

    assert captions(0.0) == 0 and captions(1.0) == 200 and 60 < captions(0.5) < 140
    assert [row["messages"] for row in PretrainingRows("train", 50)] == [
        row["messages"] for row in MiniBench("train", 50)
    ]
