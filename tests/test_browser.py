"""The app in a real browser, Debian's Chromium, at desktop and phone width: what people do and see."""

import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import transformers
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright
from servers import free_port, running

from dpvr.inference.chat import Answerer
from dpvr.inference.loading import load
from dpvr.inference.page import build, launch, write_examples
from minibench.scenes import make_scene
from versions_dpvr import NEWEST_TESTED

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium")
SIZES = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}
PICTURES = "#pictures .thumbnail-item img, #pictures .grid-wrap img"
OPENED = "pictures => [...document.querySelectorAll(pictures)].every(image => image.src.endsWith('/image.png'))"
SHOTS = os.environ.get("DPVR_SCREENSHOTS")  # a folder to look at what the tests saw
expect.set_options(timeout=60_000)

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
    pytest.mark.skipif(
        not transformers.__version__.startswith(NEWEST_TESTED),
        reason="the page is the same on all lines, what is behind it is tested in test_app.py",
    ),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "app.py", "--host", "127.0.0.1", "--port", str(port)]
    address = f"http://127.0.0.1:{port}"
    with running(command, address, tmp_path_factory.mktemp("app") / "output.txt", ROOT):
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        fake_webcam = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *fake_webcam])
        yield browser
        browser.close()


def opened(browser: Browser, url: str, size: str = "desktop") -> Page:
    page = browser.new_context(viewport=SIZES[size]).new_page()
    page.set_default_timeout(60_000)
    page.goto(url)
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_visible()
    return page


@pytest.fixture
def slow_page(browser, random_mini, tmp_path) -> Iterator[Page]:
    """A page of a model that takes a tenth of a second for each token and never ends by itself."""
    answerer = Answerer(*load(random_mini))
    answerer.model.generation_config.eos_token_id = None
    answerer.model.register_forward_pre_hook(lambda *_: time.sleep(0.1))
    served = build(answerer, "About.", write_examples(tmp_path))
    launch(served, "127.0.0.1", None, prevent_thread_lock=True, quiet=True)
    page = opened(browser, served.local_url)
    yield page
    page.context.close()
    served.close()


@pytest.fixture(params=["desktop"])
def page(request, browser, url) -> Iterator[Page]:
    page = opened(browser, url, request.param)
    yield page
    if SHOTS:
        name = re.sub(r"\W+", "-", request.node.name).strip("-")
        page.screenshot(path=Path(SHOTS) / f"{name}.png", full_page=True)
    page.context.close()


@pytest.fixture
def scene(tmp_path) -> Path:
    make_scene("test", 0, 6).draw().save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


both_sizes = pytest.mark.parametrize("page", SIZES, indirect=True)


def upload(page: Page, path: Path, num_pictures: int = 1) -> None:
    """Choose a file; wait until the app shows the picture as it opened it, after which it takes the next one."""
    page.locator("#pictures input[type=file]").first.set_input_files(path)
    expect(page.locator(PICTURES)).to_have_count(num_pictures)
    page.wait_for_function(OPENED, arg=PICTURES)


def ask(page: Page, question: str, answers: int = 1) -> None:
    """Type a question and press Enter; wait for the readout of its answer."""
    page.get_by_label("Question").fill(question)
    page.get_by_label("Question").press("Enter")
    expect(page.get_by_label("Question")).to_have_value("")  # so the readout of the answer before is gone
    expect(page.locator("#chat .bot.message")).to_have_count(answers)
    expect(page.locator("#readout .figures")).to_be_visible()


def figures(page: Page, table: str) -> dict[str, list[str]]:
    rows = page.locator(f"{table} .figures tr").all()
    cells = [row.locator("th, td").all_inner_texts() for row in rows]
    return {label: values for label, *values in cells}


