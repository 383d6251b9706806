"""attention.py against the attention weights that the eager kernels themselves return."""

import pytest
import torch
from conftest import IMAGE_TOKEN_ID, TOKENS_PER_IMAGE, make_llava
from reference import SIDE_ROUTINGS

from dpvr.analysis.attention import text_to_image_attention
from modeling_dpvr import DpvrLlavaForConditionalGeneration

PLANS = [{"routing": routing} for routing in SIDE_ROUTINGS] + [{"num_fusion_layers": 2}, {"fusion_layers": [2]}]
IMAGE = [IMAGE_TOKEN_ID] * TOKENS_PER_IMAGE


def make_inputs(ids: list[int]) -> dict[str, torch.Tensor]:
    count = ids.count(IMAGE_TOKEN_ID) // TOKENS_PER_IMAGE
    input_ids = torch.tensor([ids])
    pixels = torch.randn(count, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pixel_values": pixels}


def eager_weights(model, inputs) -> list[torch.Tensor]:
    """Each layer's attention weights (H, queries, keys), as its own eager attention computes them."""
    weights = []
    layers = model.model.language_model.layers
    hooks = [layer.self_attn.register_forward_hook(lambda *call: weights.append(call[2][1][0])) for layer in layers]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        model(**inputs, use_cache=True)
    model.set_attn_implementation("sdpa")
    for hook in hooks:
        hook.remove()
    return weights


@pytest.mark.parametrize("ids", [[1, 3, *IMAGE, 4, 5, 6], [1, *IMAGE, 3, *IMAGE, 4, 5]], ids=["one", "two"])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_mass_and_heat_are_those_of_the_eager_kernels(plan, ids):
    model = DpvrLlavaForConditionalGeneration.from_llava(make_llava(), split_layer=1, **plan)
    inputs = make_inputs(ids)
    found = text_to_image_attention(model, inputs)

    is_image = torch.tensor(ids) == IMAGE_TOKEN_ID
    num_image, after = int(is_image.sum()), [at for at, mark in enumerate(is_image) if not mark and at > ids.index(7)]
    masses, reading = [], []
    for layer, (mode, weights) in enumerate(
        zip(model.config.layer_plan().modes, eager_weights(model, inputs), strict=True)
    ):
        if mode == "text":
            assert weights.shape[1:] == (len(ids) - num_image,) * 2
            masses.append(0.0)
            continue
        if mode == "context":  # image keys come first, all queries are text
            to_image = weights[:, -len(after) :, :num_image]
        else:
            to_image = weights[:, after][:, :, is_image]
        masses.append(to_image.sum(-1).mean().item())
        reading.append((layer, to_image[:, -1].mean(0)))
    assert found.mass == pytest.approx(masses, abs=1e-6)
    layer, heat = reading[-1]
    assert found.layer == layer
    torch.testing.assert_close(found.heat.double(), heat.reshape(-1, TOKENS_PER_IMAGE), atol=1e-6, rtol=0)


def test_the_kernels_and_hooks_are_left_as_they_were():
    model = DpvrLlavaForConditionalGeneration.from_llava(make_llava(), split_layer=2)

    def state() -> tuple:
        kernel = model.config.text_config._attn_implementation
        return kernel, [list(module._forward_hooks) for module in model.modules()]

    text_to_image_attention(model, make_inputs([1, *IMAGE, 3]))  # transformers adds hooks of its own the first time
    before = state()
    text_to_image_attention(model, make_inputs([1, *IMAGE, 3]))
    assert state() == before


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("batch", r"shape \(2, 6\), 8 image tokens and 0 padding tokens"),
        ("padding", r"shape \(1, 6\), 4 image tokens and 1 padding tokens"),
        ("no picture", r"shape \(1, 3\), 0 image tokens and 0 padding tokens"),
    ],
)
def test_prompts_that_it_cannot_measure_are_refused(fault, found):
    model = DpvrLlavaForConditionalGeneration.from_llava(make_llava(), split_layer=2)
    inputs = make_inputs([1, *IMAGE, 3])
    if fault == "batch":
        inputs = {name: torch.cat([tensor, tensor]) for name, tensor in inputs.items()}
    if fault == "padding":
        inputs["attention_mask"][0, 0] = 0
    if fault == "no picture":
        inputs["input_ids"] = torch.tensor([[1, 3, 4]])
        inputs["attention_mask"] = torch.ones(1, 3)
    with pytest.raises(ValueError, match=f"{found}: attention is measured on one prompt at a time"):
        text_to_image_attention(model, inputs)
