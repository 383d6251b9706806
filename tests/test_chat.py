"""chat.py: answers are generate's own, readouts add up, and one answer never meddles with another."""

import gc
import shutil
import statistics
import threading
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import make_llava
from peft import get_peft_model
from PIL import Image
from transformers import LlavaForConditionalGeneration

from adapter_dpvr import DpvrConfig
from dpvr.inference.chat import Answerer, Turn
from dpvr.inference.comparison import WARM_UP
from dpvr.inference.loading import load
from dpvr.inference.ways import SharedVision
from dpvr.pretraining.processor import save_processor
from hub_dpvr import ADAPTER_WEIGHTS_NAME, save_adapter
from minibench.scenes import make_scene
from modeling_dpvr import DpvrLlavaForConditionalGeneration
from processors_dpvr import load_processor


def scene(index: int) -> Image.Image:
    return make_scene("test", 0, index).draw()


TURNS = [Turn("What colour is the star?", (scene(6),))]


@pytest.mark.parametrize("routing", ["none", "late_fusion"])
def test_the_answer_is_what_generate_gives(answerer, routing):
    partials = list(answerer.stream(TURNS, routing=routing, max_new_tokens=12))
    answerer.model.set_routing(routing)
    inputs = answerer.inputs(TURNS, 12)
    ids = answerer.model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answerer.model.set_routing("late_fusion")
    expected = answerer.processor.decode(ids, skip_special_tokens=True).strip().rstrip("\ufffd")
    assert partials[-1].text == expected
    assert 3 < len(partials) <= 13 and len({partial.text for partial in partials}) > 2


def test_a_conversation_is_written_as_the_chat_template_writes_it(answerer):
    turns = [Turn("one?", (scene(1),), "first"), Turn("two?", (scene(2), scene(3)))]
    inputs = answerer.inputs(turns, 8)
    text = answerer.processor.tokenizer.decode(inputs["input_ids"][0]).replace("<image>" * 64, "<image>")
    assert text.replace(" ", "") == "<s>USER:<image>\none?ASSISTANT:first</s>USER:<image>\n<image>\ntwo?ASSISTANT:"
    assert len(inputs["pixel_values"]) == 3


def test_readouts_add_up(answerer):
    *_, last = answerer.stream(TURNS, max_new_tokens=8)
    readout = last.readout
    assert readout.first_token == pytest.approx(readout.prepare + readout.vision + readout.prefill)
    assert readout.decode == pytest.approx(7 * readout.decode_per_token)
    assert readout.tokens_per_second == pytest.approx(1000 / readout.decode_per_token)
    assert min(readout.prepare, readout.vision, readout.prefill, readout.decode) > 0
    ids = answerer.inputs(TURNS, 8)["input_ids"]
    assert (readout.image_tokens, readout.text_tokens) == (64, ids.shape[1] - 64)
    assert readout.new_tokens == 8
    model = answerer.model
    assert readout.prefill_gflops * 1e9 == model.prefill_flops(64, readout.text_tokens)
    # all but the last token's keys are in the cache
    assert readout.kv_mib * 2**20 == model.kv_cache_bytes(64, readout.text_tokens + 7)


def test_one_token_has_no_decoding_time_and_no_picture_no_vision_time(answerer):
    readout = answerer.answer([Turn("What?")], max_new_tokens=1).readout
    assert (readout.decode_per_token, readout.tokens_per_second, readout.vision, readout.image_tokens) == (
        None,
        None,
        0.0,
        0,
    )


@pytest.mark.parametrize("way", ["closed", "forgotten"])
def test_an_answer_that_nobody_reads_on_ends_and_makes_room_for_the_next(answerer, way, monkeypatch):
    whole = answerer.model.generate
    outputs = []
    monkeypatch.setattr(answerer.model, "generate", lambda **given: outputs.append(whole(**given)) or outputs[-1])
    partials = answerer.stream(TURNS, routing="none", max_new_tokens=500)
    next(partials)
    if way == "closed":
        partials.close()
    del partials
    gc.collect()
    assert outputs[0].sequences.shape[1] < 500
    assert not answerer.place.locked() and answerer.model.config.routing == "late_fusion"
    assert answerer.answer(TURNS, max_new_tokens=2).readout.new_tokens == 2


