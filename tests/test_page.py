"""controls.py and conversation.py: what the page does with a chat, called as the page calls it."""

import re
from pathlib import Path

import gradio as gr
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from app import ROOT, main, parse_args
from dpvr.inference import controls
from dpvr.inference.about import describe
from dpvr.inference.chat import Answerer, Turn
from dpvr.inference.controls import Page
from dpvr.inference.conversation import MAX_PICTURES, Asked, continued, needs_picture, shown
from dpvr.inference.loading import load
from dpvr.inference.page import on_card, write_examples
from minibench.scenes import make_scene


@pytest.fixture(scope="module")
def mini() -> Page:
    return Page(Answerer(*load(ROOT)))


@pytest.fixture
def picture(tmp_path) -> str:
    make_scene("test", 0, 6).draw().save(tmp_path / "scene.png")
    return str(tmp_path / "scene.png")


def box(question: str, *files: str) -> dict:
    return {"text": question, "files": [*files]}


def test_a_chat_goes_on_with_new_pictures():
    chat = [Asked("one", ("a.png",), "yes")]
    assert continued(chat, "two", ["b.png"]) == [*chat, Asked("two", ("b.png",))]
    with pytest.raises(ValueError, match=f"There are 9 pictures, and the chat takes at most {MAX_PICTURES}"):
        continued(chat, "two", ["b.png"] * 8)


def test_a_question_that_waits_gets_its_picture_and_another_question_takes_its_place():
    waiting = [Asked("one", ("a.png",), "yes"), Asked("which colour?", note="Which picture?")]
    assert continued(waiting, "", ["b.png"])[1:] == [Asked("which colour?", ("b.png",))]
    assert continued(waiting, "another?", ["b.png"])[1:] == [Asked("another?", ("b.png",))]


def test_the_chat_shows_pictures_questions_answers_and_what_stands_below_in_order():
    turns = [
        Asked("one", ("a.png", "b'.png"), "<b>yes", line="<p>line</p>", note="<p>note</p>"),
        Asked("<i>two & 'three'"),
    ]
    pictures, *said = [(one["role"], one["content"]) for one in shown(turns)]
    assert re.findall(r"src='gradio_api/file=([^']*)' alt='([^']*)'", pictures[1].value) == [
        ("a.png", "Picture 1 of the question"),
        ("b%27.png", "Picture 2 of the question"),
    ]
    assert [(role, content.value if isinstance(content, gr.HTML) else content) for role, content in said] == [
        ("user", "one"),
        ("assistant", "&lt;b&gt;yes"),
        ("assistant", "<p>note</p>"),
        ("assistant", "<p>line</p>"),
        ("user", "&lt;i&gt;two &amp; 'three'"),
    ]


@pytest.mark.parametrize("photographs, sizes", [(False, {(96, 96)}), (True, {(640, 427)})])
def test_the_examples_are_questions_that_can_be_asked_some_of_them_about_several_pictures(
    answerer, tmp_path, photographs, sizes
):
    examples = write_examples(tmp_path, photographs=photographs)
    assert [len(paths) for paths, _ in examples] == ([1, 2, 1] if photographs else [1, 4, 4, 1])
    for paths, question in examples:
        answerer.answer([Turn(question, tuple(map(Image.open, paths)))], max_new_tokens=1)
    assert {Image.open(path).size for paths, _ in examples for path in paths} == sizes


def test_dpvr_mini_answers_its_examples_rightly_with_and_without_dpvr(mini, tmp_path):
    replies = {}
    for paths, question in write_examples(tmp_path):
        turns = [Turn(question, tuple(map(Image.open, paths)))]
        replies[question] = {mini.answerer.answer(turns, routing=way).text for way in ("none", "latent")}
    assert replies["What colour is the ring?"] == {"blue"} and replies["Is there a red cross?"] == {"yes"}
    assert len(replies["请描述这张图片。"]) == 1
    (long,) = (question for question in replies if question.endswith("\nIs there a red square?"))
    assert len(long) > 500 and "red square" not in long.partition("\nIs there")[0] and replies[long] == {"yes"}


def test_the_long_example_is_answered_from_its_pictures_and_not_from_its_text(mini, tmp_path):
    paths, question = write_examples(tmp_path)[2]
    without = [path for path in paths if "example-7" not in path]
    turns = [Turn(question, tuple(map(Image.open, without)))]
    assert len(without) == 3 and mini.answerer.answer(turns).text == "no"


def test_a_card_shows_the_question_and_says_how_long_the_text_before_it_is():
    assert on_card("Why?") == "Why?" and on_card("one\ntwo\nWhy?") == "2 lines of text, then: Why?"


def test_an_answer_ends_with_its_line_and_what_vanilla_took(answerer, picture):
    pieces = list(Page(answerer).ask(box("What is it?", picture), [], "late_fusion", 6, 0))
    turns = [piece[1] for piece in pieces]
    assert turns[0] == [Asked("What is it?", (picture,))]
    expected = answerer.answer([Turn("What is it?", (Image.open(picture),))], max_new_tokens=6).text
    assert {turn[-1].answer for turn in turns[-2:]} == {expected}
    assert [bool(turn[-1].line) for turn in turns[-3:]] == [False, True, True]
    assert "; without DPVR" not in turns[-2][-1].line and "; without DPVR" in turns[-1][-1].line


