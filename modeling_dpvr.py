"""DPVR-LLaVA: LLaVA with late-layer fusion, as Hugging Face remote code.

Late-Layer Fusion is Enough: Dual-Path Vision Token Routing, https://arxiv.org/abs/2606.09131, section 3.

    input_ids, pixel_values -> stock vision tower and projector -> inputs_embeds
        routing "none", or no image in the prompt   -> stock LLaVA
        any other routing                           -> two_stream_forward (two_stream_dpvr.py) over the layer plan
    text states -> lm_head -> logits

Everything but `side_branch` is a stock `LlavaForConditionalGeneration`, so vanilla checkpoints load as they are, and a
repository may hold the side branch alone and name its base.

Axes: B batch, T tokens, N images, V image tokens and X text tokens of a row, D width.
"""

import torch
from torch import nn
from transformers import DynamicCache, LlavaForConditionalGeneration
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput
from transformers.models.llava.modeling_llava import (
    LlavaCausalLMOutputWithPast,
    LlavaModel,
    LlavaModelOutputWithPast,
)
from transformers.utils import can_return_tuple

try:
    from .configuration_dpvr import DpvrLlavaConfig
    from .costs_dpvr import CostFormulas
    from .loading_dpvr import SideBranchLoading, is_side_branch
    from .two_stream_dpvr import SUPPORTED_ATTENTION, SUPPORTED_DECODERS, CacheRecord, two_stream_forward
except ImportError:
    from configuration_dpvr import DpvrLlavaConfig
    from costs_dpvr import CostFormulas
    from loading_dpvr import SideBranchLoading, is_side_branch
    from two_stream_dpvr import SUPPORTED_ATTENTION, SUPPORTED_DECODERS, CacheRecord, two_stream_forward

