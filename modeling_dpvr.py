"""DPVR-LLaVA: LLaVA with late-layer fusion, as Hugging Face remote code.

Late-Layer Fusion is Enough: Dual-Path Vision Token Routing, https://arxiv.org/abs/2606.09131, section 3.

    input_ids, pixel_values -> stock vision tower and projector -> inputs_embeds
        routing "none", or no image in the prompt   -> stock LLaVA
        any other routing                           -> two_stream_forward over the layer plan (routing_dpvr.py)
    text states -> lm_head -> logits

Everything but `side_branch` is a stock `LlavaForConditionalGeneration`, so vanilla checkpoints load as they are, and a
repository may hold the side branch alone and name its base.

Axes: B batch, T tokens, N images, V image tokens and X text tokens of a row, D width.
"""

import torch
from torch import nn
from transformers import GenerationConfig, LlavaForConditionalGeneration
from transformers.cache_utils import Cache
from transformers.models.llava.modeling_llava import (
    LlavaCausalLMOutputWithPast,
    LlavaModel,
    LlavaModelOutputWithPast,
)
from transformers.utils import can_return_tuple

try:
    from .cache_dpvr import DecodeStep
    from .configuration_dpvr import DpvrLlavaConfig
    from .costs_dpvr import CostFormulas
    from .loading_dpvr import SideBranchLoading, is_side_branch, make_side_branch
    from .routing_dpvr import image_marks, routed_forward
    from .sharing_dpvr import Sharing
    from .two_stream_dpvr import check_support
except ImportError:
    from cache_dpvr import DecodeStep
    from configuration_dpvr import DpvrLlavaConfig
    from costs_dpvr import CostFormulas
    from loading_dpvr import SideBranchLoading, is_side_branch, make_side_branch
    from routing_dpvr import image_marks, routed_forward
    from sharing_dpvr import Sharing
    from two_stream_dpvr import check_support

IGNORED_LABEL = -100


class DpvrLlavaModel(LlavaModel):
    """LLaVA without its head: vision tower, projector and decoder are stock, `side_branch` is new.

    The routing lives here, not in the class with the head, because trainers call the model without its head and
    project only the positions they want.
    """

    config_class = DpvrLlavaConfig
    supports_gradient_checkpointing = False
    _supports_flash_attn = False

    def __init__(self, config: DpvrLlavaConfig):
        super().__init__(config)
        self.side_branch = make_side_branch(self.language_model.layers, config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        **kwargs,
    ) -> LlavaModelOutputWithPast:
        """The states that the head would project, as `routed_forward` gives them under the configured plan."""
        plan = self.config.layer_plan()
        return routed_forward(self, self.side_branch, plan, input_ids=input_ids, pixel_values=pixel_values, **kwargs)


