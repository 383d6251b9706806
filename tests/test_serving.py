"""`transformers serve`: an OpenAI client asks about pictures and gets what `generate` answers."""

import base64
import io
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import openai
import pytest
import torch
import transformers
from PIL import Image
from servers import free_port, running
from transformers import AutoModelForImageTextToText, AutoProcessor

from minibench.scenes import make_scene
from modeling_dpvr import DpvrLlavaForConditionalGeneration

pytestmark = pytest.mark.skipif(
    transformers.__version__.startswith("4."),
    reason="transformers 4 serves none but its own model classes, and answers in streams alone",
)

ROOT = Path(__file__).parent.parent
QUESTION = "Options: red A blue B green C yellow D\nWhat colour is the ring?"
CAPTION = "Describe the picture."
PICTURES = range(6)
LONGEST = 12
PLAN = {"split_layer": 4, "num_fusion_layers": 4}


class Served(NamedTuple):
    url: str
    name: str
    model: DpvrLlavaForConditionalGeneration
    processor: transformers.ProcessorMixin

    def answer(self, messages: list[dict]) -> tuple[str, int, int]:
        """The greedy answer by `generate`, and how many tokens the prompt and it have; pictures stand in the parts."""
        parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        pictures = [part["image"] for part in parts] or None
        inputs = self.processor(images=pictures, text=text, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        reply = self.model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)[0, length:]
        return self.processor.decode(reply, skip_special_tokens=True), length, len(reply)


