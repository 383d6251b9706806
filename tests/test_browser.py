"""The app in a real browser, Debian's Chromium: the twenty seconds of a first visit, on a desktop and a phone.

DPVR_SCREENSHOTS=docs/chat pytest tests/test_browser.py     writes the pictures that docs/chat.md and the README show
"""

import io
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from lines import ONCE
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright
from servers import free_port, running
from sklearn.datasets import load_sample_images

from dpvr.inference.chat import Answerer, Turn
from dpvr.inference.loading import load
from dpvr.inference.page import build, launch, write_examples
from minibench.scenes import make_scene

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium")
SIZES = {"desktop": {"width": 1280, "height": 800}, "phone": {"width": 390, "height": 844}}
VISITS = [("desktop", "light"), ("desktop", "dark"), ("phone", "light"), ("phone", "dark")]
SHOTS = os.environ.get("DPVR_SCREENSHOTS")
GAP = 24  # pixels between the pages of one screenshot
LINE = re.compile(r"First word after [\d.,]+ ms; without DPVR [\d.,]+ ms\. 0\.\d\d of the compute, same answer")
expect.set_options(timeout=90_000)

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
    ONCE,  # what is behind the page is tested in test_app.py and test_page.py
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


def opened(browser: Browser, url: str, size: str = "desktop", scheme: str = "light") -> Page:
    page = browser.new_context(viewport=SIZES[size], color_scheme=scheme).new_page()
    page.set_default_timeout(90_000)
    page.goto(url)
    expect(page.locator("#chat .example")).to_have_count(4)
    return page


@pytest.fixture
def page(browser, url) -> Iterator[Page]:
    page = opened(browser, url)
    yield page
    page.context.close()


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


@pytest.fixture
def scene(tmp_path) -> Path:
    make_scene("test", 0, 6).draw().save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


def shoot(page: Page, name: str) -> None:
    """Keep what the page shows, if a folder for it is named."""
    if SHOTS:
        page.wait_for_timeout(400)  # scrolling and fading
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        Image.open(io.BytesIO(page.screenshot())).save(Path(SHOTS) / f"{name}.webp", quality=85)


def shoot_together(pages: list[Page], name: str) -> None:
    """Keep what several pages show, side by side."""
    if SHOTS:
        pictures = [Image.open(io.BytesIO(page.screenshot())).convert("RGB") for page in pages]
        width, height = sum(each.width for each in pictures), max(each.height for each in pictures)
        whole, left = Image.new("RGB", (width + GAP * (len(pictures) - 1), height), "white"), 0
        for picture in pictures:
            whole.paste(picture, (left, 0))
            left += picture.width + GAP
        whole.save(Path(SHOTS) / f"{name}.webp", quality=85)


def attach(page: Page, *paths: Path) -> None:
    page.locator("#box input[type=file]").first.set_input_files([*paths])
    expect(page.locator("#box .thumbnail-item")).to_have_count(len(paths))


def ask(page: Page, question: str) -> None:
    """Type a question and press Enter; wait until the page is ready for the next."""
    field = page.locator("#box textarea")
    field.fill(question)
    field.press("Enter")
    expect(field).to_have_value("")
    expect(page.locator("#actions")).to_be_visible()


def answers(page: Page) -> list[str]:
    return [text.strip() for text in page.locator("#chat .bot.message > .message:first-child").all_inner_texts()]


def is_in_view(page: Page, selector: str) -> bool:
    """Whether it stands whole in the window, and if it is a part of the chat in what the chat shows."""
    return page.locator(selector).last.evaluate(
        """element => { const {top, bottom} = element.getBoundingClientRect();
                        const chat = element.closest(".bubble-wrap")?.getBoundingClientRect();
                        return top >= (chat?.top ?? 0) - 1 && bottom <= (chat?.bottom ?? window.innerHeight) + 1; }"""
    )


def violations(page: Page) -> list[str]:
    """What axe-core finds against WCAG 2 A and AA."""
    found = Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa"]}).response["violations"]
    return [f"{one['id']}: {node['target']} {node['html'][:150]}" for one in found for node in one["nodes"]]


@pytest.mark.parametrize(("size", "scheme"), VISITS)
def test_a_visit_of_twenty_seconds(browser, url, size, scheme):
    page = opened(browser, url, size, scheme)
    name = f"{size}-{scheme}"
    shoot(page, f"{name}-open")
    assert violations(page) == []
    page.locator("#chat .example").nth(1).click()
    expect(page.locator("#chat .line summary")).to_have_text(LINE)
    expect(page.locator("#actions")).to_be_visible()
    page.wait_for_timeout(500)
    assert answers(page)[-1].startswith("yes")
    assert is_in_view(page, "#chat .line summary") and is_in_view(page, "#box textarea")
    shoot(page, f"{name}-answer")
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#chat .bars")).to_be_visible()
    expect(page.locator("#actions")).to_be_visible()
    said = page.locator("#chat .card").first.inner_text()
    assert re.search(r"of vanilla's time|no difference to see|too busy to tell", said) and "Both answer “yes”" in said
    shoot(page, f"{name}-compare")
    page.get_by_role("button", name="Look inside").click()
    expect(page.locator("#chat .looks figure")).to_have_count(2)
    expect(page.locator("#actions")).to_be_visible()
    assert "of its attention is on the pictures (1: " in page.locator("#chat .looks").inner_text()
    assert all(page.locator("#chat .looks img").evaluate_all("images => images.map(image => image.alt)"))
    page.locator("#chat .looks").scroll_into_view_if_needed()
    shoot(page, f"{name}-look")
    assert violations(page) == []
    width = page.evaluate("[document.scrollingElement.scrollWidth, window.innerWidth]")
    assert width[0] <= width[1], "something sticks out to the side"
    page.context.close()


