"""DPVR-LLaVA: LLaVA with late-layer fusion, as Hugging Face remote code.

Late-Layer Fusion is Enough: Dual-Path Vision Token Routing, https://arxiv.org/abs/2606.09131, section 3.

    input_ids, pixel_values
        routing "none", or no image in the prompt   -> the forward of stock LLaVA
        any other routing                           -> the same forward, on decoder layers that are routed
    text states -> lm_head -> logits                   (forward_dpvr.py)

Everything but `side_branch` is a stock `LlavaForConditionalGeneration`, so vanilla checkpoints load as they are, and a
repository may hold the side branch alone and name its base.

Each *_dpvr.py imports its neighbours in a try and again in its except: the Hub's loader imports the files as a
package and fetches only those that this file imports directly; everything else imports them as plain modules.
"""

from torch import nn
from transformers import LlavaForConditionalGeneration
from transformers.cache_utils import Cache
from transformers.models.llava.modeling_llava import LlavaModel

try:
    from .cache_dpvr import DecodeStep
    from .configuration_dpvr import DpvrLlavaConfig, LayerPlan, vanilla_plan
    from .costs_dpvr import CountedCosts
    from .decoders_dpvr import decoder_of  # noqa: F401
    from .forward_dpvr import check_support, routed_model
    from .generation_dpvr import routed
    from .hub_dpvr import Sharing
    from .images_dpvr import image_marks  # noqa: F401
    from .latent_dpvr import Latent
    from .loading_dpvr import SideBranchLoading, is_side_branch
    from .processors_dpvr import load_processor  # noqa: F401
    from .self_check_dpvr import check_untested  # noqa: F401
    from .side_branch_dpvr import make_side_branch
    from .stream_arguments_dpvr import StreamArguments  # noqa: F401
    from .streams_dpvr import Streams  # noqa: F401
    from .twins_dpvr import RoutedLayer  # noqa: F401
    from .two_stream_dpvr import TwoStreamPass  # noqa: F401
    from .versions_dpvr import LINE_4  # noqa: F401
except ImportError:
    from cache_dpvr import DecodeStep
    from configuration_dpvr import DpvrLlavaConfig, LayerPlan, vanilla_plan
    from costs_dpvr import CountedCosts
    from decoders_dpvr import decoder_of  # noqa: F401
    from forward_dpvr import check_support, routed_model
    from generation_dpvr import routed
    from hub_dpvr import Sharing
    from images_dpvr import image_marks  # noqa: F401
    from latent_dpvr import Latent
    from loading_dpvr import SideBranchLoading, is_side_branch
    from processors_dpvr import load_processor  # noqa: F401
    from self_check_dpvr import check_untested  # noqa: F401
    from side_branch_dpvr import make_side_branch
    from stream_arguments_dpvr import StreamArguments  # noqa: F401
    from streams_dpvr import Streams  # noqa: F401
    from twins_dpvr import RoutedLayer  # noqa: F401
    from two_stream_dpvr import TwoStreamPass  # noqa: F401
    from versions_dpvr import LINE_4  # noqa: F401


class DpvrLlavaModel(routed_model(LlavaModel)):
    """LLaVA without its head: vision tower, projector and decoder are stock, `side_branch` is new.

    `forward` is stock LLaVA's under the layer plan of the config. It is routed here, not in the class with the head,
    because trainers call the model without its head and project only the positions they want.
    """

    config_class = DpvrLlavaConfig
    supports_gradient_checkpointing = False
    _supports_flash_attn = False

    def __init__(self, config: DpvrLlavaConfig):
        super().__init__(config)
        self.side_branch = make_side_branch(self.language_model, config.split_layer, config.num_side_layers)
        if config.latent_rank is not None:
            plan = config.layer_plan("latent")
            latent = Latent(self.language_model, plan, config.latent_rank, config.latent_side_layers)
            self.side_branch.add_module("latent", latent)
        self._cached_plan: tuple[tuple, LayerPlan] | None = None  # with the config's fields that it was made of
        self.post_init()

    @property
    def plan(self) -> LayerPlan:
        """What every decoder layer does; made and checked again when a field of the config has changed."""
        if self.is_base:
            return vanilla_plan(self.config.text_config.num_hidden_layers)
        fields = self.config.plan_fields
        if self._cached_plan is None or self._cached_plan[0] != fields:
            self._cached_plan = fields, self.config.layer_plan()
        return self._cached_plan[1]

    @property
    def branch(self) -> nn.ModuleList:
        """The side branch that runs; a PEFT adapter puts its own here (adapter_dpvr.py)."""
        return self.side_branch


class DpvrLlavaForConditionalGeneration(
    Sharing, SideBranchLoading, CountedCosts, routed(LlavaForConditionalGeneration)
):
    """LLaVA whose image tokens leave the decoder after `split_layer` layers; see `from_llava` and `set_routing`.

    It is called and generates as stock LLaVA does. What differs under a routing other than "none":

    - Logits at image tokens mean nothing, because past the split image tokens are context. The loss leaves out labels
      at image tokens and at the token after them, and a prompt to generate from has to end in text.
    - With `logits_to_keep=n` only the last n tokens are queries in the last layer.
    - A 2-D attention_mask is ignored for a single new token after a prompt without padding.
    - `output_hidden_states` gives the L + 1 states (B, T, D) of stock. At image tokens past the split these are the
      side branch's output, until a joint layer updates it. `output_attentions` is refused, as the layers have
      different numbers of keys.

    Raises (forward and generate):
        ValueError: for image tokens and pixels that do not match, pixels that are not finite, masks of a wrong shape,
            and options that are not supported.
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
        if config.base_model_name_or_path is not None:  # the side branch is loaded from another repository
            self._keys_to_ignore_on_load_missing = {r"side_branch\."}

    @property
    def side_branch(self) -> nn.ModuleList:
        """The `config.num_side_layers` decoder layers for image tokens past the split; only these are trained."""
        return self.model.side_branch

    # -- routing ------------------------------------------------------------------------------------------------------

    def set_routing(self, routing: str) -> None:
        """Switch the routing on the same weights ("none" is vanilla LLaVA).

        Raises:
            ValueError: if the other fields do not allow it; the routing then stays as it was.
        """
        self.config.layer_plan(routing)
        self.config.routing = routing

    def freeze_base(self) -> None:
        """Freeze all weights but the side branch's (paper section 3.4)."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_side_branch(name))

    def decode_step(self, cache: Cache) -> DecodeStep:
        """A module to export that decodes one token, for a static cache that holds a prompt; see `DecodeStep`."""
        return DecodeStep(self, cache)


DpvrLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
