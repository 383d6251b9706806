"""LLaVA without its head under a layer plan: from tokens and pixels to the states that the head projects.

    input_ids, pixel_values -> stock vision tower and projector -> inputs_embeds, image_mask
        a plan of joint layers alone, or no image   -> stock LLaVA
        any other plan                              -> two_stream_forward (two_stream_dpvr.py)

One function, `routed_forward`, for a LLaVA with a side branch of its own (modeling_dpvr.py) and for a stock one with
a side branch in a PEFT adapter (adapter_dpvr.py). Paper section 3.2.

Axes: B batch, T tokens, N images, D width.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput
from transformers.models.llava.modeling_llava import LlavaModel, LlavaModelOutputWithPast

try:
    from .cache_dpvr import CacheRecord, is_static
    from .configuration_dpvr import LayerPlan
    from .two_stream_dpvr import SUPPORTED_ATTENTION, two_stream_forward, unsupported_attention
except ImportError:
    from cache_dpvr import CacheRecord, is_static
    from configuration_dpvr import LayerPlan
    from two_stream_dpvr import SUPPORTED_ATTENTION, two_stream_forward, unsupported_attention

VISION_ARGUMENTS = ("vision_feature_layer", "vision_feature_select_strategy", "image_sizes")


def routed_forward(
    llava: LlavaModel,
    side_branch: nn.ModuleList,
    plan: LayerPlan,
    *,
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
    mm_encoder_outputs: dict[str, ModelOutput] | None = None,
    run_plan: Callable = two_stream_forward,
    **kwargs,
) -> LlavaModelOutputWithPast:
    """Run a stock LLaVA's base model and a side branch under a layer plan.

    Args:
        llava: tower, projector and decoder; nothing in it is changed.
        side_branch: decoder layers of its shapes, whose `layer_idx` follow the decoder's.
        plan: what every decoder layer does.
        mm_encoder_outputs: {"image": what `get_image_features` returned} in place of the pixels, as `generate` of
            transformers 5 passes them.
        run_plan: what runs the decoder, called as `two_stream_forward`.
        **kwargs: the rest as in `DpvrLlavaForConditionalGeneration.forward`.

    Returns:
        last_hidden_state (B, T or kept, D). Past the split image tokens are context, not queries: theirs is the side
        branch's output, and predicts nothing.

    Raises:
        ValueError: as `DpvrLlavaForConditionalGeneration.forward`.
    """
    encoded = (mm_encoder_outputs or {}).get("image")
    image_mask = _find_images(llava, input_ids, inputs_embeds, pixel_values, encoded, past_key_values)
    record = CacheRecord.of(past_key_values, plan)
    if plan.is_vanilla or (image_mask is None and record is None):
        output = LlavaModel.forward(
            llava,
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            **({"mm_encoder_outputs": mm_encoder_outputs} if encoded is not None else {}),
            **{**kwargs, "return_dict": True},
        )
        if image_mask is not None and output.past_key_values is not None:
            CacheRecord(plan, len(image_mask)).put_on(output.past_key_values)  # no other plan goes on with it
        output.last_hidden_state = _with_gradient(_keep(output.last_hidden_state, logits_to_keep), side_branch)
        return output

    vision = {name: kwargs[name] for name in VISION_ARGUMENTS if name in kwargs}
    if encoded is None and image_mask is not None:
        encoded = llava.get_image_features(pixel_values=pixel_values, **vision)
    given = mm_encoder_outputs is not None
    inputs_embeds, features = _embed(llava, input_ids, inputs_embeds, encoded, image_mask, given)
    cache = _cache(llava, past_key_values, use_cache)
    if is_static(cache):
        attention_mask = _padding_alone(attention_mask, cache, inputs_embeds.shape[1], image_mask)
    _check_two_stream(llava, plan, inputs_embeds, attention_mask, cache, output_attentions)
    if output_hidden_states is None:
        output_hidden_states = bool(llava.config.output_hidden_states)
    tail = None if output_hidden_states else _text_tail(logits_to_keep, inputs_embeds.shape[1], image_mask)
    states, hidden_states = run_plan(
        llava.language_model,
        side_branch,
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


def image_marks(llava: LlavaModel, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
    """bool (B, T), True where the image token stands, or its embedding."""
    if input_ids is not None:
        return input_ids == llava.config.image_token_id
    mark = torch.tensor(llava.config.image_token_id, device=inputs_embeds.device)
    return (inputs_embeds == llava.get_input_embeddings()(mark)).all(-1)


def _find_images(
    llava: LlavaModel,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    pixel_values: torch.Tensor | None,
    encoded: ModelOutput | None,
    past_key_values: Cache | None,
) -> torch.Tensor | None:
    """bool (B, T), True at image tokens, or None without any; a decoded token is taken for text, unread."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Expected exactly one of input_ids and inputs_embeds; got both or neither. Remedy: drop one.")
    tokens, has_images = input_ids if input_ids is not None else inputs_embeds, True
    if pixel_values is None and encoded is None:
        has_images = False
        if input_ids is None or (tokens.shape[1] == 1 and past_key_values is not None):
            return None
    image_mask = image_marks(llava, input_ids, inputs_embeds)
    num_tokens = int(image_mask.sum())
    if num_tokens == 0 and not has_images:
        return None
    if num_tokens == 0 or not has_images:
        num_images = len(pixel_values if pixel_values is not None else encoded.pooler_output) if has_images else 0
        raise ValueError(
            f"Expected image tokens and pixels together; got {num_tokens} image tokens (id "
            f"{llava.config.image_token_id}) and {num_images} images. Remedy: make both with the processor, one "
            "<image> mark per image."
        )
    if pixel_values is not None:
        _check_pixels(pixel_values)
    return image_mask