IGNORED_LABEL = -100
VISION_ARGUMENTS = ("vision_feature_layer", "vision_feature_select_strategy", "image_sizes")


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
        layers, depth = self.language_model.layers, config.text_config.num_hidden_layers
        self.side_branch = nn.ModuleList(type(layers[0])(config.text_config, 0) for _ in range(config.num_side_layers))
        for index, layer in enumerate(self.side_branch):
            layer.self_attn.layer_idx = depth + index
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> LlavaModelOutputWithPast:
        """The states that the head would project; arguments as in `DpvrLlavaForConditionalGeneration.forward`.

        Returns:
            last_hidden_state (B, T or kept, D). Past the split image tokens are context, not queries: theirs is the
            side branch's output, and predicts nothing.
        """
        plan = self.config.layer_plan()
        image_mask = self._find_images(input_ids, inputs_embeds, pixel_values, past_key_values)
        record = CacheRecord.of(past_key_values, plan)
        if self.config.routing == "none" or (image_mask is None and record is None):
            output = super().forward(
                input_ids=input_ids,
                pixel_values=pixel_values,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                **{**kwargs, "return_dict": True},
            )
            if image_mask is not None and output.past_key_values is not None:
                CacheRecord.note_vanilla(plan, output.past_key_values)
            output.last_hidden_state = _keep(output.last_hidden_state, logits_to_keep)
            return output

        vision = {name: kwargs[name] for name in VISION_ARGUMENTS if name in kwargs}
        inputs_embeds, features = self._embed(input_ids, inputs_embeds, pixel_values, image_mask, **vision)
        cache = self._cache(past_key_values, use_cache)
        self._check_two_stream(inputs_embeds, attention_mask, cache, output_attentions)
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        tail = None if output_hidden_states else _text_tail(logits_to_keep, inputs_embeds.shape[1], image_mask)
        states, hidden_states = two_stream_forward(
            self.language_model,
            self.side_branch,
            plan,
            inputs_embeds,
            image_mask,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            tail=tail,
            output_hidden_states=output_hidden_states,
        )
        if isinstance(logits_to_keep, torch.Tensor):
            logits_to_keep = logits_to_keep % inputs_embeds.shape[1] - (inputs_embeds.shape[1] - states.shape[1])
        return LlavaModelOutputWithPast(
            last_hidden_state=_keep(states, logits_to_keep),
            past_key_values=cache,
            hidden_states=hidden_states,
            image_hidden_states=features,
        )

    def image_marks(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """bool (B, T), True where the image token stands, or its embedding."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        mark = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(mark)).all(-1)

    def _find_images(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> torch.Tensor | None:
        """bool (B, T), True at image tokens, or None without any; a decoded token is taken for text, unread."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "Expected exactly one of input_ids and inputs_embeds; got both or neither. Remedy: drop one."
            )
        tokens = input_ids if input_ids is not None else inputs_embeds
        if pixel_values is None and tokens.shape[1] == 1 and past_key_values is not None:
            return None
        if input_ids is None and pixel_values is None:
            return None
        image_mask = self.image_marks(input_ids, inputs_embeds)
        num_tokens = int(image_mask.sum())
        if pixel_values is None and num_tokens == 0:
            return None
        if pixel_values is None or num_tokens == 0:
            raise ValueError(
                f"Expected image tokens and pixels together; got {num_tokens} image tokens (id "
                f"{self.config.image_token_id}) and {0 if pixel_values is None else len(pixel_values)} images. "
                "Remedy: make both with the processor, one <image> mark per image."
            )
        _check_pixels(pixel_values)
        return image_mask

    def _embed(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        image_mask: torch.Tensor | None,
        **vision_arguments,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Token embeddings (B, T, D) with the image features in place, and these features (all image tokens, D)."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if image_mask is None:
            return inputs_embeds, None
        features = self.get_image_features(pixel_values=pixel_values, **vision_arguments)
        if isinstance(features, ModelOutput):  # transformers 5
            features = features.pooler_output
        per_image = [len(feature) for feature in features]
        features = torch.cat(list(features)).to(inputs_embeds.device, inputs_embeds.dtype)
        counts = image_mask.sum(1).tolist()
        uneven = len(set(per_image)) == 1 and any(count % per_image[0] for count in counts)
        if sum(counts) != len(features) or uneven:
            raise ValueError(
                f"Expected as many image tokens as image features; got tokens per row: {counts}, features: "
                f"{len(features)} ({len(per_image)} images of {sorted(set(per_image))}). Remedy: use the processor of "
                "this model, one image per <image> mark, and do not truncate inside an image."
            )
        return inputs_embeds.masked_scatter(image_mask[..., None], features), features

    def _cache(self, past_key_values: Cache | None, use_cache: bool | None) -> Cache | None:
        if past_key_values is not None:
            return past_key_values
        if use_cache is None:
            use_cache = self.config.text_config.use_cache and not self.training
        return DynamicCache() if use_cache else None

    def _check_two_stream(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        output_attentions: bool | None,
    ) -> None:
        implementation = self.config.text_config._attn_implementation
        if implementation not in SUPPORTED_ATTENTION:
            raise ValueError(_unsupported_attention(implementation))
        if output_attentions or self.config.output_attentions:
            raise ValueError(
                f"Expected output_attentions=False with routing {self.config.routing!r}, whose layers differ in their "
                "keys; got True. Remedy: set_routing('none')."
            )
        if cache is not None and cache.is_compileable:
            raise ValueError(
                f"Expected a cache that grows, for layers of different lengths; got {type(cache).__name__}. Remedy: "
                "DynamicCache, generate's default."
            )
        past = 0 if cache is None else cache.get_seq_length()
        expected = (inputs_embeds.shape[0], past + inputs_embeds.shape[1])
        if attention_mask is not None and tuple(attention_mask.shape) != expected:
            raise ValueError(
                f"Expected an attention_mask of shape (batch, cached + new tokens) = {expected}; got "
                f"{tuple(attention_mask.shape)}. Remedy: pass the processor's mask, extended by ones for cached "
                "answers."
            )


class DpvrLlavaForConditionalGeneration(SideBranchLoading, CostFormulas, LlavaForConditionalGeneration):
    """LLaVA whose image tokens leave the decoder at the split; see `forward`, `set_routing` and `from_llava`."""

    config_class = DpvrLlavaConfig
    supports_gradient_checkpointing = False
    _supports_flash_attn = False
    _can_compile_fullgraph = False

    def __init__(self, config: DpvrLlavaConfig):
        _check_support(config)
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
            attention_mask: (B, past + T), 0 at padding on either side. After an unpadded prompt it is not read for a
                single new token.
            position_ids: int64 (B or 1, T).
            past_key_values: a growing cache such as `DynamicCache`, read and extended.
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
                after_image = nn.functional.pad(self.model.image_marks(input_ids, inputs_embeds)[:, :-1], (1, 0))
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
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None, **kwargs
    ) -> dict:
        """Stock inputs, with the pixels of the images whose tokens are in this chunk: a later turn may bring more."""
        inputs = super().prepare_inputs_for_generation(input_ids, pixel_values=pixel_values, **kwargs)
        inputs.pop("pixel_values", None)
        chunk, cache = inputs.get("input_ids"), inputs.get("past_key_values")
        decoding = cache is not None and cache.get_seq_length() > 0 and chunk is not None and chunk.shape[1] == 1
        if pixel_values is None or decoding:
            return inputs
        if chunk is not None:
            if self.config.routing != "none" and bool((chunk[:, -1] == self.config.image_token_id).any()):
                raise ValueError(
                    "Expected a prompt that ends in text: past the split image tokens predict nothing; got one that "
                    "ends in an image. Remedy: put the question after the picture, or use the chat template."
                )
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

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs,
    ) -> tuple[torch.Tensor, dict]:
        """Repeat rows for beams and samples; the images of a row stay together, which stock LLaVA gets wrong."""
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


