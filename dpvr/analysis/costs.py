"""What a layer plan costs for one prompt, as a share of the vanilla model's prefill FLOPs."""

from typing import Any

from transformers import PretrainedConfig

from configuration_dpvr import LayerPlan, make_plan, vanilla_plan
from costs_dpvr import ONE_LAYER, Branch, DecoderCosts, prefill_flops


class PromptCosts:
    """Prefill FLOPs of plans for one prompt size.

    Attributes:
        counted, depth: the decoder's.
        tokens: image and text tokens of the prompt.
        vanilla: FLOPs without a routing.
    """

    def __init__(self, text_config: PretrainedConfig, num_image_tokens: int, num_text_tokens: int) -> None:
        self.counted, self.depth = DecoderCosts.of(text_config), text_config.num_hidden_layers
        self.tokens = num_image_tokens, num_text_tokens
        self.vanilla = self.flops(vanilla_plan(self.depth))

    def flops(self, plan: LayerPlan, branch: Branch = ONE_LAYER) -> int:
        return prefill_flops(self.counted, plan, *self.tokens, branch=branch)

    def share(self, **fields: Any) -> float:
        """The FLOPs of a plan, given by the fields of `make_plan`, as a share of vanilla's."""
        plan = make_plan(self.depth, **fields)
        branch = Branch.of(plan, {"num_side_layers": 1, "latent_side_layers": 0, **fields})
        return self.flops(plan, branch) / self.vanilla
