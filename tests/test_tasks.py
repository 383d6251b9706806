"""minibench/tasks.py and questions.py: the answers are right, the wording does not give them away."""

import random
import re
from collections import Counter, defaultdict
from functools import cache

import numpy as np
import pytest
from lines import ONCE
from reference_answers import in_english, reply, stem_and_options

from minibench.data import MiniBench
from minibench.questions import caption
from minibench.scenes import POPULAR, Scene, companion, make_scene
from minibench.scoring import constant_replies
from minibench.tasks import ONE_PICTURE, SKILLS, TASKS, Item, ask, draft, make_item

pytestmark = ONCE

NUM_ITEMS = {0: 1500, 1: 3000}  # by seed
NUM_ROWS = 1500
PAIRED, CIRCULAR = ("perception", "cognition"), ("choice_en", "choice_cn")
WORDED = tuple(task for task in TASKS if task != "choice_cn")


CHOICES = {
    "colour": "^What colour",
    "shape": "^What shape",
    "digit": "^Which digit",
    "place": "^Where",
    "count": "^How many",
    "presence": "^Which of these",
}
SIGNS = {  # by which a skill's questions are known; those of existence differ in their pictures alone
    "perception": {
        "colour": r"(red|green|blue|yellow|purple|orange)\?$",
        "position": r"at the (top|bottom|left|right|centre|top left|top right|bottom left|bottom right)\?$",
        "count": "^Is the number of",
        "digit": r"^Is the digit at the .* \d\?$",
    },
    "cognition": {"sum": "add up to", "larger": "larger|smaller", "more": "more|fewer", "order": "From left to right"},
    "choice_en": CHOICES,
    "choice_cn": CHOICES,
    "science": {"rule": "^Rules", "machine": "^A machine", "remainder": "taken away"},
    "scene": {"count": "^How many", "side": "^On which side", "colour": "^What colour", "place": "^Where"},
    "multi_image": {"same": "^Same or different", "more": "has more", "holds": "has the"},
}


def skills_of(task: str, text: str) -> list[str]:
    stem, _ = stem_and_options(in_english(text))
    return [skill for skill, sign in SIGNS[task].items() if re.search(sign, stem)]


@cache
def items_of(task: str, seed: int = 0) -> list[Item]:
    return [make_item(task, "test", seed, index) for index in range(NUM_ITEMS[seed])]


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_scene("train", 0, index) for index in range(400)]


def is_chinese(text: str) -> bool:
    return not text.isascii()


# Answers


@pytest.mark.parametrize("task", WORDED)
def test_the_answers_of_a_test_item_are_those_of_a_second_reading_of_its_text(task):
    for item in items_of(task):
        assert [answer for _, answer in item.questions] == [reply(text, *item.scenes) for text, _ in item.questions]


def test_the_chinese_items_are_the_english_ones_translated():
    for english, chinese in zip(items_of("choice_en"), items_of("choice_cn"), strict=True):
        assert (english.scenes, english.skill, english.chance) == (chinese.scenes, chinese.skill, chinese.chance)
        assert [tuple(map(in_english, question)) for question in chinese.questions] == list(english.questions)
        assert all(is_chinese(text) for text, _ in chinese.questions)


@pytest.mark.parametrize("task", [*TASKS, "free"])
def test_the_answer_to_a_training_question_is_that_of_a_second_reading_of_its_text(task, scenes):
    rng, asked = random.Random(0), 0
    for one, other in zip(scenes, scenes[1:], strict=False):
        pictures = (one, other) if task == "multi_image" else (one,)
        questions = ask(task, pictures, rng)
        asked += bool(questions)
        for question in questions:
            assert question.task in (task, "free") and is_chinese(question.text) == (task == "choice_cn")
            assert in_english(question.answer) == reply(in_english(question.text), *pictures)
    assert asked > 0.98 * (len(scenes) - 1)


def test_a_free_question_is_one_of_all_skills_in_words(scenes):
    rng = random.Random(0)
    asked = [question for scene in scenes for question in ask("free", (scene,), rng)]
    assert len(asked) > 0.98 * len(scenes)
    assert len({question.text.split()[0] for question in asked}) == 5  # what, where, which, how many, on
    zeros = sum(question.answer == "0" for question in asked)
    assert 0 < zeros < 0.1 * len(asked)