# ---------------------------------------------------------------------------------------------------------------------


def _check_support(config: DpvrLlavaConfig) -> None:
    text = config.text_config
    if text.model_type not in SUPPORTED_DECODERS:
        raise ValueError(
            f"Expected a decoder of type {SUPPORTED_DECODERS}; got {text.model_type!r}. Remedy: use a LLaVA on one of "
            "these."
        )
    if (
        text.model_type != "llama"
        and text.sliding_window is not None
        and (text.model_type != "qwen2" or text.use_sliding_window)
    ):
        raise ValueError(
            f"Expected a decoder with full attention; got sliding_window={text.sliding_window}. Remedy: set it to "
            "None."
        )
    if not 0 <= config.image_token_id < text.vocab_size:
        raise ValueError(
            f"Expected image_token_id, the id of '<image>', below the vocabulary size {text.vocab_size}; got "
            f"{config.image_token_id}. Remedy: set image_token_id in the config to the tokenizer's id of '<image>'."
        )
    for part in (config, text):
        if "flash" in (implementation := str(part._attn_implementation)):
            raise ValueError(_unsupported_attention(implementation))


def _unsupported_attention(implementation: str) -> str:
    return (
        f"Expected attn_implementation to be one of {SUPPORTED_ATTENTION}; got {implementation!r}. Remedy: use "
        "'sdpa', which runs the flash kernel wherever no mask is needed; a context layer needs one, which "
        "flash_attention_2 does not take."
    )


def _check_pixels(pixel_values: torch.Tensor) -> None:
    if pixel_values.ndim != 4:
        raise ValueError(
            f"Expected pixel_values of shape (images, channels, height, width); got {tuple(pixel_values.shape)}. "
            "Remedy: use the processor of this model."
        )
    finite = int(torch.isfinite(pixel_values).sum())
    if finite != pixel_values.numel():
        raise ValueError(
            f"Expected finite pixel_values; got {pixel_values.numel() - finite} of {pixel_values.numel()} that are "
            "NaN or infinite. Remedy: check the picture and its preprocessing."
        )


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


def _text_tail(logits_to_keep: int | torch.Tensor, length: int, image_mask: torch.Tensor | None) -> int | None:
    """How many of the last tokens hold all that are kept, if none of these is an image token; else None."""
    if isinstance(logits_to_keep, torch.Tensor):
        tail = length - int((logits_to_keep % length).min())
    else:
        tail = min(logits_to_keep, length)
    if tail == 0 or (image_mask is not None and bool(image_mask[:, -tail:].any())):
        return None
    return tail


def _keep(states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The last n of (B, T, D) states, or those at indices (n,)."""
    return states[:, logits_to_keep if isinstance(logits_to_keep, torch.Tensor) else slice(-logits_to_keep, None)]


DpvrLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
