"""fallback.py: replies that were unsure are made again by vanilla; what that saves, and what still differs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dpvr.benchmarks import fallback_run
from dpvr.benchmarks.fallback import main, parse_args
from dpvr.benchmarks.fallback_run import SIGNALS, fallbacks, say, threshold_for
from dpvr.data.prompts import prompt_inputs
from dpvr.inference.evaluation import conversation
from minibench.data import make_items
from modeling_dpvr import DpvrLlavaForConditionalGeneration
from processors_dpvr import load_processor

ROOT = Path(__file__).parent.parent


def test_a_threshold_is_the_lowest_that_keeps_the_promise():
    signal = np.array([0.1, 0.2, 0.2, 0.5, 0.9, 0.95, 0.96, 0.97, 0.98])
    differ = np.array([True, True, False, True, False, False, False, False, False])
    # (differing replies that stay + 1) / 10 <= tolerated
    assert threshold_for(signal, differ, 0.4) == 0.1  # none is made again
    assert threshold_for(signal, differ, 0.3) == 0.2
    assert threshold_for(signal, differ, 0.2) == 0.5  # of equal signals all or none
    assert threshold_for(signal, differ, 0.1) == 0.9
    with pytest.raises(ValueError, match="9 replies cannot show .* ask at least 20 questions"):
        threshold_for(signal, differ, 0.05)
    assert threshold_for(signal, np.ones(9, bool), 0.1) == np.inf  # everything is


def test_thresholds_hold_their_promise_on_the_average_of_like_data():
    rng, shares = np.random.default_rng(0), []
    for _ in range(200):
        signal = rng.random(400)
        differ = rng.random(400) < 0.3 * (1 - signal)
        threshold = threshold_for(signal[:200], differ[:200], 0.05)
        shares.append((differ[200:] & (signal[200:] >= threshold)).mean())
    assert 0.03 < np.mean(shares) <= 0.05


def test_signals_are_those_of_the_tokens_that_a_model_said():
    model, processor = DpvrLlavaForConditionalGeneration.from_pretrained(ROOT, routing="latent"), load_processor(ROOT)
    items = make_items("validation", 2, 0, ["scene", "science"])
    makers = [lambda item=item: conversation(item, item.questions[0][0]) for item in items]
    found = say(model.eval(), processor, makers, "latent")
    for index, make in enumerate(makers):
        inputs, two = prompt_inputs(processor, [make()]), []
        while inputs["input_ids"][0, -1] != processor.tokenizer.eos_token_id:
            with torch.inference_mode():
                best = model(**inputs).logits[0, -1].softmax(dim=-1).topk(2)
            two.append(best.values.double())
            inputs["input_ids"] = torch.cat([inputs["input_ids"], best.indices[None, :1]], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        probability, second = torch.stack(two).T.numpy()
        expected = {
            "least lead": min(probability - second),
            "first lead": probability[0] - second[0],
            "least probability": min(probability),
            "mean log probability": np.log(probability).mean(),
        }
        assert {name: values[index] for name, values in found.signals.items()} == pytest.approx(expected, abs=1e-5)


def test_what_is_made_again_costs_a_prefill_of_vanilla_and_no_longer_differs():
    def said(signal):
        return fallback_run.Said(["a"] * 100, dict.fromkeys(SIGNALS, np.array(signal)))

    signals = {"validation": np.linspace(0, 1, 100), "test": np.linspace(0, 1, 100)[::-1]}
    differ = {"validation": np.arange(100) < 10, "test": np.arange(100) >= 92}
    own = {name: said(signal) for name, signal in signals.items()}
    row = next(fallbacks(own, differ, 0.4, [0.05]))
    assert (np.arange(100) < 10).sum() == 10 and row["threshold"] == pytest.approx(6 / 99)  # 4 stay: 5 of 101
    assert row["on"]["test"] == pytest.approx({"again": 0.06, "differ": 0.02, "prefill_flops": 0.46})


def test_the_command_writes_json_that_others_can_read(tmp_path, monkeypatch):
    monkeypatch.setattr(fallback_run, "OTHERS", ("small digit",))
    words = f"--model {ROOT} --limit 2 --splits 2 --rank 8 --fit_rows 8 --tolerated 0.3 --output {tmp_path / 'f.json'}"
    main(parse_args(words.split()))
    document = json.loads((tmp_path / "f.json").read_text(), parse_constant=pytest.fail)
    assert document["plans"][0]["prefill_flops"] > document["prefill_flops"]
    assert {row["signal"] for row in document["fallbacks"]} == set(SIGNALS)
    assert all(row["on"]["validation"]["differ"] <= 0.3 for row in document["fallbacks"])