@both_sizes
def test_a_picture_is_uploaded_and_the_answer_streams_in_with_its_readout(page, scene):
    page.evaluate(
        """() => {
            window.seen = [];
            new MutationObserver(() => {
                const answer = document.querySelector("#chat .bot.message");
                if (answer && window.seen.at(-1) !== answer.innerText) window.seen.push(answer.innerText);
            }).observe(document.body, {subtree: true, childList: true, characterData: true});
        }"""
    )
    upload(page, scene)
    ask(page, "Describe the picture.")
    expect(page.locator("#chat .user.message img, #chat .user img")).to_have_count(1)
    answer = page.locator("#chat .bot.message").inner_text().strip()
    assert "digit" in answer or "star" in answer
    seen = [text.strip() for text in page.evaluate("window.seen")]
    growing = [text for text in seen if text and answer.startswith(text)]
    assert len(set(growing)) > 2, seen

    shown = {label: value for label, (value,) in figures(page, "#readout").items()}
    assert shown["Image tokens"] == "64" and int(shown["Answered tokens"]) > 5
    for label in ("Time to first token, ms", "Vision encoding, ms", "Prefill, ms", "Per decoded token, ms"):
        assert float(shown[label]) > 0, label
    assert float(shown["K/V cache, MiB"]) > 1 and float(shown["Prefill by formula, GFLOPs"]) > 0.1
    bar = page.locator("#readout .stages").get_attribute("aria-label")
    assert re.search(r"Vision encoding [\d.]+ ms.*Prefill [\d.]+ ms.*Decoding [\d.]+ ms", bar)


def test_a_picture_may_be_taken_with_a_webcam(browser, url):
    page = opened(browser, url)
    page.context.grant_permissions(["camera"])
    page.get_by_label("Capture from camera").click()
    page.get_by_text("Click to Access Webcam").click()
    page.wait_for_function("document.querySelector('#pictures video')?.videoWidth > 0")
    page.get_by_label("capture photo").click()
    expect(page.locator(PICTURES)).to_have_count(1)
    ask(page, "How many objects are there?")
    assert figures(page, "#readout")["Image tokens"] == ["64"]
    page.context.close()


def test_a_picture_may_be_pasted(browser, url):
    page = opened(browser, url)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate(
        """async () => {
            const canvas = document.createElement("canvas");
            canvas.width = canvas.height = 96;
            canvas.getContext("2d").fillRect(10, 10, 40, 40);
            const blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
            await navigator.clipboard.write([new ClipboardItem({"image/png": blob})]);
        }"""
    )
    page.get_by_label("Paste from clipboard").click()
    expect(page.locator(PICTURES)).to_have_count(1)
    ask(page, "How many objects are there?")
    assert figures(page, "#readout")["Image tokens"] == ["64"]
    page.context.close()


def test_a_chat_of_several_turns_and_pictures_is_regenerated_and_cleared(page, scene, tmp_path):
    answers = page.locator("#chat .bot.message")
    upload(page, scene)
    ask(page, "What colour is the star?")
    first = answers.first.inner_text()
    page.get_by_text("Settings").click()
    page.get_by_label("number input for Temperature").fill("2")
    page.get_by_label("number input for Temperature").press("Tab")
    ask(page, "Describe the picture.", answers=2)
    second = answers.nth(1).inner_text()
    page.get_by_role("button", name="Regenerate").click()
    expect(answers.nth(1)).not_to_have_text(second)
    expect(page.locator("#readout .figures")).to_be_visible()
    assert answers.first.inner_text() == first and answers.count() == 2

    make_scene("test", 0, 7).draw().save(tmp_path / "other.png")
    upload(page, tmp_path / "other.png", num_pictures=2)
    ask(page, "Same or different: the number of objects?", answers=3)
    assert figures(page, "#readout")["Image tokens"] == ["128"]
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("#chat .message")).to_have_count(0)
    expect(page.locator("#pictures img")).to_have_count(0)
    expect(page.locator("#readout .figures")).to_have_count(0)


def begin(page: Page, question: str) -> None:
    """Ask, and wait for the first words."""
    page.get_by_label("Question").fill(question)
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator("#chat .bot.message").last).to_have_text(re.compile(r"\S"))


def test_stop_ends_the_answer_where_it_is_and_the_chat_goes_on(slow_page):
    begin(slow_page, "one?")
    slow_page.get_by_role("button", name="Stop").click()
    slow_page.wait_for_timeout(500)
    stopped = slow_page.locator("#chat .bot.message").first.inner_text()
    slow_page.wait_for_timeout(1500)
    assert slow_page.locator("#chat .bot.message").first.inner_text() == stopped
    assert slow_page.locator("#readout .figures").count() == 0
    ask(slow_page, "two?", answers=2)
    assert figures(slow_page, "#readout")["Answered tokens"] == ["64"]
    assert slow_page.locator("#chat .bot.message").first.inner_text() == stopped


def test_a_new_chat_stays_empty_though_an_answer_was_under_way(slow_page):
    begin(slow_page, "one?")
    slow_page.get_by_role("button", name="New chat").click()
    slow_page.wait_for_timeout(2000)
    assert slow_page.locator("#chat .message").count() == 0
    ask(slow_page, "two?")


