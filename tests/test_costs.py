"""Costs of every family: FLOPs as torch's counter finds them around a decoder, bytes as in a real cache."""

import json
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import PRESENT, forget, make, make_prompts, text_places
from family_checks import plans, with_adapter
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from configuration_dpvr import make_plan
from costs_dpvr import Branch, DecoderCosts, kv_numbers, prefill_flops
from decoders_dpvr import decoder_of
from dpvr.cost_table import count, load_config, make_model, table
from dpvr.costs import parse_args
from versions_dpvr import LINE_4, cache_in

LAYOUT = [[3, 2, 5]]  # two images
CASES = [(name, fields) for name in PRESENT for fields in [{"routing": "none"}, *plans(name)]]
DENSE = {"split_layer": 2, "routing": "kv_substitution", "num_side_layers": 2, "side_branch_mlp": "dense"}
CASES += [("qwen3_vl_moe", DENSE)] if "qwen3_vl_moe" in PRESENT else []


@contextmanager
def flops_of(decoder: type[nn.Module]):
    """A list that gets the FLOPs of each call of a decoder of this class; routed decoders are of its class too."""
    found, stock = [], decoder.forward

    def counted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            output = stock(self, *args, **kwargs)
        rotary = [flops for name, flops in counter.get_flop_counts().items() if "rotary" in name.lower()]
        found.append(counter.get_total_flops() - sum(sum(flops.values()) for flops in rotary))  # products in release 4
        return output

    decoder.forward = counted
    try:
        yield found
    finally:
        decoder.forward = stock


def branch_of(fields: dict[str, Any]) -> Branch:
    if fields["routing"] == "latent":
        return Branch(fields.get("latent_side_layers", 0), fields["latent_rank"])
    return Branch(fields.get("num_side_layers", 1), dense_mlp=fields.get("side_branch_mlp") == "dense")


@pytest.mark.parametrize("name, fields", CASES, ids=str)
@torch.no_grad()
def test_flops_and_cache_bytes_of_a_plan_are_the_counted_ones(name: str, fields: dict[str, Any]) -> None:
    if LINE_4 and name == "qwen3_vl_moe":
        pytest.skip("transformers 4 runs all experts of this decoder on all tokens, and the active ones are counted")
    vanilla = fields["routing"] == "none"
    model = make(name, attention="eager") if vanilla else with_adapter(name, attention="eager", **fields)
    base = model if vanilla else model.base_model.model
    inputs, _ = make_prompts(name, base, LAYOUT)
    text = int(text_places(base, inputs).sum())
    size, config = (inputs["input_ids"].shape[1] - text, text), base.config.get_text_config()
    costs, branch = DecoderCosts.of(config), branch_of(fields)
    plan = (
        make_plan(config.num_hidden_layers, routing="none")
        if vanilla
        else model.peft_config["default"].plan_for(base.config)
    )
    for kept in (1, 0):
        forget(base)
        with flops_of(type(decoder_of(base.model)[1])) as counted:
            output = model(**inputs, use_cache=True, logits_to_keep=kept)
        flops = prefill_flops(costs, plan, *size, branch=branch, logits_to_keep=kept)
        assert [flops - costs.head_flops(kept or sum(size))] == counted
        layers = [layer for layer in cache_in(output).layers if isinstance(vars(layer).get("keys"), torch.Tensor)]
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        assert kv_numbers(costs, plan, *size, branch=branch) * base.dtype.itemsize == held


# -- real shapes ------------------------------------------------------------------------------------------------------

SHAPES = Path(__file__).parent.parent / "configs" / "shapes"
PUBLISHED = {  # parameters of the published weights in billions
    "llava-1.5-7b": 7.063,
    "llava-onevision-0.5b": 0.894,
    "smolvlm2-500m": 0.507,
    "qwen3-vl-2b": 2.128,
    "qwen2.5-vl-7b": 8.292,
    "qwen3-vl-8b": 8.767,
    "internvl3-8b": 7.944,
    "gemma-3-4b": 4.300,
}
EVERYWHERE = {  # share of vanilla's FLOPs at 576 + 128 and 2048 + 128 tokens, all queries of the last layer counted
    "llava-1.5-7b": (0.425, 0.33),
    "qwen2.5-vl-7b": (0.339, 0.24),
    "qwen3-vl-8b": (0.326, 0.22),
}


def asked(shape: str, *more: str) -> Namespace:
    path = str(SHAPES / f"{shape}.json")
    return parse_args([path, "--split_layer", "4", "--image_tokens", "576", *more])