class DpvrLlavaForConditionalGeneration(Sharing, SideBranchLoading, CostFormulas, LlavaForConditionalGeneration):
    """LLaVA whose image tokens leave the decoder at the split; see `forward`, `set_routing` and `from_llava`."""

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

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> LlavaCausalLMOutputWithPast:
        """LLaVA's forward under the configured routing (paper Algorithm 1).

        Args:
            input_ids: int64 (B, T), `config.image_token_id` once per image feature.
            pixel_values: float (N, 3, height, width), the images of all rows in order of their marks.
            attention_mask: (B, past + T), 0 at padding on either side. After an unpadded prompt, and on a static
                cache, it is not read for a single new token.
            position_ids: int64 (B or 1, T).
            past_key_values: any cache of transformers, read and extended.
            inputs_embeds: float (B, T, D) in place of input_ids, with the image token's embedding at image places;
                without pixel_values all of it is taken for text.
            labels: int64 (B, T), -100 where there is no loss. Image tokens predict nothing under a routing, so a label
                right after one is left out of the loss as well.
            logits_to_keep: n > 0 for the last n tokens, or int64 indices; only these query in the last layer.
            **kwargs: use_cache (default: the config's in evaluation, False in training), output_hidden_states (L + 1
                tensors (B, T, D), see `two_stream_forward`), output_attentions (refused unless the routing is "none",
                as layers differ in their keys), and what stock LLaVA takes.

        Returns:
            logits (B, T or kept, vocabulary). Those at image tokens predict nothing: past the split, images are
            context.

        Raises:
            ValueError: for image tokens and pixels that do not match, pixels that are not finite, masks of a wrong
                shape, and modes that are not supported; the message names expected, got and remedy.
        """
        output = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            logits_to_keep=logits_to_keep,
            **{**kwargs, "return_dict": True},
        )
        logits = self.lm_head(output.last_hidden_state)
        loss = None
        if labels is not None:
            if self.config.routing != "none":
                after_image = nn.functional.pad(image_marks(self.model, input_ids, inputs_embeds)[:, :-1], (1, 0))
                labels = labels.masked_fill(after_image, IGNORED_LABEL)
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return LlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            image_hidden_states=output.image_hidden_states,
        )

    # -- generation ---------------------------------------------------------------------------------------------------

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> dict:
        """Stock inputs, with the pixels of the images whose tokens are in this chunk: a later turn may bring more."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, pixel_values=pixel_values, inputs_embeds=inputs_embeds, **kwargs
        )
        inputs.pop("pixel_values", None)
        chunk, cache = inputs.get("input_ids"), inputs.get("past_key_values")
        decoding = cache is not None and cache.get_seq_length() > 0 and chunk is not None and chunk.shape[1] == 1
        if pixel_values is None or decoding:
            return inputs
        if chunk is not None:
            pixel_values = self._pixels_of_chunk(pixel_values, input_ids, chunk)
        if pixel_values is not None:
            inputs["pixel_values"] = pixel_values
        return inputs

    def _pixels_of_chunk(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor, chunk: torch.Tensor
    ) -> torch.Tensor | None:
        """Of the images of whole rows (N, ...), each row's last ones, whose tokens are in the chunk."""
        if chunk.shape[1] == input_ids.shape[1]:
            return pixel_values
        images, new = _images_per_row(input_ids, self.config), _images_per_row(chunk, self.config)
        if sum(new) == 0:
            return None
        if len(pixel_values) != sum(images):  # the new images alone, or a mistake, which forward will name
            return pixel_values
        rows = pixel_values.split(images)
        return torch.cat([row[len(row) - count :] for row, count in zip(rows, new, strict=True)])

    def _prepare_static_cache(self, *args, **kwargs) -> Cache:
        """Of transformers 5."""
        self._refuse_flex_attention()
        return super()._prepare_static_cache(*args, **kwargs)

    def _get_cache(self, *args, **kwargs) -> Cache:
        """Of transformers 4, the same."""
        self._refuse_flex_attention()
        return super()._get_cache(*args, **kwargs)

    def _refuse_flex_attention(self) -> None:
        if self.config.text_config._attn_implementation == "flex_attention":
            raise ValueError(
                "Expected sdpa or eager attention for a static cache, whose masks generate makes as tensors; got "
                "flex_attention. Remedy: set_attn_implementation('sdpa'), or a growing cache."
            )

    def decode_step(self, cache: Cache) -> DecodeStep:
        """The next token's step as a module to export, for a static cache that holds a prompt; see `DecodeStep`."""
        return DecodeStep(self, cache)

    def _maybe_prepare_encoder_kwargs_for_generation(
        self,
        inputs_tensor: torch.Tensor,
        model_kwargs: dict,
        model_input_name: str | None,
        generation_config: GenerationConfig,
    ) -> dict:
        """Of transformers 5: encode the new images before a prefill in chunks, which may cut through them."""
        size, pixel_values = generation_config.prefill_chunk_size, model_kwargs.get("pixel_values")
        if size == 1 and self.config.routing != "none" and model_kwargs.get("attention_mask") is not None:
            raise ValueError(
                "Expected prefill_chunk_size of at least 2 for a padded batch, as a single token is taken for a "
                "decoded one; got 1. Remedy: 2 or more."
            )
        if size is None or pixel_values is None or model_input_name != "input_ids":
            return model_kwargs
        cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        num_tokens = generation_config._mask_length if mask is None else mask.shape[1]
        past = 0 if cache is None or num_tokens > inputs_tensor.shape[1] else int(cache.get_seq_length())
        pixel_values = self._pixels_of_chunk(pixel_values, inputs_tensor, inputs_tensor[:, past:])
        model_kwargs = {name: value for name, value in model_kwargs.items() if name != "pixel_values"}
        if pixel_values is None:
            return model_kwargs
        return self._prepare_multimodal_encoder_kwargs_for_generation({**model_kwargs, "pixel_values": pixel_values})

    def _prefill_chunking(self, input_ids: torch.Tensor, generation_config: GenerationConfig, **model_kwargs) -> dict:
        """Of transformers 4: it would give every chunk all pixels."""
        if model_kwargs.get("pixel_values") is not None:
            raise ValueError(
                "Expected prefill_chunk_size=None for a prompt with images on transformers 4; got "
                f"{generation_config.prefill_chunk_size}. Remedy: transformers 5, or prefill in one piece."
            )
        return super()._prefill_chunking(input_ids, generation_config, **model_kwargs)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs,
    ) -> tuple[torch.Tensor, dict]:
        """Repeat rows for beams and samples; the images of a row stay together, which stock LLaVA gets wrong.

        Called once by `generate`, with the prompt, before any work.
        """
        ends_in_image = input_ids is not None and bool((input_ids[:, -1:] == self.config.image_token_id).any())
        if self.config.routing != "none" and ends_in_image:
            raise ValueError(
                "Expected a prompt that ends in text: past the split image tokens predict nothing; got one that ends "
                "in an image. Remedy: put the question after the picture, or use the chat template."
            )
        kept = getattr(self, "_cache", None)  # transformers 4 keeps a static cache, which a failed call left empty
        if kept is not None and not all(
            layer.is_initialized for layer in kept.layers[: self.config.text_config.num_hidden_layers]
        ):
            del self._cache
        pixel_values = model_kwargs.pop("pixel_values", None)
        if expand_size > 1 and pixel_values is not None and input_ids is not None:
            images = _images_per_row(input_ids, self.config)
            if sum(images) == len(pixel_values):  # if not, forward will name the mismatch
                pixel_values = torch.cat([row.repeat(expand_size, 1, 1, 1) for row in pixel_values.split(images)])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if pixel_values is not None:
            model_kwargs["pixel_values"] = pixel_values
        return input_ids, model_kwargs


def _images_per_row(input_ids: torch.Tensor, config: DpvrLlavaConfig) -> list[int]:
    return ((input_ids == config.image_token_id).sum(1) // _tokens_per_image(config)).tolist()


def _tokens_per_image(config: DpvrLlavaConfig) -> int:
    """From the tower's shape where it is a plain ViT; configs often leave `image_seq_length` at its default."""
    vision = config.vision_config
    if vision.model_type not in ("clip_vision_model", "siglip_vision_model"):
        return config.image_seq_length
    patches = (vision.image_size // vision.patch_size) ** 2
    has_class_token = vision.model_type == "clip_vision_model"
    drops_one = config.vision_feature_select_strategy == "default"
    return patches + has_class_token - drops_one


DpvrLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
