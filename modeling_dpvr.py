"""DPVR-LLaVA: LLaVA with late-layer fusion, as Hugging Face remote code.

Late-Layer Fusion is Enough: Dual-Path Vision Token Routing, https://arxiv.org/abs/2606.09131, section 3.

    input_ids, pixel_values
        routing "none", or no image in the prompt   -> stock LLaVA
        any other routing                           -> stock LLaVA on twins, whose decoder layers are routed
    text states -> lm_head -> logits                   (forward_dpvr.py)

Everything but `side_branch` is a stock `LlavaForConditionalGeneration`, so vanilla checkpoints load as they are, and a
repository may hold the side branch alone and name its base.
"""

from torch import nn
from transformers import LlavaForConditionalGeneration
from transformers.cache_utils import Cache
from transformers.models.llava.modeling_llava import LlavaModel

try:  # all files of the project's: the Hub's loader fetches what this one imports, and no further
    from .cache_dpvr import DecodeStep
    from .configuration_dpvr import DpvrLlavaConfig, LayerPlan
    from .costs_dpvr import CostFormulas
    from .forward_dpvr import check_support, routed_model
    from .generation_dpvr import routed
    from .hub_dpvr import Sharing
    from .images_dpvr import image_marks  # noqa: F401
    from .loading_dpvr import SideBranchLoading, is_side_branch, make_side_branch
    from .streams_dpvr import Streams  # noqa: F401
    from .twins_dpvr import RoutedLayer  # noqa: F401
    from .two_stream_dpvr import TwoStreamPass  # noqa: F401
    from .versions_dpvr import LINE_4  # noqa: F401
except ImportError:
    from cache_dpvr import DecodeStep
    from configuration_dpvr import DpvrLlavaConfig, LayerPlan
    from costs_dpvr import CostFormulas
    from forward_dpvr import check_support, routed_model
    from generation_dpvr import routed
    from hub_dpvr import Sharing
    from images_dpvr import image_marks  # noqa: F401
    from loading_dpvr import SideBranchLoading, is_side_branch, make_side_branch
    from streams_dpvr import Streams  # noqa: F401
    from twins_dpvr import RoutedLayer  # noqa: F401
    from two_stream_dpvr import TwoStreamPass  # noqa: F401
    from versions_dpvr import LINE_4  # noqa: F401


class DpvrLlavaModel(routed_model(LlavaModel)):
    """LLaVA without its head: vision tower, projector and decoder are stock, `side_branch` is new.

    The routing lives here, not in the class with the head, because trainers call the model without its head and
    project only the positions they want. `forward` is stock's, under the configured plan.
    """

    config_class = DpvrLlavaConfig
    supports_gradient_checkpointing = False
    _supports_flash_attn = False

    def __init__(self, config: DpvrLlavaConfig):
        super().__init__(config)
        self.side_branch = make_side_branch(self.language_model.layers, config)
        self._planned: tuple[tuple, LayerPlan] | None = None
        self.post_init()

    @property
    def plan(self) -> LayerPlan:
        """What every decoder layer does; made anew when a field of the config has changed."""
        fields = self.config.plan_fields
        if self._planned is None or self._planned[0] != fields:
            self._planned = fields, self.config.layer_plan()
        return self._planned[1]

    @property
    def branch(self) -> nn.ModuleList:
        return self.side_branch


class DpvrLlavaForConditionalGeneration(
    Sharing, SideBranchLoading, CostFormulas, routed(LlavaForConditionalGeneration)
):
    """LLaVA whose image tokens leave the decoder at the split; `set_routing` and `from_llava` say more.

    Call and generate are stock LLaVA's, for every routing. Under one:

    - Logits at image tokens predict nothing: past the split images are context. A label of an image token, or right
      after one, is left out of the loss, and a prompt to generate from has to end in text.
    - Of n tokens in `logits_to_keep` only these query in the last layer.
    - A 2-D attention_mask is not read for a single new token after a prompt without padding.
    - `output_hidden_states` gives the L + 1 states (B, T, D) of stock; past the split an image token shows the side
      branch's output until a joint layer moves it on. `output_attentions` is refused, as layers differ in their keys.

    Raises (all ways in):
        ValueError: for image tokens and pixels that do not match, pixels that are not finite, masks of a wrong shape,
            and modes that are not supported; the message names expected, got and remedy.
    """

    config_class = DpvrLlavaConfig
    supports_gradient_checkpointing = False
    _supports_flash_attn = False

    def __init__(self, config: DpvrLlavaConfig):
        check_support(config)
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = DpvrLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
        if config.base_model_name_or_path is not None:  # the base has no side branch; it comes from its own repository
            self._keys_to_ignore_on_load_missing = {r"side_branch\."}

    @property
    def side_branch(self) -> nn.ModuleList:
        """The `config.num_side_layers` decoder layers that image tokens take past the split; all that DPVR trains."""
        return self.model.side_branch

    # -- routing ------------------------------------------------------------------------------------------------------

    def set_routing(self, routing: str) -> None:
        """Switch the routing on the same weights ("none" is vanilla LLaVA), or raise ValueError if it cannot run."""
        self.config.layer_plan(routing)
        self.config.routing = routing

    def freeze_base(self) -> None:
        """Leave nothing but the side branch to train (paper section 3.4)."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_side_branch(name))

    def decode_step(self, cache: Cache) -> DecodeStep:
        """The next token's step as a module to export, for a static cache that holds a prompt; see `DecodeStep`."""
        return DecodeStep(self, cache)


DpvrLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
