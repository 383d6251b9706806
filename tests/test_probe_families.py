"""The probe and its plan finder on every family, against stock forwards, eager attention and adapters of the plans."""

import json

import pytest
import torch
from families import FAMILIES, PRESENT, forget, make, make_prompts, text_places
from family_processors import KINDS, WITH_PROCESSOR, make_with_processor, save_family
from naive_families import Watched, exact
from peft import get_peft_model
from torch.nn import functional
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from adapter_dpvr import DpvrConfig
from decoders_dpvr import check_decoder, decoder_of, lowest_split
from dpvr.analysis.plan_search import Plan, effects, readers, splits
from dpvr.analysis.probe import main, parse_args
from dpvr.analysis.saturation import ProbeBatch, Sample, measure
from dpvr.data.prompts import AnsweredPrompts, in_batches
from minibench.data import to_hf_dataset
from versions_dpvr import LINE_4

LAYOUT, ANSWER, TOLERANCE = [[2, 5], [1, 2, 6], [6, 4]], 2, 1e-9
COMMAND = [name for name in ("internvl", "qwen3_vl", "qwen3_5", "gemma3", "smolvlm") if name in WITH_PROCESSOR]
MEASURED = [name for name in PRESENT if name != "paligemma"]  # has no chat template, so no conversation to measure


def kl(expected: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    """KL(expected || got) of logits (..., vocabulary)."""
    return functional.kl_div(got.log_softmax(-1), expected.log_softmax(-1), reduction="none", log_target=True).sum(-1)


def labels_of(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -ANSWER:] = inputs["input_ids"][:, -ANSWER:]
    return labels


def head_of(model, states: torch.Tensor) -> torch.Tensor:
    """Logits of states (T, D) after any layer, put before the decoder's own norm in a stock forward."""
    decoder, ids = decoder_of(model.model)[1], torch.full((1, len(states)), 5)
    hook = decoder.norm.register_forward_pre_hook(lambda module, args: (states[None],))
    try:
        return model(input_ids=ids, use_cache=False).logits[0]
    finally:
        hook.remove()
        forget(model)


@torch.no_grad()
def naive(name: str, inputs: dict[str, torch.Tensor]) -> Sample:
    """The first statistics of one row, from what the stock model shows of itself."""
    model, found = make(name, attention="eager"), Sample()
    decoder, ends = decoder_of(model.model)[1], []
    hook = decoder.layers[-1].register_forward_hook(
        lambda _, args, output: ends.append(output[0] if isinstance(output, tuple) else output)
    )
    watched = Watched(model, decoder, inputs)
    hook.remove()
    forget(model)
    attentions = iter(model(**inputs, output_attentions=True, use_cache=False).attentions)
    forget(model)
    image = ~text_places(model, inputs)[0]
    after = ~image & (torch.arange(len(image)) > image.nonzero()[0])
    states = [watched.states(index)[0] for index in range(len(decoder.layers))] + [ends[0][0]]
    reading = readers(model.config, 0)
    for index, (before, state) in enumerate(zip(states[:-1], states[1:], strict=True)):
        heads = model.config.get_text_config().num_attention_heads
        mass = (
            next(attentions)[0][:, after][..., image].sum(-1).mean(-1).tolist() if index in reading else [0.0] * heads
        )
        found.attention_mass.append(mass)
        cosine, lens = functional.cosine_similarity(before, state, dim=-1), kl(watched.logits, head_of(model, state))
        for kind, tokens in (("image", image), ("text", ~image)):
            found.cosine[kind].append(cosine[tokens].mean().item())
            found.logit_lens_kl[kind].append(lens[tokens].mean().item())
    return found


@pytest.mark.parametrize("name", MEASURED)
def test_the_statistics_of_a_padded_batch_are_those_of_its_rows_in_the_stock_model(name):
    with exact():
        model = make(name)
        inputs, alone = make_prompts(name, model, LAYOUT)
        found = measure(model, inputs, labels_of(inputs), chunk=5)
        for inputs_of_row, sample in zip(alone, found, strict=True):
            want = naive(name, inputs_of_row)
            for statistic in ("cosine", "logit_lens_kl"):
                for kind in ("image", "text"):
                    assert vars(sample)[statistic][kind] == pytest.approx(
                        vars(want)[statistic][kind], abs=TOLERANCE
                    ), statistic
            for got, expected in zip(sample.attention_mass, want.attention_mass, strict=True):
                assert got == pytest.approx(expected, abs=1e-6)  # of float32 softmax


@torch.no_grad()
def effect_of_adapter(name: str, plan: Plan, alone: list[dict[str, torch.Tensor]]) -> float:
    """The mean KL of the answers under an untrained adapter of a plan, row by row."""
    graph = {"fusion_layers": list(plan.fusion_layers)} if plan.fusion_layers else {"routing": "text_only"}
    model, distances = get_peft_model(make(name), DpvrConfig(split_layer=plan.split_layer, **graph)).eval(), []
    for inputs in alone:
        forget(model)
        routed = model(**inputs).logits[0, -ANSWER - 1 : -1]
        with model.disable_adapter():
            forget(model)
            vanilla = model(**inputs).logits[0, -ANSWER - 1 : -1]
        distances.append(kl(vanilla, routed).mean().item())
    return sum(distances) / len(distances)


@pytest.mark.parametrize("name", MEASURED)
def test_the_effects_of_plans_are_those_of_untrained_adapters(name):
    with exact():
        model = make(name)
        allowed, depth = splits(model.config), FAMILIES[name].depth
        inputs, alone = make_prompts(name, model, LAYOUT)
        low, high = allowed[0], allowed[-1]
        deep = readers(model.config, low)
        plans = [Plan(low, ()), Plan(low, deep), Plan(low, deep[:1]), Plan(low, deep[-1:]), Plan(high, (depth - 1,))]
        found = effects(model, [(inputs, labels_of(inputs))], plans, "test")
        for plan in plans:
            assert found[plan].kl == pytest.approx(effect_of_adapter(name, plan, alone), abs=TOLERANCE)
    assert len({round(effect.kl, 8) for effect in found.values()}) == len(plans)


@pytest.mark.parametrize("name", [name for name in WITH_PROCESSOR if KINDS[name].template])
@torch.no_grad()
def test_a_batch_of_prompts_with_pictures_of_many_sizes_gives_what_they_give_alone(name):
    model, processor = make_with_processor(name)
    rows = list(to_hf_dataset("validation", 6, questions_per_row=1))
    for row, size in zip(rows, [(96, 96), (96, 40), (30, 96)] * 2, strict=True):
        row["images"] = [picture.resize(size) for picture in row["images"]]
    prompts = list(AnsweredPrompts(processor, rows, 6))
    ((inputs, labels),) = in_batches(prompts, 6)
    together = model(**inputs).logits
    for got, label, (alone, own) in zip(together, labels, prompts, strict=True):
        length = own.shape[1]
        forget(model)
        assert torch.allclose(got[:length], model(**alone).logits[0], atol=1e-4)
        assert torch.equal(label[:length], own[0]) and bool((label[length:] == -100).all())
    assert len({own.shape[1] for _, own in prompts}) > 1


@pytest.mark.skipif(LINE_4, reason="transformers 4 does not build these from their default configs")
@pytest.mark.parametrize(
    ("name", "message"),
    [("mllama", "'mllama' reads images by cross-attention"), ("blip-2", "no head on a model|has no decoder")],
)
def test_models_without_image_tokens_in_a_decoder_of_theirs_are_refused(name, message):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[name]())
    with pytest.raises(ValueError, match=message):
        ProbeBatch(model, {}, torch.zeros(1, 2))