def test_every_shape_is_compared_with_published_weights() -> None:
    assert {path.stem for path in SHAPES.glob("*.json")} == PUBLISHED.keys()


@pytest.mark.parametrize("shape", PUBLISHED)
def test_a_shape_has_as_many_parameters_as_the_published_weights(shape: str) -> None:
    model = make_model(load_config(str(SHAPES / f"{shape}.json")))
    assert model.num_parameters / 1e9 == pytest.approx(PUBLISHED[shape], rel=0.03)


@pytest.mark.parametrize("shape", EVERYWHERE)
def test_a_split_at_an_eighth_that_reads_everywhere_costs_a_third_or_less(shape: str) -> None:
    config = load_config(str(SHAPES / f"{shape}.json")).get_text_config()
    costs, depth = DecoderCosts.of(config), config.num_hidden_layers
    plan = make_plan(depth, routing="kv_substitution", split_layer=round(depth / 8))
    vanilla = make_plan(depth, routing="none")
    for image, expected in zip((576, 2048), EVERYWHERE[shape], strict=True):
        head = costs.head_flops(image + 128) - costs.head_flops(1)
        ours, stock = (prefill_flops(costs, each, image, 128, logits_to_keep=0) - head for each in (plan, vanilla))
        assert ours / stock == pytest.approx(expected, abs=1e-3 if image == 576 else 5e-3)


def test_vanilla_may_be_given_the_short_last_layer_of_the_plans() -> None:
    (plain, short) = (count(asked("qwen3-vl-8b", *more)) for more in ([], ["--short_vanilla"]))
    assert plain["rows"][1:] != short["rows"][1:]  # their shares
    assert [row["prefill_flops"] for row in plain["rows"][1:]] == [row["prefill_flops"] for row in short["rows"][1:]]
    layer = DecoderCosts.of(load_config(str(SHAPES / "qwen3-vl-8b.json")).get_text_config()).layers[-1]
    saved = plain["rows"][0]["prefill_flops"] - short["rows"][0]["prefill_flops"]
    assert saved == layer.flops(704, 704) - layer.flops(1, 704)


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_table_holds_every_plan_and_trained_parameters_are_those_of_the_adapter() -> None:
    found = count(asked("llava-1.5-7b", "--latent_rank", "512", "--budget", "0.4"))
    names = [row["name"] for row in found["rows"]]
    places = ["late_fusion at 4", "kv_substitution at 4", "latent of rank 512 at 4", "text_only at 4"]
    assert names == ["vanilla", *places] and not found["left_out"]
    trained = [row["trained_parameters"] for row in found["rows"]]
    latent = 512 * 4096 + 28 * 2 * (512 * 4096 + 4096)
    assert trained == [0, 202_383_360, 202_383_360, latent, 0]
    shown = table(found)
    assert all(name in shown for name in names) and "Within 0.4 of vanilla's FLOPs: latent of rank 512" in shown


@pytest.mark.parametrize("budget", [0.2, 0.3, 0.31, 1.0])
def test_the_cheapest_plan_within_a_budget_reads_the_image(budget: float) -> None:
    found = count(asked("llava-1.5-7b", "--latent_rank", "512", "--budget", str(budget)))
    fitting = [row for row in found["rows"] if row["prefill_flops_ratio"] <= budget and "text_only" not in row["name"]]
    assert found["cheapest"] == (min(fitting, key=lambda row: row["prefill_flops"])["name"] if fitting else None)
    assert (found["cheapest"] is None) == (budget == 0.2) and "budget" in found and table(found)


def test_plans_that_a_decoder_cannot_run_are_left_out_with_the_reason() -> None:
    found = count(asked("gemma-3-4b", "--latent_rank", "64"))
    assert [row["name"] for row in found["rows"]] == ["vanilla"]
    assert len(found["left_out"]) == 4 and all("choose 6 or more" in reason for reason in found["left_out"].values())
    assert "choose 6 or more" in table(found)


def test_a_folder_counts_as_its_file_does(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((SHAPES / "llava-onevision-0.5b.json").read_text())
    of_folder = count(parse_args([str(tmp_path), "--split_layer", "4", "--image_tokens", "576"]))
    assert of_folder["rows"] == count(asked("llava-onevision-0.5b"))["rows"]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model_type": "strange", "auto_map": {"AutoConfig": "code.Config"}}, "code in a repository is not run"),
        ({"model_type": "llama"}, "answers no questions about images"),
        ({"model_type": "mllama"}, "reads images by cross-attention"),
    ],
)
def test_a_model_that_cannot_be_counted_is_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        count(parse_args([str(tmp_path), "--split_layer", "4", "--image_tokens", "576"]))
