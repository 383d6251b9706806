"""Costs of every family: FLOPs as torch's counter finds them around a decoder, bytes as in a real cache."""

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families import PRESENT, make, make_prompts, text_places
from family_checks import plans, with_adapter
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from configuration_dpvr import make_plan
from costs_dpvr import Branch, DecoderCosts, kv_numbers, prefill_flops
from decoders_dpvr import decoder_of
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
        found.append(counter.get_total_flops())
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


@pytest.mark.parametrize("kept", [1, 0])
@pytest.mark.parametrize("name, fields", CASES, ids=str)
@torch.no_grad()
def test_flops_and_cache_bytes_of_a_plan_are_the_counted_ones(name: str, fields: dict[str, Any], kept: int) -> None:
    if LINE_4 and name == "qwen3_vl_moe":
        pytest.skip("transformers 4 runs all experts of this decoder on all tokens, and the active ones are counted")
    vanilla = fields["routing"] == "none"
    model = make(name, attention="eager") if vanilla else with_adapter(name, attention="eager", **fields)
    base = model if vanilla else model.base_model.model
    inputs, _ = make_prompts(name, base, LAYOUT)
    with flops_of(type(decoder_of(base.model)[1])) as counted:
        output = model(**inputs, use_cache=True, logits_to_keep=kept)
    text = int(text_places(base, inputs).sum())
    size, config = (inputs["input_ids"].shape[1] - text, text), base.config.get_text_config()
    costs, branch = DecoderCosts.of(config), branch_of(fields)
    plan = (
        make_plan(config.num_hidden_layers, routing="none")
        if vanilla
        else model.peft_config["default"].plan_for(base.config)
    )
    flops = prefill_flops(costs, plan, *size, branch=branch, logits_to_keep=kept)
    assert [flops - costs.head_flops(kept or sum(size))] == counted
    layers = [layer for layer in cache_in(output).layers if isinstance(vars(layer).get("keys"), torch.Tensor)]
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    assert kv_numbers(costs, plan, *size, branch=branch) * base.dtype.itemsize == held
