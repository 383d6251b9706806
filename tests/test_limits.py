"""limit_sets.py and limits_run.py: questions harder than those fitted on, and how plans differ from vanilla there."""

import random
from pathlib import Path

import pytest
import torch

from dpvr.benchmarks import limits_run
from dpvr.benchmarks.limit_sets import CORNERS, CROWDED, DIGIT_SIDES, EARLIER, OTHERS, Asked, facts_right, make_sets
from dpvr.benchmarks.limits import main, parse_args
from dpvr.data.prompts import prompt_inputs
from minibench.scenes import draw_scene
from modeling_dpvr import DpvrLlavaForConditionalGeneration
from processors_dpvr import load_processor

ROOT = Path(__file__).parent.parent
LIMIT = 3


@pytest.fixture(scope="module")
def sets():
    return make_sets(LIMIT, 0)


def texts(asked: Asked) -> list[str]:
    return [part["text"] for message in asked.make().messages for part in message["content"] if part["type"] == "text"]


def test_facts_count_once_each_and_what_is_made_up_counts_against_a_reply():
    assert facts_right("red", "red") == 1 and facts_right("blue", "red") == 0
    assert facts_right("top: red star; left: digit 3", "top: red star; left: digit 4") == 0.5
    assert facts_right("a; b", "a; b; c; d") == pytest.approx(2 * 2 / 6)
    assert facts_right("a; a; a", "a") == pytest.approx(2 * 1 / 4)


def test_every_level_has_its_questions_and_the_same_seed_gives_the_same(sets):
    again, other = make_sets(LIMIT, 0), make_sets(LIMIT, 1)
    for situation, levels in sets.items():
        for level, questions in levels.items():
            assert len(questions) == LIMIT
            assert [texts(asked) for asked in questions] == [texts(asked) for asked in again[situation][level]]
    assert texts(sets["dialogue"]["after 5"][0]) != texts(other["dialogue"]["after 5"][0])


def test_only_what_a_level_names_differs_from_the_next(sets):
    small = [sets["small digit"][f"{side} pixels"] for side in DIGIT_SIDES]
    for same in zip(*small, strict=True):
        assert len({(asked.answer, *texts(asked)) for asked in same}) == 1
        assert len({asked.make().pictures[0].tobytes() for asked in same}) == len(DIGIT_SIDES)
        assert any(corner in texts(same[0])[0] for corner in CORNERS)
    for same in zip(*sets["dialogue"].values(), strict=True):
        assert [len(texts(asked)) for asked in same] == [2 * earlier + 1 for earlier in EARLIER]
        assert len({(texts(asked)[-1], asked.answer) for asked in same}) == 1
        assert len(set(texts(same[-1])[::2])) == EARLIER[-1] + 1  # no question is asked twice
    for once, turns in zip(*sets["two pictures"].values(), strict=True):
        assert once.answer == turns.answer and texts(once)[-1] == texts(turns)[-1]
        shown = [[picture.tobytes() for picture in asked.make().pictures] for asked in (once, turns)]
        assert shown[0] == shown[1] and len(shown[0]) == 2
        assert [part["type"] for part in turns.make().messages[-1]["content"]] == ["image", "text"]
    for same in zip(*sets["other pictures"].values(), strict=True):
        assert len({(asked.answer, *texts(asked)) for asked in same}) == 1
        pictures = [asked.make().pictures[0] for asked in same]
        assert len({picture.tobytes() for picture in pictures}) == len(OTHERS)
        assert {picture.size for picture in pictures} == {pictures[0].size}


def test_crowded_pictures_have_as_many_objects_as_they_say(sets):
    for number in CROWDED:
        assert {asked.answer for asked in sets["crowded, number"][f"{number} objects"]} == {str(number)}
        scene = draw_scene("test", random.Random(number), number)
        assert len(scene.objects) == len({thing.place for thing in scene.objects}) == number and scene.shapes


@pytest.fixture(scope="module")
def document(sets):
    few = {"long answers": {"3 objects": sets["long answers"]["3 objects"][:2]}, "small digit": sets["small digit"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits_run, "make_sets", lambda limit, seed: few)
        return limits_run.measure(
            parse_args(["--model", str(ROOT), "--limit", "3", "--fit", "1:16", "--fit_rows", "8"])
        )


def test_vanilla_equals_itself_and_every_model_has_every_level(document):
    models = [model["name"] for model in document["models"]]
    assert models == ["vanilla", "late fusion", "latent", "random pruning", "latent 1:16"]
    costs = {model["name"]: model["prefill_flops"] for model in document["models"]}
    assert costs["vanilla"] == 1 and costs["random pruning"] <= costs["latent"] < costs["late fusion"] < 1
    assert len(document["rows"]) == len(models) * (1 + len(DIGIT_SIDES))
    for row in document["rows"]:
        if row["model"] == "vanilla":
            assert row["equal"] == 1 and row["minus_vanilla"][0] == 0
        low, high = row["minus_vanilla"][1:]
        assert low < high and 0 <= row["score"] <= 1
    places = document["next_token_equal"]
    assert all(same == of for same, of in places["vanilla"])
    assert {name: [of for _, of in found] for name, found in places.items()} == dict.fromkeys(
        places, [of for _, of in places["vanilla"]]
    )
    assert any(same < of for same, of in places["random pruning"])


def test_next_tokens_are_those_that_the_model_writes_when_the_reply_is_given_token_by_token(sets):
    model = DpvrLlavaForConditionalGeneration.from_pretrained(ROOT, routing="latent").eval()
    processor, asked = load_processor(ROOT), sets["long answers"]["4 objects"][0]
    reply = asked.answer.replace("star", "ring").replace("circle", "cross")  # not what the model would say everywhere
    found = limits_run.next_tokens_equal(model, processor, asked, reply)
    inputs = prompt_inputs(processor, [asked.make()])
    answer = {"role": "assistant", "content": [{"type": "text", "text": reply}]}
    whole = processor.apply_chat_template([*asked.make().messages, answer])
    start = len(processor.apply_chat_template(asked.make().messages, add_generation_prompt=True))
    said = processor.tokenizer(whole[start:], add_special_tokens=False)["input_ids"]
    assert said[-1] == processor.tokenizer.eos_token_id
    expected = []
    for token in said:
        with torch.inference_mode():
            expected.append(int(model(**inputs).logits[0, -1].argmax()) == token)
        more = torch.tensor([[token]])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], more], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    assert found == expected and True in found and False in found


def test_a_fit_of_another_form_is_refused():
    with pytest.raises(ValueError, match="split:rank"):
        main(parse_args(["--model", str(ROOT), "--fit", "one"]))