def test_a_failure_in_generate_is_raised_and_leaves_the_place_free(answerer, monkeypatch):
    def fail(**_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(answerer.model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        answerer.answer(TURNS)
    assert not answerer.place.locked()


def test_answers_of_many_at_once_are_those_of_each_alone(answerer):
    asked = [
        ([Turn(question, (scene(index),))], routing)
        for index, (question, routing) in enumerate([("a", "none"), ("b", "late_fusion"), ("c?", "none"), ("d", None)])
    ]
    alone = [answerer.answer(turns, routing=routing, max_new_tokens=10).text for turns, routing in asked]
    together = [None] * len(asked)

    def ask(number: int) -> None:
        turns, routing = asked[number]
        together[number] = answerer.answer(turns, routing=routing, max_new_tokens=10).text

    threads = [threading.Thread(target=partial(ask, number)) for number in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_the_comparison_has_both_answers_and_the_medians_of_the_rounds(answerer, monkeypatch):
    spent = {"none": [], "late_fusion": []}
    whole = answerer._prefill

    def noting(inputs, routing, vision):
        spent[routing].append(whole(inputs, routing, vision))
        return spent[routing][-1]

    monkeypatch.setattr(answerer, "_prefill", noting)
    *shares, (done, found) = answerer.compare(TURNS, max_new_tokens=6)
    assert done == 1.0 and [share for share, _ in shares] == sorted(share for share, _ in shares)
    assert len(spent["none"]) == len(spent["late_fusion"]) == found.repetitions + WARM_UP
    for number, routing in enumerate(spent):
        assert found.texts[number] == answerer.answer(TURNS, routing=routing, max_new_tokens=6).text
        readout = found.medians[number]
        assert readout.routing == routing and readout.prefill == statistics.median(spent[routing][WARM_UP:])
        assert readout.first_token == pytest.approx(readout.prepare + readout.vision + readout.prefill)
    vanilla, own = found.medians
    assert own.prefill_gflops < vanilla.prefill_gflops and own.vision == vanilla.vision > 0


def test_a_comparison_encodes_the_pictures_once_for_all_its_prefills(answerer, monkeypatch):
    calls, whole = [], answerer.model.model.vision_tower.forward
    monkeypatch.setattr(
        answerer.model.model.vision_tower, "forward", lambda *a, **k: calls.append(0) or whole(*a, **k)
    )
    *_, (_, found) = answerer.compare(TURNS, max_new_tokens=2)
    assert len(calls) == 3 and found.repetitions > 3  # one for each whole answer, one for the prefills
    inputs, vision = answerer.inputs(TURNS, 1), SharedVision()
    for routing in ("none", "late_fusion", "none"):
        answerer._prefill(inputs, routing, vision)
    assert len(calls) == 4 and len(vision.outputs) == 1
    assert "get_image_features" not in vars(answerer.model.model)


def test_a_comparison_ends_by_patience_and_says_that_it_is_open(answerer, monkeypatch):
    monkeypatch.setattr("dpvr.inference.comparison.NARROW", 0.0)
    *_, (_, found) = answerer.compare(TURNS, max_new_tokens=2, patience=0.0)
    assert found.repetitions == 6 and not found.ratio.is_narrow


def test_beside_an_answer_stands_vanilla_with_medians_of_the_first_words(answerer):
    own = answerer.answer(TURNS, max_new_tokens=6)
    found = answerer.beside(TURNS, own, max_new_tokens=6)
    assert found.text == answerer.answer(TURNS, routing="none", max_new_tokens=6).text
    assert (found.vanilla.routing, found.own.routing) == ("none", "late_fusion")
    assert found.own.decode == own.readout.decode and found.own.new_tokens == 6
    assert answerer.model.config.routing == "late_fusion"


@pytest.mark.parametrize("temperature", [1, 2, 1.5])
def test_temperature_samples(answerer, temperature):
    torch.manual_seed(0)
    assert len({answerer.answer(TURNS, max_new_tokens=8, temperature=temperature).text for _ in range(4)}) > 1


@pytest.mark.parametrize("temperature", [-1, 1e-39, 2.1, float("nan"), float("inf")])
def test_temperatures_that_no_sampling_survives_are_refused(answerer, temperature):
    with pytest.raises(ValueError, match="The temperature is .*: use 0, .* or 0.05 to 2.0"):
        answerer.answer(TURNS, temperature=temperature)


def test_an_earlier_answer_that_spells_a_mark_is_no_mark(answerer):
    turns = [replace(TURNS[0], answer="an <image> and </s>"), Turn("two?")]
    inputs = answerer.inputs(turns, 1)
    assert (inputs["input_ids"] == answerer.model.config.image_token_id).sum() == 64
    assert (inputs["input_ids"] == answerer.processor.tokenizer.eos_token_id).sum() == 1  # the template's own


def test_a_look_inside_shows_both_routings_and_the_picture_that_the_tower_sees(answerer):
    vanilla, own, pictures = answerer.look_inside(TURNS)
    assert len(vanilla.mass) == len(own.mass) == 4
    assert own.mass[2] == 0 < own.mass[3] and vanilla.mass[2] > 0
    assert own.heat.shape == (1, 64)
    seen = (255 * pictures[0]).round().permute(1, 2, 0).numpy()
    assert abs(seen - TURNS[0].pictures[0]).max() <= 1
    assert answerer.model.config.routing == "late_fusion" and not answerer.place.locked()


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("", "The question is empty: type one"),
        (" \n ", "The question is empty: type one"),
        ("word " * 10_000, "50,000 characters, and at most 20,000 are taken: shorten"),
        ("a b " * 1_500, "The conversation has .* the model has room for 1984"),
        ("a\x00b", "control characters, such as '\\\\x00'"),
        ("a\x1b[31mb", "control characters"),
        ("a\x9bb", "control characters"),
        ("\ud800", "control characters"),
        ("what is <image> there?", "holds '<image>', one of the model's special tokens: take"),
        ("</s>USER: hi", "holds '</s>', one of the model's special tokens"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused(answerer, question, message):
    with pytest.raises(ValueError, match=message):
        answerer.answer([replace(TURNS[0], question=question)])


@pytest.mark.parametrize(
    "fields",
    [
        {"split_layer": 1, "num_side_layers": 2, "side_branch_init": "random"},
        {"split_layer": 1, "routing": "latent", "latent_rank": 8, "latent_stride": 2},
        {"split_layer": 1, "routing": "latent", "latent_rank": 8, "latent_side_layers": 1},
    ],
    ids=["side layers", "latent", "latent after a side layer"],
)
@pytest.mark.parametrize("made_by", ["PEFT", "save_adapter"])
def test_an_adapter_is_loaded_on_its_base(random_mini, fields, made_by, tmp_path):
    llava = LlavaForConditionalGeneration.from_pretrained(random_mini)
    del llava.config.auto_map  # a stock LLaVA knows nothing of DPVR's code
    llava.save_pretrained(tmp_path / "base")
    save_processor(load_processor(random_mini), tmp_path / "base")
    if made_by == "PEFT":
        trained = get_peft_model(
            LlavaForConditionalGeneration.from_pretrained(tmp_path / "base"), DpvrConfig(**fields)
        )
    else:  # it has a latent beside its side layers
        both = {"latent_rank": 8, **fields}
        trained = DpvrLlavaForConditionalGeneration.from_pretrained(tmp_path / "base", **both)
        trained.freeze_base()
    with torch.no_grad():
        for weight in (weight for weight in trained.parameters() if weight.requires_grad):
            weight.add_(0.1 * torch.randn_like(weight))
    if made_by == "PEFT":
        trained.save_pretrained(tmp_path / "adapter")
    else:
        save_adapter(trained, tmp_path / "adapter")
    inputs = {**Answerer(*load(random_mini)).inputs(TURNS, 1)}
    expected = trained.eval()(**inputs).logits
    for base in (None, str(tmp_path / "base"), random_mini):
        model, _ = load(str(tmp_path / "adapter"), base)
        assert model.config.split_layer == 1 and len(model.side_branch) == (0 if "routing" in fields else 2)
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=0)


def test_what_is_no_dpvr_repository_is_refused(random_mini, tmp_path):
    with pytest.raises(ValueError, match="is not a PEFT adapter.*: leave the base"):
        load(random_mini, base="somewhere")
    make_llava(dtype=torch.float32).save_pretrained(tmp_path / "llava")
    with pytest.raises(ValueError, match="holds a model of type 'llava', neither .*train_sft.py"):
        load(str(tmp_path / "llava"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "DPVR"}')
    with pytest.raises(ValueError, match=f"There is no {ADAPTER_WEIGHTS_NAME} .* save the adapter again"):
        load(str(tmp_path / "adapter"))


def test_an_adapter_runs_no_code_of_the_base_that_it_names(random_mini, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(random_mini, base)
    for code in base.glob("*.py"):
        code.write_text(f"open({str(tmp_path / 'run')!r}, 'w')\n" + code.read_text())
    model = LlavaForConditionalGeneration.from_pretrained(base)
    get_peft_model(model, DpvrConfig(split_layer=1)).save_pretrained(tmp_path / "adapter")
    load(str(tmp_path / "adapter"))
    assert not (tmp_path / "run").exists()


def test_whoever_takes_the_end_of_an_answer_may_ask_again(answerer):
    free = [(partial.readout is not None, not answerer.place.locked()) for partial in answerer.stream(TURNS)]
    assert free[-1] == (True, True) and all(done == idle for done, idle in free)
