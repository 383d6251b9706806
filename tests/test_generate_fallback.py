"""generate(..., fallback_below=...): replies that the plan was unsure of are those of the base."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import TextStreamer

from adapter_dpvr import DpvrConfig
from dpvr.data.prompts import prompt_inputs
from dpvr.inference.evaluation import conversation
from dpvr.models import as_base
from generation_dpvr import least_leads, put_rows
from minibench.data import make_items
from modeling_dpvr import DpvrLlavaForConditionalGeneration
from processors_dpvr import load_processor
from tests.families import FAMILIES, PRESENT, make, make_prompts

ROOT = Path(__file__).parent.parent
GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module")
def model() -> DpvrLlavaForConditionalGeneration:
    return DpvrLlavaForConditionalGeneration.from_pretrained(ROOT, routing="latent").eval()


@pytest.fixture(scope="module")
def inputs():
    """Eight rows, of one picture and of two."""
    items = make_items("test", 4, 3, ["scene", "multi_image"])
    return prompt_inputs(load_processor(ROOT), [conversation(item, item.questions[0][0]) for item in items])


def rows_alone(model, inputs, **options) -> list[list[int]]:
    """The new ids of each row of a batch, up to its padding."""
    ids = model.generate(**inputs, **GREEDY, **options)[:, inputs["input_ids"].shape[1] :]
    return [[token for token in row if token != model.generation_config.pad_token_id] for row in ids.tolist()]


def naive_leads(model, inputs) -> list[float]:
    """Of every row, the least difference between the two likeliest tokens, from whole forwards without a cache."""
    ids, mask, found = inputs["input_ids"], inputs["attention_mask"], []
    for row in rows_alone(model, inputs):
        found.append([])
        for place in range(len(row)):
            new = torch.tensor([row[:place]], dtype=torch.long).expand(len(ids), -1)
            more = {
                "input_ids": torch.cat([ids, new], 1),
                "attention_mask": torch.cat([mask, torch.ones_like(new)], 1),
            }
            logits = model(**{**inputs, **more}).logits[len(found) - 1, -1]
            first, second = logits.double().softmax(dim=-1).topk(2).values.tolist()
            found[-1].append(first - second)
    return [min(leads) for leads in found]


@torch.no_grad()
def test_rows_below_the_lead_are_the_bases_and_the_others_the_plans(model, inputs):
    leads = naive_leads(model, inputs)
    middle = sorted(leads)[len(leads) // 2 - 1 : len(leads) // 2 + 1]
    below = sum(middle) / 2
    plan = rows_alone(model, inputs)
    with as_base(model):
        base = rows_alone(model, inputs)
    expected = [one if lead < below else other for lead, one, other in zip(leads, base, plan, strict=True)]
    assert rows_alone(model, inputs, fallback_below=below) == expected
    assert model.fell_back == [lead < below for lead in leads] and sum(model.fell_back) == len(leads) // 2
    assert rows_alone(model, inputs, fallback_below=0.0) == plan and not any(model.fell_back)
    assert rows_alone(model, inputs, fallback_below=1.0) == base and all(model.fell_back)
    assert rows_alone(model, inputs) == plan  # the plan is as it was


def test_of_a_vanilla_model_nothing_is_made_again(model, inputs):
    with as_base(model):
        assert rows_alone(model, inputs, fallback_below=1.0) == rows_alone(model, inputs)
    assert model.fell_back == [False] * len(inputs["input_ids"])


def test_what_comes_after_an_end_token_does_not_count():
    sure, unsure = torch.tensor([9.0, 0.0, 0.0]), torch.tensor([0.0, 0.1, 0.0])
    sequences = torch.tensor([[7, 0, 2, 1], [7, 0, 1, 0]])  # 2 is an end token
    logits = (torch.stack([sure, sure]), torch.stack([sure, sure]), torch.stack([unsure, unsure]))
    first, second = least_leads(logits, sequences, [2, 5]).tolist()
    assert first > 0.99 and second < 0.1
    assert least_leads(logits, sequences, None).max() < 0.1


def test_rows_are_put_in_place_and_filled_up():
    whole, others = torch.tensor([[1, 2], [3, 4], [5, 6]]), torch.tensor([[7, 8, 9]])
    assert put_rows(whole, [1], others, 0).tolist() == [[1, 2, 0], [7, 8, 9], [5, 6, 0]]
    assert put_rows(torch.tensor([[1, 2, 3], [4, 5, 6]]), [0], torch.tensor([[7, 8]]), 0).tolist() == [
        [7, 8, 0],
        [4, 5, 6],
    ]


@pytest.mark.parametrize(
    "options, named",
    [
        ({"fallback_below": 1.5}, "from 0 to 1"),
        ({"fallback_below": 0.5, "do_sample": True}, "do_sample"),
        ({"fallback_below": 0.5, "num_beams": 2}, "num_beams"),
        ({"fallback_below": 0.5, "streamer": TextStreamer(None)}, "streamer"),
        ({"fallback_below": 0.5, "return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"fallback_below": 0.5, "prompt_lookup_num_tokens": 2}, "assistant_model"),
    ],
)
def test_what_cannot_fall_back_is_refused_before_anything_runs(model, inputs, options, named, monkeypatch):
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: pytest.fail("it ran"))
    with pytest.raises(ValueError, match=named):
        model.generate(**inputs, **{**GREEDY, **options})


@pytest.mark.parametrize("name", [name for name in ("qwen2_5_vl", "smolvlm", "internvl") if name in PRESENT])
def test_a_conversation_and_a_row_of_a_batch_of_any_family_fall_back(name):
    stock = make(name)
    batch, alone = make_prompts(name, stock, [[4, 3], [5, 6]])
    with torch.no_grad():
        base = [stock.generate(**one, **GREEDY) for one in alone]
        fields = {"routing": "kv_substitution", "split_layer": FAMILIES[name].split}
        model = get_peft_model(stock, DpvrConfig(**fields, side_branch_init="random")).eval()
        plan = [model.generate(**one, **GREEDY) for one in alone]
        assert any(one.tolist() != other.tolist() for one, other in zip(base, plan, strict=True))
        for one, wanted, usual in zip(alone, base, plan, strict=True):
            assert model.generate(**one, **GREEDY, fallback_below=1.0).tolist() == wanted.tolist()
            assert model.generate(**one, **GREEDY, fallback_below=0.0).tolist() == usual.tolist()
        both = model.generate(**batch, **GREEDY, fallback_below=1.0)
        assert both[:, -8:].tolist() == [row[0, -8:].tolist() for row in base]
        first = model.generate(**batch, **GREEDY, return_dict_in_generate=True, output_logits=True)
        between = least_leads(first.logits, first.sequences, None).mean().item()
        mixed = model.generate(**batch, **GREEDY, fallback_below=between)
        assert sorted(model.fell_back) == [False, True]
        expected = [one if again else usual for one, usual, again in zip(base, plan, model.fell_back, strict=True)]
        assert mixed[:, -8:].tolist() == [row[0, -8:].tolist() for row in expected]
