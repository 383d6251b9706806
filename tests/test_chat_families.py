"""The app on models of any family: a stock model with its own processor and template, and its adapter."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText

from adapter_dpvr import DpvrConfig
from decoders_dpvr import lowest_split
from dpvr.data.prompts import Conversation, prompt_inputs
from dpvr.inference.api import Api
from dpvr.inference.chat import ONE_WAY, Answerer, Turn
from dpvr.inference.controls import Page
from dpvr.inference.conversation import Asked
from dpvr.inference.loading import load_any
from dpvr.inference.page import build
from minibench.scenes import make_scene
from tests.family_processors import WITH_PROCESSOR, save_family

FAMILIES = [name for name in ("qwen2_5_vl", "qwen3_5", "gemma3", "internvl", "llava_next") if name in WITH_PROCESSOR]
ROUTING = "kv_substitution"
QUESTION = "What colour is the star?"


@pytest.fixture(scope="module", params=FAMILIES)
def stock(request, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp(request.param)
    save_family(request.param, folder)
    return str(folder)


@pytest.fixture
def picture() -> Image.Image:
    return make_scene("test", 0, 6).draw().resize((32, 32))


def expected(stock: str, picture: Image.Image, adapter: str | None = None) -> str:
    """What transformers' own model answers, with the adapter if one is given."""
    model = AutoModelForImageTextToText.from_pretrained(stock)
    model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
    _, processor = load_any(stock)
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    inputs = prompt_inputs(processor, [Conversation([asked], [picture])])
    reply = model.eval().generate(**inputs, max_new_tokens=6, do_sample=False)
    text = processor.tokenizer.decode(reply[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip().rstrip("\ufffd")


def test_a_stock_model_answers_and_has_nothing_to_compare(stock, picture, tmp_path):
    answerer = Answerer(*load_any(stock))
    turns = [Turn(QUESTION, (picture,))]
    last = answerer.answer(turns, max_new_tokens=6)
    assert last.text == expected(stock, picture)
    assert last.readout.routing == "none" and last.readout.image_tokens > 0
    assert min(last.readout.vision, last.readout.prefill_gflops, last.readout.kv_mib) > 0
    for call in (lambda: next(answerer.compare(turns)), lambda: answerer.answer(turns, routing="late_fusion")):
        with pytest.raises(
            ValueError,
            match="There is nothing to compare: .* its only way|routing is 'late_fusion': choose one of none",
        ):
            call()
    with pytest.raises(ValueError, match="only the attention of a DPVR-LLaVA can be looked at"):
        answerer.look_inside(turns)
    picture.save(tmp_path / "a.png")
    api = Api(answerer)
    *_, reply = api.ask(QUESTION, [str(tmp_path / "a.png")], api.routing, 6, 0)
    assert reply["answer"] == last.text
    texts = [block.value for block in build(answerer, "About.", []).blocks.values() if hasattr(block, "value")]
    assert any(ONE_WAY in str(text) for text in texts)


def test_an_adapter_answers_beside_vanilla(stock, picture, tmp_path):
    base = AutoModelForImageTextToText.from_pretrained(stock)
    model = get_peft_model(base, DpvrConfig(split_layer=max(1, lowest_split(base.config)), routing=ROUTING))
    torch.manual_seed(0)
    for weight in model.get_base_model().model.side_branch.parameters():
        torch.nn.init.normal_(weight, std=3.0)
    model.save_pretrained(tmp_path / "adapter")
    adapter = str(tmp_path / "adapter")
    answerer = Answerer(*load_any(adapter))
    turns = [Turn(QUESTION, (picture,))]
    answers = {routing: answerer.answer(turns, routing=routing, max_new_tokens=6) for routing in ("none", ROUTING)}
    assert answers["none"].text == expected(stock, picture)
    assert answers[ROUTING].text == expected(stock, picture, adapter)
    readouts = [answer.readout for answer in answers.values()]
    assert readouts[0].kv_mib != readouts[1].kv_mib and readouts[0].prefill_gflops != readouts[1].prefill_gflops
    *_, (_, found) = answerer.compare(turns, max_new_tokens=6, patience=0)
    assert found.texts == tuple(answer.text for answer in answers.values())
    assert [readout.routing for readout in found.medians] == ["none", ROUTING]
    picture.save(tmp_path / "a.png")
    page, chat = Page(answerer), [Asked(QUESTION, (str(tmp_path / "a.png"),), "yes")]
    *_, last = page.compare(chat, ROUTING, 4)
    assert "DPVR-KV" in last[1][0].comparison and page.setting.label.startswith("DPVR-KV: 0.")
