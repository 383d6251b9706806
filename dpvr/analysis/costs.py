"""What a layer plan costs for one prompt, as a share of the vanilla model's prefill FLOPs."""

from typing import Any

from transformers import PretrainedConfig

from configuration_dpvr import LayerPlan, make_plan
from costs_dpvr import DecoderShape, prefill_flops


class PromptCosts:
    """Prefill FLOPs of plans for one prompt size.

    Attributes:
        shape, depth: the decoder's.
        tokens: image and text tokens of the prompt.
        vanilla: FLOPs without a routing.
    """

    def __init__(self, text_config: PretrainedConfig, num_image_tokens: int, num_text_tokens: int) -> None:
        self.shape, self.depth = DecoderShape.of(text_config), text_config.num_hidden_layers
        self.tokens = num_image_tokens, num_text_tokens
        self.vanilla = self.flops(make_plan(self.depth, routing="none"))

    def flops(self, plan: LayerPlan, num_side_layers: int = 1, latent_rank: int = 0) -> int:
        return prefill_flops(self.shape, plan, *self.tokens, num_side_layers=num_side_layers, latent_rank=latent_rank)

    def share(self, **fields: Any) -> float:
        """The FLOPs of a plan, given by the fields of `make_plan`, as a share of vanilla's."""
        plan = make_plan(self.depth, **fields)
        if plan.latent_stride:
            side, rank = fields.get("latent_side_layers", 0), fields["latent_rank"]
        else:
            side, rank = fields.get("num_side_layers", 1), 0
        return self.flops(plan, side, rank) / self.vanilla
