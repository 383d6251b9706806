"""The model with its head under a routing: loss, logits and `generate` with images.

    routed(Qwen3VLForConditionalGeneration)      a subclass of the stock class, in which
        loss            leaves out labels at image tokens and those that image tokens would predict
        logits_to_keep  is passed to the decoder, whose last layer then has only these tokens as queries
    routed(LlavaForConditionalGeneration)        also
        generate        repeats a row's pixels with the row, and passes on the pixels of the chunk that runs

`DpvrLlavaForConditionalGeneration` (modeling_dpvr.py) and a stock model with a PEFT adapter (adapter_dpvr.py) both are
such a class. The model without its head, at `self.model`, has a `plan`: the layer plan that it runs.

Axes: B batch, T tokens, N images.
"""

from functools import lru_cache, wraps
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, LlavaForConditionalGeneration
from transformers.cache_utils import Cache

try:
    from .images_dpvr import image_marks, images_per_row, tokens_per_image
    from .versions_dpvr import argument_names, cache_in
except ImportError:
    from images_dpvr import image_marks, images_per_row, tokens_per_image
    from versions_dpvr import argument_names, cache_in

IGNORED_LABEL = -100  # the value of labels that PyTorch and transformers leave out of a loss


@lru_cache
def routed(stock: type) -> type:
    """A subclass of a stock vision-language model with its head, with the same name, and with `RoutedGeneration`."""
    names = argument_names(stock.forward)

    @wraps(stock.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        arguments = without_image_labels(self.model, dict(zip(names, args, strict=False)) | kwargs)
        if not self.model.plan.is_vanilla:
            arguments["kept_logits"] = arguments.get("logits_to_keep", 0)
        return stock.forward(self, **arguments)

    own = {"forward": forward, "own": stock, "__module__": stock.__module__, "__qualname__": stock.__qualname__}
    mixin = LlavaGeneration if issubclass(stock, LlavaForConditionalGeneration) else RoutedGeneration
    return type(stock.__name__, (mixin, stock), own)


def without_image_labels(model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call with labels (B, T) ignored at image tokens and at the token after each, under a plan.

    Past the split image tokens are context, so their logits cannot predict these labels.
    """
    if arguments.get("labels") is None or model.plan.is_vanilla:
        return arguments
    marks = image_marks(model, arguments.get("input_ids"), arguments.get("inputs_embeds"))
    marks = marks | nn.functional.pad(marks[:, :-1], (1, 0))
    return {**arguments, "labels": arguments["labels"].masked_fill(marks, IGNORED_LABEL)}


class RoutedGeneration:
    """The mixin that `routed` puts before the class of a stock model with its head."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Called as any module. Labels are ignored here too, for trainers that replace `forward`, as TRL's do."""
        if kwargs.get("labels") is not None:
            names = argument_names(type(self).forward)
            args, kwargs = (), without_image_labels(self.model, dict(zip(names, args, strict=False)) | kwargs)
        return super().__call__(*args, **kwargs)

    def _expand_inputs_for_generation(
        self, *args: Any, input_ids: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, dict]:
        """Called once by `generate`, with the prompt, before any computation."""
        ends_in_image = input_ids is not None and bool(image_marks(self.model, input_ids[:, -1:], None).any())
        if ends_in_image and not self.model.plan.is_vanilla:
            raise ValueError(
                "The prompt ends in an image, and past the split image tokens predict nothing: put text after the "
                "image, such as the question, or use the chat template."
            )
        self._drop_half_filled_cache()
        return super()._expand_inputs_for_generation(*args, input_ids=input_ids, **kwargs)

    # -- static caches ------------------------------------------------------------------------------------------------

    def _drop_half_filled_cache(self) -> None:
        """Transformers 4 keeps a static cache for the next call, also one that a failed call did not fill."""
        kept, depth = vars(self).get("_cache"), self.config.get_text_config().num_hidden_layers
        if kept is not None and not all(layer.is_initialized for layer in kept.layers[:depth]):
            del self._cache

    def _prepare_static_cache(self, *args: Any, **kwargs: Any) -> Cache:
        """Called by `generate` of transformers 5."""
        self._refuse_flex_attention()
        return super()._prepare_static_cache(*args, **kwargs)

    def _get_cache(self, *args: Any, **kwargs: Any) -> Cache:
        """Called by `generate` of transformers 4."""
        self._refuse_flex_attention()
        return super()._get_cache(*args, **kwargs)

    def _refuse_flex_attention(self) -> None:
        if self.config.get_text_config()._attn_implementation == "flex_attention" and not self.model.plan.is_vanilla:
            raise ValueError(
                "flex_attention does not run with a static cache, for which generate makes masks as tensors: call "
                "set_attn_implementation('sdpa'), or leave cache_implementation out."
            )


class LlavaGeneration(RoutedGeneration):
    """The mixin for a LLaVA, whose images all have the same number of tokens."""

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        *args: Any,
        pixel_values: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict:
        """The stock inputs, with the pixels of the images in this chunk: any turn of a dialogue may bring more."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, pixel_values=pixel_values, inputs_embeds=inputs_embeds, **kwargs
        )
        inputs.pop("pixel_values", None)
        chunk, cache = inputs.get("input_ids"), cache_in(inputs)
        decoding = cache is not None and cache.get_seq_length() > 0 and chunk is not None and chunk.shape[1] == 1
        if pixel_values is None or decoding:
            return inputs
        if chunk is not None:
            pixel_values = self._pixels_of_chunk(pixel_values, input_ids, chunk, kwargs)
        if pixel_values is not None:
            inputs["pixel_values"] = pixel_values
        return inputs

    def _images_per_row(self, input_ids: torch.Tensor | None, kwargs: dict) -> list[int] | None:
        """The number of images in each row; None if images differ in their numbers of tokens."""
        tokens, embeds = tokens_per_image(self.config, kwargs), kwargs.get("inputs_embeds")
        if tokens is None:
            return None
        if input_ids is None or input_ids.shape[1] == 0:  # `generate` started from embeddings
            return None if embeds is None else images_per_row(image_marks(self.model, None, embeds), tokens)
        return images_per_row(input_ids == self.config.image_token_id, tokens)

    def _pixels_of_chunk(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor, chunk: torch.Tensor, kwargs: dict
    ) -> torch.Tensor | None:
        """The pixels of the images in the chunk: the last ones of each row, of all pixels (N, ...) of the rows."""
        if chunk.shape[1] == input_ids.shape[1]:
            return pixel_values
        images, new = self._images_per_row(input_ids, kwargs), self._images_per_row(chunk, kwargs)
        if new is not None and sum(new) == 0:
            return None
        if new is None or len(pixel_values) != sum(images):
            return pixel_values  # those of the new images alone, or a wrong number, which forward refuses
        rows = pixel_values.split(images)
        return torch.cat([row[len(row) - count :] for row, count in zip(rows, new, strict=True)])

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.Tensor, dict]:
        """Repeat rows for beams and samples, and the images of each row with it, which stock LLaVA may get wrong."""
        pixel_values = model_kwargs.pop("pixel_values", None)
        images = None if pixel_values is None else self._images_per_row(input_ids, model_kwargs)
        repeated = pixel_values
        if expand_size > 1 and images is not None and sum(images) == len(pixel_values):  # else forward refuses it
            repeated = torch.cat([row.repeat(expand_size, 1, 1, 1) for row in pixel_values.split(images)])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | ({} if repeated is None else {"pixel_values": repeated})

    # -- a prefill in chunks ------------------------------------------------------------------------------------------

    def _maybe_prepare_encoder_kwargs_for_generation(
        self,
        inputs_tensor: torch.Tensor,
        model_kwargs: dict,
        model_input_name: str | None,
        generation_config: GenerationConfig,
    ) -> dict:
        """Encode the new images before a prefill in chunks, as a chunk may end in an image (transformers 5).

        In a prefill in one piece `forward` encodes them.
        """
        size, pixel_values = generation_config.prefill_chunk_size, model_kwargs.get("pixel_values")
        if size == 1 and model_kwargs.get("attention_mask") is not None and not self.model.plan.is_vanilla:
            raise ValueError(
                "prefill_chunk_size is 1, and a single token is taken for a decoded one, so that the attention mask "
                "would be ignored: choose 2 or more."
            )
        if size is None or pixel_values is None or model_input_name != "input_ids":
            return model_kwargs
        cache, mask = cache_in(model_kwargs), model_kwargs.get("attention_mask")
        num_tokens = generation_config._mask_length if mask is None else mask.shape[1]
        past = 0 if cache is None or num_tokens > inputs_tensor.shape[1] else int(cache.get_seq_length())
        pixel_values = self._pixels_of_chunk(pixel_values, inputs_tensor, inputs_tensor[:, past:], model_kwargs)
        model_kwargs = {name: value for name, value in model_kwargs.items() if name != "pixel_values"}
        if pixel_values is None:
            return model_kwargs
        return self._prepare_multimodal_encoder_kwargs_for_generation({**model_kwargs, "pixel_values": pixel_values})

    def _prefill_chunking(
        self, input_ids: torch.Tensor, generation_config: GenerationConfig, **model_kwargs: Any
    ) -> dict:
        """Refuse images in a prefill in chunks on transformers 4, which passes all pixels to every chunk."""
        if model_kwargs.get("pixel_values") is not None:
            raise ValueError(
                f"prefill_chunk_size is {generation_config.prefill_chunk_size}, but transformers 4 cannot split a "
                "prompt with images: leave it out, or use transformers 5."
            )
        return super()._prefill_chunking(input_ids, generation_config, **model_kwargs)