def user(text: str, *pictures: Image.Image) -> dict:
    return {
        "role": "user",
        "content": [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": text}],
    }


def over_the_wire(messages: list[dict]) -> list[dict]:
    """The same messages as OpenAI's clients send them."""
    wire = []
    for message in messages:
        parts = [
            part if part["type"] == "text" else {"type": "image_url", "image_url": {"url": data_url(part["image"])}}
            for part in message["content"]
        ]
        wire.append({**message, "content": parts})
    return wire


def data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def scene(index: int) -> Image.Image:
    return make_scene("test", 0, index).draw()


@pytest.fixture(scope="module")
def side(tmp_path_factory) -> Path:
    """A repository that holds a side branch for the root's model, unlike the root's own, and the processor."""
    folder = tmp_path_factory.mktemp("side")
    model = DpvrLlavaForConditionalGeneration.from_pretrained(ROOT, **PLAN)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.side_branch.parameters():
            parameter.mul_(1 + torch.randn_like(parameter) / 2)
    model.save_pretrained(folder, side_branch_only=True)
    AutoProcessor.from_pretrained(ROOT, trust_remote_code=True).save_pretrained(folder)
    assert (folder / "model.safetensors").stat().st_size < (ROOT / "model.safetensors").stat().st_size / 5
    return folder


@pytest.fixture(scope="module", params=["root", "side"])
def served(request, side, tmp_path_factory) -> Iterator[Served]:
    """A server of the root, started there as docs/serving.md says, or of a side branch, started anywhere."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    repository, cwd, name = (ROOT, ROOT, ".") if request.param == "root" else (side, folder, str(side))
    program = str(Path(sys.executable).with_name("transformers"))
    where = ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    # One thread, so that the sums are those of this process, and no code of an earlier run.
    own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    model = AutoModelForImageTextToText.from_pretrained(repository, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(repository, trust_remote_code=True)
    command, health = [program, "serve", name, "--trust-remote-code", *where], f"http://127.0.0.1:{port}/health"
    with running(command, health, folder / "output.txt", cwd, own):
        yield Served(f"http://127.0.0.1:{port}/v1", name, model, processor)


@pytest.fixture
def client(served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.url, api_key="none", timeout=120) as client:
        yield client


def ask(client: openai.OpenAI, served: Served, messages: list[dict], **options):
    return client.chat.completions.create(
        model=served.name, messages=over_the_wire(messages), **{"max_tokens": LONGEST, **options}
    )


def test_it_answers_a_question_about_a_picture_as_generate_does(served, client):
    for question in (QUESTION, CAPTION):
        messages = [user(question, scene(0))]
        text, prompt_tokens, new_tokens = served.answer(messages)
        reply = ask(client, served, messages)
        assert reply.choices[0].message.content == text
        assert reply.choices[0].finish_reason == ("length" if new_tokens == LONGEST else "stop")
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (prompt_tokens, new_tokens)


@pytest.mark.parametrize("served", ["root"], indirect=True)
def test_the_client_on_the_page_about_serving_runs(served, capsys):
    code, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), flags=re.DOTALL)
    assert "http://localhost:8000/v1" in code
    exec(code.replace("http://localhost:8000/v1", served.url), {})
    answer = served.answer([user(QUESTION, scene(0))])[0]
    assert capsys.readouterr().out == f"{answer.strip()}\n{answer}"
    assert f"# {answer.strip()}\n" in code


def test_it_streams_the_answer_in_pieces(served, client):
    messages = [user(CAPTION, scene(1))]
    chunks = [chunk.choices[0] for chunk in ask(client, served, messages, stream=True)]
    pieces = [chunk.delta.content for chunk in chunks if chunk.delta.content]
    assert "".join(pieces) == served.answer(messages)[0]
    assert len(pieces) > 3
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["length"]


def test_it_answers_several_at_once_each_for_its_own_picture(served, client):
    asked = [[user(CAPTION, scene(index))] for index in PICTURES]
    expected = [served.answer(messages)[0] for messages in asked]
    assert len(set(expected)) > len(expected) / 2

    def reply(index: int) -> str:
        if index % 2:
            return "".join(
                chunk.choices[0].delta.content or "" for chunk in ask(client, served, asked[index], stream=True)
            )
        return ask(client, served, asked[index]).choices[0].message.content

    with ThreadPoolExecutor(len(asked)) as threads:
        assert list(threads.map(reply, range(len(asked)))) == expected


def test_it_takes_two_pictures_a_later_turn_and_no_picture(served, client):
    answered = {"role": "assistant", "content": [{"type": "text", "text": "blue B"}]}
    for messages in (
        [user("Are the pictures the same? Options: same A different B", scene(0), scene(1))],
        [user(QUESTION, scene(0)), answered, user("How many shapes are there?")],
        [user(QUESTION, scene(0)), answered, user(QUESTION, scene(1))],
        [user(QUESTION)],
    ):
        assert ask(client, served, messages).choices[0].message.content == served.answer(messages)[0]


def test_a_request_that_fails_is_an_error_and_the_next_one_is_answered(served):
    messages = over_the_wire([user(QUESTION, scene(0))])
    broken = over_the_wire([user(QUESTION, scene(0))])
    broken[0]["content"][0]["image_url"]["url"] = "data:image/png;base64,AAAA"
    marked = over_the_wire([user("<image> " + QUESTION)])
    for model, sent in ((served.name, broken), (served.name, marked), ("another/model", messages)):
        with openai.OpenAI(base_url=served.url, api_key="none", max_retries=0) as client:
            with pytest.raises(openai.APIStatusError):
                client.chat.completions.create(model=model, messages=sent, max_tokens=LONGEST)
    with openai.OpenAI(base_url=served.url, api_key="none") as client:
        reply = client.chat.completions.create(model=served.name, messages=messages, max_tokens=LONGEST)
    assert reply.choices[0].message.content == served.answer([user(QUESTION, scene(0))])[0]


def test_what_the_served_side_branch_holds_shows_in_its_answers(side):
    processor = AutoProcessor.from_pretrained(side, trust_remote_code=True)
    own = AutoModelForImageTextToText.from_pretrained(side, trust_remote_code=True).eval()
    roots = DpvrLlavaForConditionalGeneration.from_pretrained(ROOT, **PLAN).eval()
    assert roots.config.layer_plan() == own.config.layer_plan()
    asked = [[user(CAPTION, scene(index))] for index in PICTURES]
    own, roots = (
        [Served("", "", model, processor).answer(messages)[0] for messages in asked] for model in (own, roots)
    )
    assert own != roots