def test_the_page_regenerates_the_last_answer_and_no_other(answerer, picture):
    page = Page(answerer)
    chat = [Asked("one", (picture,), "kept"), Asked("two", (), "replaced", comparison="old")]
    turns = list(page.regenerate(chat, "none", 6, 0))[-1][1]
    conversation = [Turn("one", (Image.open(picture),), "kept"), Turn("two")]
    expected = answerer.answer(conversation, routing="none", max_new_tokens=6).text
    assert turns[0] == chat[0] and (turns[1].answer, turns[1].comparison) == (expected, "")
    for call in (page.regenerate([], "none", 6, 0), page.compare([Asked("waits")], "none", 6)):
        with pytest.raises(gr.Error, match="There is no answer yet: ask something first"):
            next(call)


def test_a_comparison_and_a_look_inside_stand_below_the_answer_they_are_about(answerer, picture):
    page, chat = Page(answerer), [Asked("one", (picture,), "yes")]
    *_, last = page.compare(chat, "late_fusion", 4)
    assert "median of" in last[1][0].comparison and last[1][0].answer == "yes"
    inside = page.look_inside(last[1], "late_fusion")[1][0]
    assert inside.comparison == last[1][0].comparison and inside.inside.count("<figure>") == 2
    assert page.answerer.model.config.routing == "late_fusion"
    with pytest.raises(gr.Error, match="nothing to compare: vanilla is the chosen method"):
        list(page.compare(chat, "none", 4))


def test_files_that_are_no_pictures_are_named_and_left_out_and_the_question_stays(
    answerer, picture, tmp_path, monkeypatch
):
    warnings = []
    monkeypatch.setattr(controls.gr, "Warning", warnings.append)
    (tmp_path / "<b>.png").write_text("no picture")
    (piece,) = Page(answerer).ask(box("What?", picture, str(tmp_path / "<b>.png")), [], "none", 4, 0)
    assert piece[2] == box("What?", picture)
    assert warnings[0].startswith("&lt;b&gt;.png is left out. The file is not a picture")


def test_a_question_about_a_picture_without_one_is_answered_by_asking_for_it(mini, picture):
    (piece,) = mini.ask(box("What colour is the ring?"), [], "latent", 8, 0)
    assert "Which picture?" in piece[1][0].note and piece[1][0].answer is None
    *_, last = mini.ask(box("", picture), piece[1], "latent", 8, 0)
    assert [turn.question for turn in last[1]] == ["What colour is the ring?"] and last[1][0].answer


@pytest.mark.parametrize(
    ("question", "asks"), [("What is in the photo?", True), ("这张图片里有什么?", True), ("What is a photon?", False)]
)
def test_a_model_that_can_speak_of_other_things_asks_for_a_picture_where_one_is_meant(question, asks):
    assert needs_picture([Asked(question)], only_pictures=False) == asks
    assert not needs_picture([Asked("a", ("a.png",), "b"), Asked(question)], only_pictures=True)


def test_an_answer_about_a_photograph_carries_a_warning(mini, tmp_path, picture):
    Image.fromarray(load_sample_images().images[1]).save(tmp_path / "flower.png")
    *_, last = mini.ask(box("What is it?", str(tmp_path / "flower.png")), [], "latent", 8, 0)
    assert "This picture is unlike those that this model was trained on" in last[1][0].note
    *_, last = mini.ask(box("What colour is the star?", picture), [], "latent", 8, 0)
    assert last[1][0].note == ""


def test_actions_are_there_once_there_is_an_answer(answerer):
    page = Page(answerer)
    for turns, visible in (([], False), ([Asked("a", note="waits")], False), ([Asked("a", (), "b")], True)):
        field, actions = page.ready(turns)
        assert actions.visible == visible and (field.submit_btn, field.stop_btn) == (True, False)


def test_a_picture_of_the_camera_comes_into_the_box(answerer):
    assert Page(answerer).add_picture("a.png", box("q", "b.png")) == (box("q", "b.png", "a.png"), None)
    assert Page(answerer).add_picture("a.png", None) == (box("", "a.png"), None)


@pytest.mark.parametrize(
    ("options", "loaded"),
    [
        (["--model", "base", "--adapter", "mine"], ("mine", "base", "main")),
        (["--model", "mine", "--base", "base", "--revision", "a"], ("mine", "base", "a")),
        (["--model", "me/x"], ("me/x", None, "main")),
    ],
)
def test_a_model_and_its_adapter_are_named(options, loaded, monkeypatch):
    def load_any(*args: object, **_: object) -> None:
        raise ValueError(args)

    monkeypatch.setattr("dpvr.inference.loading.load_any", load_any)
    with pytest.raises(ValueError) as asked:
        main(parse_args(options))
    assert asked.value.args == (loaded,)
    with pytest.raises(ValueError, match="give one of both"):
        main(parse_args(["--adapter", "a", "--base", "b"]))


def test_what_is_said_of_the_model_is_read_from_it(mini, answerer):
    said = describe(mini.answerer)
    assert "`dpvr-mini`" in said and "`o|lllllllllll` (latent" in said and "latent 0.36" in said
    assert "Room for 2,048 tokens" in said and "12 layers" in said
    assert f"`{Path(answerer.model.config.name_or_path).name}`" in describe(answerer)