def _embed(
    llava: LlavaModel,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    encoded: ModelOutput | list[torch.Tensor] | None,
    image_mask: torch.Tensor | None,
    given: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Token embeddings (B, T, D) with the image features in place, and these features (all image tokens, D).

    `given` features come from the caller, others were made of this chunk's pixels.
    """
    if inputs_embeds is None:
        inputs_embeds = llava.get_input_embeddings()(input_ids)
    if image_mask is None:
        return inputs_embeds, None
    features = encoded.pooler_output if isinstance(encoded, ModelOutput) else encoded  # transformers 5, 4
    per_image = [len(feature) for feature in features]
    features = torch.cat(list(features)).to(inputs_embeds.device, inputs_embeds.dtype)
    counts = image_mask.sum(1).tolist()
    is_piece = given and len(per_image) == 1  # of a prefill in chunks, which may cut through images
    uneven = not is_piece and len(set(per_image)) == 1 and any(count % per_image[0] for count in counts)
    if sum(counts) != len(features) or uneven:
        raise ValueError(
            f"Expected as many image tokens as image features; got tokens per row: {counts}, features: "
            f"{len(features)} ({len(per_image)} images of {sorted(set(per_image))}). Remedy: use the processor of "
            "this model, one image per <image> mark, and do not truncate inside an image."
        )
    return inputs_embeds.masked_scatter(image_mask[..., None], features), features


def _cache(llava: LlavaModel, past_key_values: Cache | None, use_cache: bool | None) -> Cache | None:
    if past_key_values is not None:
        return past_key_values
    if use_cache is None:
        use_cache = llava.config.text_config.use_cache and not llava.training
    return DynamicCache() if use_cache else None


def _past(cache: Cache | None) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _padding_alone(
    attention_mask: torch.Tensor | None, cache: Cache, length: int, image_mask: torch.Tensor | None
) -> torch.Tensor | None:
    """The padding mask (B, past + T) for a static cache, from which `generate` makes a causal mask (B, 1, T, room).

    The next token needs none: the cache's record knows the padding before it.
    """
    if length == 1 and image_mask is None:
        return None
    if attention_mask is None or (isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2):
        return attention_mask
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4:
        past = _past(cache)
        seen = attention_mask[:, 0] if attention_mask.dtype == torch.bool else attention_mask[:, 0] == 0  # (B, T, K)
        padding, place = seen[:, -1], torch.arange(seen.shape[2], device=seen.device)
        causal = place <= place[past : past + length, None]
        as_made = (seen == (causal & padding[:, None])).all(-1) | ~padding[:, past : past + length]
        if bool(as_made.all()):
            return padding[:, : past + length]
    raise ValueError(
        "Expected an attention_mask of shape (batch, cached + new tokens), or the causal one of it that generate "
        f"makes for a static cache; got another of type {type(attention_mask).__name__}. Remedy: pass the processor's "
        "mask."
    )


def _check_two_stream(
    llava: LlavaModel,
    plan: LayerPlan,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    output_attentions: bool | None,
) -> None:
    implementation = llava.config.text_config._attn_implementation
    if implementation not in SUPPORTED_ATTENTION:
        raise ValueError(unsupported_attention(implementation))
    on_cpu = inputs_embeds.device.type == "cpu"
    if implementation == "flex_attention" and on_cpu and torch.backends.cpu.get_cpu_capability() != "AVX512":
        raise ValueError(
            "Expected a GPU or a CPU with AVX-512 for flex_attention, whose compiled kernel gives wrong and changing "
            f"results on others; got {torch.backends.cpu.get_cpu_capability()}. Remedy: attn_implementation='sdpa'."
        )
    if output_attentions or llava.config.output_attentions:
        raise ValueError(
            f"Expected output_attentions=False under the plan {plan}, whose layers differ in their keys; got True. "
            "Remedy: set_routing('none'), or disable_adapter()."
        )
    if attention_mask is None:
        return
    expected = (inputs_embeds.shape[0], _past(cache) + inputs_embeds.shape[1])
    if tuple(attention_mask.shape) != expected:
        raise ValueError(
            f"Expected an attention_mask of shape (batch, cached + new tokens) = {expected}; got "
            f"{tuple(attention_mask.shape)}. Remedy: pass the processor's mask, extended by ones for cached "
            "answers."
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


def _text_tail(logits_to_keep: int | torch.Tensor, length: int, image_mask: torch.Tensor | None) -> int | None:
    """How many of the last tokens hold all that are kept, if none of these is an image token; else None."""
    if isinstance(logits_to_keep, torch.Tensor):
        tail = length - int((logits_to_keep % length).min())
    else:
        tail = min(logits_to_keep, length)
    if tail == 0 or (image_mask is not None and bool(image_mask[:, -tail:].any())):
        return None
    return tail


def _with_gradient(states: torch.Tensor, side_branch: nn.ModuleList) -> torch.Tensor:
    """States of a batch without pictures, tied to the side branch that they did not use: its gradient is zero.

    A trainer that meets such a batch would otherwise find nothing to differentiate.
    """
    trained = [weight for weight in side_branch.parameters() if weight.requires_grad]
    if not trained or not torch.is_grad_enabled() or states.requires_grad:
        return states
    return states + 0.0 * sum(weight.flatten()[0] for weight in trained).to(states)


def _keep(states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The last n of (B, T, D) states, or those at indices (n,)."""
    return states[:, logits_to_keep if isinstance(logits_to_keep, torch.Tensor) else slice(-logits_to_keep, None)]
