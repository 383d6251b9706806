"""A latent read at the image tokens that the prompt's last token looks at most, or at random ones.

`latent_score` chooses by what the image states are, which costs next to nothing and does not depend on the text. Here
the rank of FastV takes its place, or chance:

    read = choose(model, rank="attention")       a DPVR-LLaVA under routing "latent", with a stride above 1
    read.generate(**inputs, max_new_tokens=20)

As a latent's own choice it is made picture by picture, at the split. Inference only, with a cache, and a prompt in one
piece: the last token given with an image is the one that ranks. Axes: B batch, T tokens, V image tokens, D width.
"""

from functools import partial, wraps
from typing import Any, Literal, NamedTuple

import torch
from transformers.models.llava.modeling_llava import LlavaModel
from transformers.utils import can_return_tuple

from configuration_dpvr import LayerPlan
from costs_dpvr import DecoderCosts
from dpvr.benchmarks.ranking import RANKS, RankingPass, ranking_flops
from forward_dpvr import routed_forward
from modeling_dpvr import DpvrLlavaForConditionalGeneration, DpvrLlavaModel
from streams_dpvr import Runs
from twins_dpvr import twin
from versions_dpvr import argument_names

NAMES = argument_names(LlavaModel.forward)


class Choice(NamedTuple):
    """How image tokens are chosen, as `choose` takes it, and the plan under which they are."""

    plan: LayerPlan
    rank: str
    seed: int


class ReadingPass(RankingPass):
    """A forward pass whose latent is read at the image tokens with the best ranks."""

    def scores(self, states: torch.Tensor, runs: Runs) -> torch.Tensor:
        slots = (self.streams.image - self.past).clamp(min=0)
        return self.ranked().gather(1, slots).to(states.device)


class ChosenModel(DpvrLlavaModel):
    """A DPVR-LLaVA without its head whose latent is read as its `choice` says."""

    choice: Choice

    @property
    def plan(self) -> LayerPlan:
        return self.choice.plan

    @can_return_tuple
    @wraps(LlavaModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        arguments = dict(zip(NAMES, args, strict=False)) | kwargs
        how = {"rank": self.choice.rank, "seed": self.choice.seed, "valid": arguments.get("attention_mask")}
        make_pass = partial(ReadingPass, **how)
        return routed_forward(self, LlavaModel.forward, self.branch, self.plan, arguments, make_pass=make_pass)


class Chosen(DpvrLlavaForConditionalGeneration):
    """A DPVR-LLaVA that `choose` made."""

    choice: Choice

    def prefill_flops(
        self, num_image_tokens: int, num_text_tokens: int, *, batch_size: int = 1, logits_to_keep: int = 1
    ) -> int:
        """As `CountedCosts.prefill_flops`, with what the ranks take."""
        tokens, plan = (num_image_tokens, num_text_tokens), self.choice.plan
        flops = super().prefill_flops(*tokens, batch_size=batch_size, logits_to_keep=logits_to_keep)
        costs = DecoderCosts.of(self.config.text_config)
        return flops + batch_size * ranking_flops(costs, self.choice.rank, *tokens, layer=plan.split_layer - 1)


def choose(
    model: DpvrLlavaForConditionalGeneration, *, rank: Literal["attention", "random"], seed: int = 0
) -> DpvrLlavaForConditionalGeneration:
    """A model that shares all weights with `model`, whose latent is read at other image tokens, as many.

    Args:
        model: under routing "latent".
        rank: "attention" is FastV's, of the last layer below the split; "random" the control.
        seed: of the random ranks, which depend on it and on a row's number of image tokens alone.

    Raises:
        ValueError: for a plan that chooses no tokens, and ranks that it cannot have.
    """
    plan = model.model.plan
    if plan.latent_stride < 2:
        raise ValueError(
            f"The plan {plan} reads all image tokens or no latent: choose tokens under routing='latent' with "
            "latent_stride=2 or more."
        )
    if rank not in RANKS:
        raise ValueError(f"rank is {rank!r}: choose {' or '.join(map(repr, RANKS))}.")
    if rank == "attention" and plan.split_layer == 0:
        raise ValueError(
            "rank is 'attention', and with latent_split_layer=0 no layer attends to the image before tokens are "
            "chosen: use rank='random', or split 1 or more."
        )
    owner, chosen = twin(model.model), twin(model)
    owner.__class__, chosen.__class__ = ChosenModel, Chosen
    vars(chosen)["_modules"] = {**model._modules, "model": owner}
    vars(owner)["choice"] = vars(chosen)["choice"] = Choice(plan._replace(latent_score=rank), rank, seed)
    return chosen