@pytest.mark.parametrize(("size", "scheme"), [("desktop", "light"), ("phone", "dark")])
def test_a_long_question_is_answered_in_view(browser, url, size, scheme):
    page = opened(browser, url, size, scheme)
    page.locator("#chat .example").nth(2).click()
    expect(page.locator("#chat .line summary")).to_have_text(LINE)
    expect(page.locator("#actions")).to_be_visible()
    page.wait_for_timeout(500)
    assert "8. " in page.locator("#chat .user.message").inner_text() and answers(page)[-1] == "yes"
    assert is_in_view(page, "#chat .line summary") and is_in_view(page, "#box textarea")
    shoot(page, f"{size}-{scheme}-long")
    page.context.close()


@pytest.mark.parametrize(("size", "scheme"), [("desktop", "light"), ("phone", "dark")])
def test_the_dial_marks_the_chosen_method_and_the_next_answer_takes_it(browser, url, size, scheme):
    page = opened(browser, url, size, scheme)
    page.locator("#drawer .toggle-button").click()
    page.get_by_label(re.compile("Vanilla: 1.00")).check()
    expect(page.locator("#dial svg.dial")).to_have_attribute("aria-label", re.compile("Chosen: vanilla"))
    expect(page.locator("#about")).to_contain_text("dpvr-mini")
    shoot(page, f"{size}-{scheme}-dial")
    assert violations(page) == []
    page.locator("#drawer .toggle-button").click()
    page.locator("#chat .example").first.click()
    expect(page.locator("#chat .line summary")).to_contain_text("This is the model without DPVR.")
    page.context.close()


@pytest.mark.parametrize(("size", "scheme"), [("desktop", "light"), ("phone", "dark")])
def test_a_photograph_is_answered_with_a_warning(browser, url, tmp_path, size, scheme):
    page = opened(browser, url, size, scheme)
    Image.fromarray(load_sample_images().images[1]).save(tmp_path / "flower.png")
    attach(page, tmp_path / "flower.png")
    ask(page, "What colour is the flower?")
    expect(page.locator("#chat .note")).to_contain_text("This picture is unlike those that this model was trained on")
    shoot(page, f"{size}-{scheme}-photograph")
    page.context.close()


@pytest.mark.parametrize(("size", "scheme"), [("desktop", "light")])
def test_a_broken_file_is_named_and_left_out_and_the_rest_stays_in_the_box(browser, url, scene, size, scheme):
    page = opened(browser, url, size, scheme)
    broken = scene.with_name("broken.png")
    broken.write_bytes(scene.read_bytes()[:200])
    attach(page, scene, broken)
    field = page.locator("#box textarea")
    field.fill("What colour is the star?")
    field.press("Enter")
    expect(page.get_by_test_id("toast-body")).to_contain_text(
        "broken.png is left out. The picture is damaged or cut off"
    )
    expect(page.locator("#box .thumbnail-item")).to_have_count(1)
    expect(field).to_have_value("What colour is the star?")
    shoot(page, f"{size}-{scheme}-broken")
    page.context.close()


def test_two_visitors_at_once_get_their_own_answers(browser, url, tmp_path):
    """The same question about a picture each; both have sent it before either is answered."""
    pages = [opened(browser, url, size, scheme) for size, scheme in (("desktop", "light"), ("phone", "dark"))]
    scenes, answerer = [make_scene("test", 0, index).draw() for index in (1, 9)], Answerer(*load(str(ROOT)))
    expected = [answerer.answer([Turn("Describe the picture.", (scene,))]).text for scene in scenes]
    assert expected[0] != expected[1]
    for number, (page, scene) in enumerate(zip(pages, scenes, strict=True)):
        scene.save(tmp_path / f"{number}.png")
        attach(page, tmp_path / f"{number}.png")
        page.locator("#box textarea").fill("Describe the picture.")
    for page in pages:
        page.locator("#box textarea").press("Enter")
    assert not any(page.locator("#actions").is_visible() for page in pages)
    for number, (page, answer) in enumerate(zip(pages, expected, strict=True)):
        expect(page.locator("#actions")).to_be_visible()
        assert answers(page) == [answer] and page.locator("#chat .line").count() == 1
        (address,) = page.locator("#chat .pictures img").evaluate_all("images => images.map(image => image.src)")
        assert address.endswith(f"/{number}.png")
    shoot_together(pages, "two-visitors")
    for page in pages:
        page.context.close()