def test_some_science_and_yes_no_questions_come_after_the_answer_they_come_down_to(scenes):
    for task in ("perception", "science"):
        asked = [ask(task, (scene,), random.Random(index)) for index, scene in enumerate(scenes)]
        pairs = [questions for questions in asked if len(questions) == 2]
        assert {len(questions) for questions in asked} == {1, 2} and 0.2 < len(pairs) / len(asked) < 0.6
        assert all(freely.task == "free" and question.task == task for freely, question in pairs)


@pytest.mark.parametrize("chinese", [False, True])
def test_the_caption_names_every_object_at_its_place(chinese, scenes):
    for scene in scenes:
        parts = dict(part.split(": ") for part in caption(scene, chinese).split("; "))
        if chinese:
            parts = {in_english(place): in_english(name.replace("数字", "digit")) for place, name in parts.items()}
        assert parts == {thing.place: thing.name for thing in scene.objects}


# What the tasks are made of


def test_every_skill_of_every_task_comes_up_equally_often():
    for task, skills in SKILLS.items():
        counts = Counter(item.skill for item in items_of(task))
        assert set(counts) == set(skills) and max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("task", SIGNS)
def test_every_skill_asks_its_own_questions_in_tests_and_in_training(task, scenes):
    assert list(SIGNS[task]) == list(SKILLS[task])
    for item in items_of(task):
        for text, _ in item.questions:
            assert skills_of(task, text) == [item.skill]
    rng = random.Random(0)
    for skill in SKILLS[task]:
        assert {tuple(skills_of(task, draft(task, skill, rng).prompts[0].text)) for _ in range(50)} == {(skill,)}
    pictures = [pair if task == "multi_image" else pair[:1] for pair in zip(scenes, scenes[1:], strict=False)]
    asked = [questions[-1] for pair in pictures if (questions := ask(task, pair, rng))]
    assert {skill for question in asked for skill in skills_of(task, question.text)} == set(SKILLS[task])


def test_an_item_of_multi_image_has_two_pictures_and_any_other_one():
    for task in TASKS:
        assert {len(item.scenes) for item in items_of(task)} == {1 if task in ONE_PICTURE else 2}


def test_a_pair_has_one_yes_and_one_no():
    for task in PAIRED:
        assert all(sorted(answer for _, answer in item.questions) == ["no", "yes"] for item in items_of(task))


def test_a_circular_question_comes_in_all_rotations_of_its_options_and_the_right_letter_moves_along():
    for item in items_of("choice_en") + items_of("choice_cn"):
        stems, rotations = zip(*(stem_and_options(text) for text, _ in item.questions), strict=True)
        rotations = [list(rotation.values()) for rotation in rotations]
        options = rotations[0]
        assert len(set(options)) == 4 and len(set(stems)) == 1
        assert rotations == [options[turn:] + options[:turn] for turn in range(4)]
        answers = [answer.split() for _, answer in item.questions]
        assert {letter for *_, letter in answers} == set("ABCD")
        assert len({" ".join(option) for *option, _ in answers}) == 1
        for rotation, (*option, letter) in zip(rotations, answers, strict=True):
            assert rotation["ABCD".index(letter)] == " ".join(option)


def test_popular_negatives_are_popular_and_adversarial_ones_the_company_of_what_is_there():
    asked = defaultdict(set)
    for item in items_of("existence"):
        ((text, answer),) = item.questions
        pair = tuple(text.removesuffix("?").split()[-2:])
        asked[item.skill].add(pair)
        present = {(thing.colour, thing.shape) for thing in item.scenes[0].shapes}
        if item.skill == "adversarial" and answer == "no":
            assert pair not in present and pair in {companion(*other) for other in present}
    assert asked["popular"] == set(POPULAR)
    assert len(asked["random"]) == len(asked["adversarial"]) == 36