@pytest.mark.parametrize("name", PRESENT)
def test_the_lowest_split_is_the_lowest_that_is_allowed(name):
    config = make(name, torch.float32).config
    assert lowest_split(config) == FAMILIES[name].split
    check_decoder(config, lowest_split(config))
    if lowest_split(config) > 1:
        with pytest.raises(ValueError, match=f"choose {lowest_split(config)} or more"):
            check_decoder(config, lowest_split(config) - 1)


@pytest.mark.skipif(LINE_4, reason="the script is tested with transformers 5 alone")
@pytest.mark.parametrize("name", COMMAND)
def test_the_command_measures_a_family_by_its_own_template_and_finds_plans_that_it_allows(name, tmp_path, capsys):
    save_family(name, tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out"), "--num_samples", "5"]
    options += ["--batch_size", "2", "--find_plan", "0.98", "--plan_samples", "4", "--tuned_lens", "2"]
    found = main(parse_args(options))
    shown, allowed = capsys.readouterr().out, FAMILIES[name].split
    assert found["num_samples"] == 5 and found["papers_split"] >= allowed
    assert found["recommended_split"] is None or found["recommended_split"] >= allowed
    plans = json.loads((tmp_path / "out" / "plans.json").read_text())
    assert f"python train_sft.py --plan {tmp_path / 'out' / 'plan_0.98.yaml'}" in shown
    for point in [*plans["plans"].values(), *plans["frontier"]]:
        graph = {"fusion_layers": point["fusion_layers"]} if point["fusion_layers"] else {"routing": "text_only"}
        get_peft_model(make(name, torch.float32), DpvrConfig(split_layer=point["split_layer"], **graph))


@pytest.mark.skipif("paligemma" not in WITH_PROCESSOR, reason="this release does not have the family")
def test_a_model_without_a_chat_template_is_refused(tmp_path):
    save_family("paligemma", tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out"), "--num_samples", "2"]
    with pytest.raises(ValueError, match="has no chat template"):
        main(parse_args(options))