def test_a_question_without_a_picture_is_answered_by_asking_for_one(page, scene):
    field = page.locator("#box textarea")
    field.fill("What colour is the star?")
    field.press("Enter")
    expect(page.locator("#chat .note")).to_contain_text("Which picture?")
    attach(page, scene)
    field.press("Enter")
    expect(page.locator("#actions")).to_be_visible()
    assert page.locator("#chat .user.message").inner_text().strip() == "What colour is the star?"


def test_the_details_are_one_click_away_and_terms_are_explained(page):
    page.locator("#chat .example").first.click()
    expect(page.locator("#actions")).to_be_visible()
    expect(page.locator("#chat .figures")).to_be_hidden()
    page.locator("#chat .line summary").click(position={"x": 5, "y": 5})
    expect(page.locator("#chat .figures")).to_be_visible()
    term = page.locator("#chat .figures .term", has_text="Keys and values").first
    term.focus()
    assert "saves no cache" in term.evaluate("element => getComputedStyle(element, '::after').content")


def test_answers_stream_and_stop_ends_them_where_they_are(slow_page):
    page = slow_page
    assert page.locator("#box .stop-button").count() == 0 and page.locator("#actions:visible").count() == 0
    page.locator("#chat .example").first.click()
    page.locator("#box .stop-button").wait_for()
    lengths = "least => document.querySelector('#chat .bot.message')?.innerText.length > least"
    page.wait_for_function(lengths, arg=1)
    page.wait_for_function(lengths, arg=len(page.locator("#chat .bot.message").inner_text()))
    assert page.locator("#box .stop-button").count() == 1
    page.locator("#box textarea").fill("and then?")  # stays, while it streams
    page.locator("#box .stop-button").click()
    expect(page.locator("#actions")).to_be_visible()
    stopped = answers(page)[0]
    page.wait_for_timeout(1500)
    assert answers(page)[0] == stopped and page.locator("#box .stop-button").count() == 0
    assert page.locator("#box textarea").input_value() == "and then?"
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("#chat .example")).to_have_count(4)


def test_an_answer_is_made_again_at_another_temperature(page):
    page.locator("#chat .example").nth(3).click()
    expect(page.locator("#actions")).to_be_visible()
    first = answers(page)[0]
    page.locator("#drawer .toggle-button").click()
    page.get_by_label("number input for Temperature").fill("2")
    page.get_by_label("number input for Temperature").press("Tab")
    page.locator("#drawer .toggle-button").click()
    page.get_by_role("button", name="Regenerate").click()
    page.wait_for_function(
        "first => !document.querySelector('#chat .bot.message')?.innerText.startsWith(first)", arg=first
    )
    expect(page.locator("#actions")).to_be_visible()
    assert "same answer" not in page.locator("#chat .line summary").inner_text()


def test_a_picture_may_be_taken_with_a_camera(browser, url):
    page = opened(browser, url)
    page.context.grant_permissions(["camera"])
    page.locator("#drawer .toggle-button").click()
    page.get_by_text("Take a picture").click()
    page.get_by_text("Click to Access Webcam").click()
    page.wait_for_function("document.querySelector('#camera video')?.videoWidth > 0")
    page.get_by_label("capture photo").click()
    expect(page.locator("#box .thumbnail-item")).to_have_count(1)
    page.context.close()


def test_a_picture_may_be_pasted(browser, url):
    page = opened(browser, url)
    page.locator("#box textarea").evaluate(
        """async (field) => {
            const canvas = document.createElement("canvas");
            canvas.width = canvas.height = 96;
            canvas.getContext("2d").fillRect(10, 10, 40, 40);
            const blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
            const data = new DataTransfer();
            data.items.add(new File([blob], "pasted.png", {type: "image/png"}));
            field.dispatchEvent(new ClipboardEvent("paste", {clipboardData: data, bubbles: true, cancelable: true}));
        }"""
    )
    expect(page.locator("#box .thumbnail-item")).to_have_count(1)
    page.context.close()


def test_markup_is_shown_and_not_run(page, scene):
    markup = "<img src=x onerror='window.hacked = 1'><b>bold</b> **stars** <script>window.hacked = 1</script>"
    attach(page, scene)
    ask(page, markup)
    expect(page.locator("#chat .user.message")).to_contain_text(markup)
    assert page.evaluate("window.hacked") is None
    assert page.locator("#chat .user.message b, #chat .user.message strong").count() == 0


def test_everything_is_reached_by_keyboard(page):
    page.locator("#chat .example").first.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#actions")).to_be_visible()
    page.get_by_role("button", name="Compare").focus()
    reached = []
    for _ in range(3):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.innerText.trim()"))
    assert reached == ["Look inside", "Regenerate", "New chat"]
    page.locator("#chat .line summary").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#chat .figures")).to_be_visible()