@pytest.mark.parametrize(
    ("task", "skill", "message"),
    [
        ("existence", "sum", "'existence' has no skill 'sum': its skills are random, popular, adversarial"),
        ("captions", "random", "no task named 'captions': its tasks are existence, perception,"),
    ],
)
def test_an_unknown_task_or_skill_is_refused(task, skill, message):
    with pytest.raises(ValueError, match=message):
        draft(task, skill, random.Random(0))


# No shortcuts


def chance(items: list[Item]) -> float:
    return float(np.mean([item.chance for item in items for _ in item.questions]))


def questions_of(items: list[Item]) -> list[tuple[str, str]]:
    return [question for item in items for question in item.questions]


class Majority:
    """Replies without the pictures: the majority reply to the same text, else the option that is most often right
    for the same stem, else the majority word or letter of all questions of the task."""

    def __init__(self, questions: list[tuple[str, str]]) -> None:
        self.texts, self.options, self.last_words = defaultdict(Counter), defaultdict(Counter), Counter()
        for text, answer in questions:
            stem, options = stem_and_options(text)
            self.texts[text][answer] += 1
            self.options[stem][options.get(answer[-1], answer)] += 1
            self.last_words[answer.split()[-1]] += 1

    def __call__(self, text: str) -> str:
        stem, options = stem_and_options(text)
        if text in self.texts:
            return self.texts[text].most_common(1)[0][0]
        if options:
            known = self.options[stem] if stem in self.options else {}
            letter = max(options, key=lambda letter: (known.get(options[letter], 0), self.last_words[letter]))
            return f"{options[letter]} {letter}"
        return self.last_words.most_common(1)[0][0]

    def hits(self, items: list[Item]) -> list[bool]:
        """Whether the letter or the word is right; a reason before it is not asked for."""
        return [self(text).split()[-1] == answer.split()[-1] for text, answer in questions_of(items)]


@pytest.mark.parametrize("task", TASKS)
def test_the_best_constant_reply_is_at_chance(task):
    result = constant_replies(items_of(task))["details"][task]
    assert abs(result["accuracy"] - chance(items_of(task))) < 0.03
    assert result["score"] <= chance(items_of(task)) + 0.03


@pytest.mark.parametrize("task", WORDED)
def test_what_other_items_teach_about_the_words_is_worth_no_more_than_chance(task):
    folds = [(items_of(task, 1), items_of(task)), (items_of(task), items_of(task, 1))]
    hits = [hit for known, new in folds for hit in Majority(questions_of(known)).hits(new)]
    assert abs(np.mean(hits) - chance(items_of(task))) < 0.03


@pytest.fixture(scope="module")
def training_questions() -> dict[bool, list[tuple[str, str]]]:
    """The questions of training rows with their answers, by whether they are about two pictures."""
    found = defaultdict(list)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scene, "draw", lambda scene: None)  # only the text is read
        for row in MiniBench("train", NUM_ROWS):
            texts = [message["content"][-1]["text"] for message in row["messages"]]
            found[len(row["images"]) == 2] += zip(texts[::2], texts[1::2], strict=True)
    return found


@pytest.mark.parametrize("task", TASKS)
def test_what_training_rows_teach_about_the_words_is_worth_no_more_than_chance(task, training_questions):
    items = items_of(task) + (items_of(task, 1) if task in WORDED else [])
    replies = {reply for item in items for options in item.options for reply in options}
    questions = [(text, answer) for text, answer in training_questions[task == "multi_image"] if answer in replies]
    assert len(questions) > 500
    assert abs(np.mean(Majority(questions).hits(items)) - chance(items)) < 0.03


def test_every_outcome_is_equally_likely_within_every_skill():
    """Letters for questions with options; the others' replies; which one of a pair is true."""
    for task in WORDED:
        answers = defaultdict(Counter)
        for item in items_of(task):
            text, answer = item.questions[0]
            num_options = len(stem_and_options(text)[1])
            answers[item.skill, num_options][answer.split()[-1]] += 1
        for group, counts in answers.items():
            mean = counts.total() / (group[1] or 2)
            assert len(counts) == (group[1] or 2)
            assert max(abs(count - mean) for count in counts.values()) < 3.5 * mean**0.5, (task, group, counts)
