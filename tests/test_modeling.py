"""modeling_dpvr.py: the layer plan that a model runs is always the one that its config describes, and is made once."""

from collections.abc import Callable

import pytest
import torch
from conftest import IMAGE_TOKEN_ID, TOKENS_PER_IMAGE, make_llava

import configuration_dpvr
from loading_dpvr import is_side_branch
from modeling_dpvr import DpvrLlavaForConditionalGeneration


@pytest.fixture
def model() -> DpvrLlavaForConditionalGeneration:
    """A decoder of six layers, of which the two past the split attend to the image."""
    return DpvrLlavaForConditionalGeneration.from_llava(make_llava(depth=6), split_layer=2, fusion_layers=[3, 5])


@torch.no_grad()
def logits(model: DpvrLlavaForConditionalGeneration) -> torch.Tensor:
    """Logits (vocabulary,) after a prompt with an image."""
    ids = torch.tensor([[1, *[IMAGE_TOKEN_ID] * TOKENS_PER_IMAGE, 9, 10]])
    pixels = torch.linspace(-1, 1, 192, dtype=torch.float64).view(1, 3, 8, 8)
    return model(input_ids=ids, pixel_values=pixels).logits[0, -1]


CHANGES = {
    "split_layer": (lambda model: setattr(model.config, "split_layer", 3), "ooo|c.c"),
    "routing": (lambda model: model.set_routing("kv_substitution"), "oo|cccc"),
    "vanilla": (lambda model: model.set_routing("none"), "oooooo|"),
    "fusion_layers": (lambda model: setattr(model.config, "fusion_layers", [4]), "oo|..c."),
    "a list changed in place": (lambda model: model.config.fusion_layers.__setitem__(0, 4), "oo|..cc"),
    "a list that grew": (lambda model: model.config.fusion_layers.insert(1, 4), "oo|.ccc"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_config_changes_the_plan_of_the_next_call(
    model: DpvrLlavaForConditionalGeneration, change: str
) -> None:
    apply, plan = CHANGES[change]
    before = logits(model)
    assert str(model.model.plan) == "oo|.c.c"
    apply(model)
    after = logits(model)
    assert str(model.model.plan) == plan and not torch.allclose(after, before)
    fresh = DpvrLlavaForConditionalGeneration.from_llava(make_llava(depth=6), **model.config.dpvr_fields())
    fresh.load_side_branch({name: weight for name, weight in model.state_dict().items() if is_side_branch(name)})
    assert torch.equal(after, logits(fresh))


@pytest.mark.parametrize(
    ("contradict", "message"),
    [
        (lambda config: setattr(config, "split_layer", 6), "split_layer is 6, but this decoder has 6 layers"),
        (lambda config: setattr(config, "routing", "late"), "routing is 'late'"),
        (lambda config: config.fusion_layers.append(6), r"fusion_layers is \[3, 5, 6\]"),
        (lambda config: setattr(config, "num_fusion_layers", 3), "num_fusion_layers is 3, but fusion_layers lists 2"),
    ],
)
def test_a_contradiction_set_later_is_refused_at_every_call_until_it_is_mended(
    model: DpvrLlavaForConditionalGeneration, contradict: Callable, message: str
) -> None:
    before, config = logits(model), model.config
    contradict(config)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            logits(model)
    config.split_layer, config.routing, config.num_fusion_layers = 2, "late_fusion", 1
    config.fusion_layers = [3, 5]
    assert torch.equal(logits(model), before)


def test_the_plan_is_made_once_for_many_calls(
    model: DpvrLlavaForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, make_plan = [], configuration_dpvr.make_plan

    def counting(*args: object, **kwargs: object) -> configuration_dpvr.LayerPlan:
        made.append(kwargs)
        return make_plan(*args, **kwargs)

    monkeypatch.setattr(configuration_dpvr, "make_plan", counting)
    logits(model)
    plan = model.model.plan
    logits(model)
    assert len(made) == 1 and model.model.plan is plan
    model.config.split_layer = 3
    logits(model)
    logits(model)
    assert len(made) == 2
