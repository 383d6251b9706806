"""What a side branch or a latent is trained on: replies, or what the base itself does.

    sft       cross entropy on the replies, TRL's own           labels are needed
    match     |keys and values that layers read - the base's|²  pictures alone
    distil    KL(base || plan) at text tokens                   pictures and texts, no labels

    layers 0 ... s-1         frozen: run once for both
        |-------------------.
    the base's layers       the plan's streams            the same weights
        |                   |
    logits (B, T, C)        logits (B, T, C)

Rows whose inputs hold pictures for the teacher, `teacher_<name>`, show these to the base, which then runs by itself.
Distillation: https://arxiv.org/abs/1503.02531. Axes: B batch, T tokens, N image tokens of all rows, C vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn

from dpvr.data.prompts import Inputs, split_teacher
from dpvr.training.latent_fit import Target
from forward_dpvr import routed_forward, stock_class
from generation_dpvr import RoutedGeneration
from images_dpvr import image_marks
from twins_dpvr import RoutedLayer, twin
from two_stream_dpvr import TwoStreamPass
from versions_dpvr import argument_names

Objective = Literal["sft", "match", "distil"]
OBJECTIVES = get_args(Objective)


class BaseAndPlanPass(TwoStreamPass):
    """Runs the base and the plan side by side on one batch; below the split both are one.

    The last layer returns the states of both, (2 B, T, D): those of the base, then those of the plan.
    """

    def __call__(self, layer: RoutedLayer, hidden: torch.Tensor, arguments: dict[str, Any], cache: Any) -> Any:
        if layer.index < self.plan.split_layer:
            return super().__call__(layer, hidden, arguments, cache)
        with torch.no_grad():
            base = layer.call(hidden, arguments, cache)
        before = hidden if layer.index == self.plan.split_layer else self.before
        plan = super().__call__(layer, before, arguments, cache)
        self.before = _states(plan)
        if layer.index < len(self.plan.modes) - 1:
            return base
        both = torch.cat([_states(base), self.before])
        return (both, *base[1:]) if isinstance(base, tuple) else both


def _states(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def head_of(model: nn.Module) -> nn.Module:
    """The routed model with its head, within wrappers of adapters."""
    return next(module for module in model.modules() if isinstance(module, RoutedGeneration))


def base_and_plan_logits(model: nn.Module, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, T, C) of the base, without gradient, and of the model under its plan.

    Args:
        model: with a plan of its own or of an adapter.
        inputs: of the model, with images; and `teacher_<name>`, which replaces an input for the base.

    Raises:
        ValueError: if the teacher's tokens differ from the model's.
    """
    head = head_of(model)
    owner, stock = head.model, stock_class(head.model).forward
    inputs, teacher = split_teacher(inputs)

    def routed(arguments: dict[str, Any], **options: Any) -> Any:
        return routed_forward(owner, stock, owner.branch, owner.plan, arguments, **options)

    if teacher is None:
        both = _logits(head, inputs, partial(routed, make_pass=BaseAndPlanPass))
        base, plan = both.chunk(2)
        return base.detach(), plan
    with torch.no_grad():
        base = _logits(head, teacher, lambda arguments: stock(owner, **arguments))
    return base, _logits(head, inputs, routed)


def _logits(head: nn.Module, inputs: Inputs, forward: Callable[[dict[str, Any]], Any]) -> torch.Tensor:
    """The logits of a model whose forward without the head is another function of its arguments."""
    names = argument_names(stock_class(head.model).forward)
    other = twin(head.model)
    vars(other)["forward"] = lambda *args, **kwargs: forward(dict(zip(names, args, strict=False)) | kwargs)
    return type(head).own.forward(twin(head, model=other), **inputs, use_cache=False).logits


def distil_loss(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """KL(base || plan) in nats, the mean over the text tokens of a batch; 0 for a batch without images."""
    own, _ = split_teacher(inputs)
    marks = image_marks(head_of(model).model, own["input_ids"], None)
    if not marks.any():
        return _nothing(model)
    text = ~marks
    if (mask := own.get("attention_mask")) is not None:
        text = text & mask.bool()
    base, plan = (logits[text].float().log_softmax(-1) for logits in base_and_plan_logits(model, inputs))
    return nn.functional.kl_div(plan, base, reduction="sum", log_target=True) / text.sum()


def match_loss(model: nn.Module, inputs: Inputs, deviations: dict[tuple[int, str], float]) -> torch.Tensor:
    """The mean over reading layers of |keys or values that they read - those of the base|² / deviation².

    Args:
        deviations: of the base's keys and values, by layer and kind: `Moments.deviations`.
    """
    own, teacher = split_teacher(inputs)
    target = Target.of(model)
    if not image_marks(target.owner, own["input_ids"], None).any():
        return _nothing(model)
    image_states, wanted = target.run(own, teacher, with_gradient=True)
    made, losses = target.read(image_states), []
    for key, value in wanted.items():
        losses.append((made[key] - value.to(made[key])).pow(2).sum(-1).mean() / deviations[key] ** 2)
    return torch.stack(losses).mean()


def _nothing(model: nn.Module) -> torch.Tensor:
    """Zero, with a gradient of zeros: a trainer's backward needs one."""
    return 0.0 * sum(weight.flatten()[0].float() for weight in model.parameters() if weight.requires_grad)


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., torch.Tensor]) -> Iterator[None]:
    """A module whose forward is another function meanwhile, so that wrappers that share gradients see the call."""
    before = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        if before is not None:
            vars(module)["forward"] = before