def test_what_is_typed_while_an_answer_streams_stays(slow_page):
    begin(slow_page, "one?")
    slow_page.get_by_label("Question").fill("and then?")
    expect(slow_page.locator("#readout .figures")).to_be_visible()
    assert slow_page.get_by_label("Question").input_value() == "and then?"


@both_sizes
def test_vanilla_and_dpvr_stand_side_by_side_with_their_ratio(page, scene):
    upload(page, scene)
    page.get_by_label("Question").fill("What colour is the star?")
    page.get_by_role("tab", name="Side by side").click()
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#comparison .figures")).to_be_visible()
    assert page.locator("#comparison .answer").count() == 2
    assert "Medians of 5 warm repetitions" in page.locator("#comparison").inner_text()
    for label, (vanilla, dpvr, ratio) in figures(page, "#comparison").items():
        if label:
            expected = float(dpvr) / float(vanilla)
            assert float(ratio) == pytest.approx(expected, abs=0.02 + 0.1 * expected), label
    assert float(figures(page, "#comparison")["Prefill by formula, GFLOPs"][2]) < 0.8


@both_sizes
def test_a_look_inside_shows_the_attention_over_the_picture_and_its_curve(page, scene, tmp_path):
    upload(page, scene)
    page.get_by_label("Question").fill("What colour is the star?")
    page.get_by_role("tab", name="Look inside").click()
    page.get_by_role("button", name="Look inside").click()
    overlays = page.locator("#overlays .grid-wrap img, #overlays .thumbnail-item img")
    expect(overlays).to_have_count(2)
    expect(page.locator("#overlays")).to_contain_text("latent, layer 11")
    expect(page.locator("#curve svg, #curve canvas").first).to_be_visible()
    overlays.first.scroll_into_view_if_needed()
    page.wait_for_timeout(500)
    overlays.first.screenshot(path=tmp_path / "overlay.png")
    pixels = np.asarray(Image.open(tmp_path / "overlay.png").convert("RGB")).astype(int)
    warm = (pixels[..., 0] > pixels[..., 2] + 50).mean()
    assert 0.001 < warm < 0.5, "no orange over the grey picture, or nothing else"


def test_a_file_that_is_no_picture_is_named_and_left_out_and_the_chat_goes_on(page, scene, tmp_path):
    (tmp_path / "notes.png").write_text("no picture")
    upload(page, scene)
    page.locator("#pictures input[type=file]").first.set_input_files(tmp_path / "notes.png")
    toast = page.get_by_test_id("toast-body")
    expect(toast).to_contain_text("notes.png is left out. The file is not a picture")
    expect(page.locator(PICTURES)).to_have_count(1)
    ask(page, "What colour is the star?")


def test_questions_that_cannot_be_asked_say_so_and_markup_is_shown_and_not_run(page):
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.get_by_test_id("toast-body")).to_contain_text("The question is empty: type one")
    page.get_by_test_id("toast-close").click()
    markup = "<img src=x onerror='window.hacked = 1'><b>bold</b> **stars** <script>window.hacked = 1</script>"
    ask(page, markup)
    expect(page.locator("#chat .user.message")).to_contain_text(markup)
    assert page.evaluate("window.hacked") is None
    assert page.locator("#chat .user.message b, #chat .user.message strong").count() == 0


def test_an_example_fills_in_the_picture_and_the_question(page):
    page.get_by_text("How many objects are there?").first.click()
    expect(page.get_by_label("Question")).to_have_value("How many objects are there?")
    expect(page.locator(PICTURES)).to_have_count(1)


@both_sizes
def test_controls_have_names_and_are_reached_by_keyboard_and_nothing_sticks_out(page):
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input:not([type=file]), textarea, [role=tab]")]
            .filter(control => control.offsetParent !== null)
            .filter(control => !(control.innerText.trim() || control.ariaLabel || control.title
                                 || (control.labels && [...control.labels].some(label => label.innerText.trim()))))
            .map(control => control.outerHTML.slice(0, 200))"""
    )
    assert nameless == []
    width = page.evaluate("[document.scrollingElement.scrollWidth, window.innerWidth]")
    assert width[0] <= width[1]
    page.get_by_label("Question").focus()
    reached = []
    for _ in range(8):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.innerText.trim()"))
    buttons = [name for name in reached if name in ("Ask", "Stop", "Regenerate", "New chat")]
    assert buttons[:4] == ["Ask", "Stop", "Regenerate", "New chat"]  # a page with nothing after them starts over
