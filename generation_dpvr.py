"""The model with its head under a routing: loss, logits and `generate` with images.

    routed(Qwen3VLForConditionalGeneration)      a subclass of the stock class, in which
        loss            leaves out labels at image tokens and those that image tokens would predict
        logits_to_keep  is passed to the decoder, whose last layer then has only these tokens as queries
    routed(LlavaForConditionalGeneration)        also
        generate        repeats a row's pixels with the row, and passes on the pixels of the chunk that runs

    generate(..., fallback_below=0.6)      a reply that the plan was unsure of is made again by the base

`DpvrLlavaForConditionalGeneration` (modeling_dpvr.py) and a stock model with a PEFT adapter (adapter_dpvr.py) both are
such a class. The model without its head, at `self.model`, has a `plan`: the layer plan that it runs.

Axes: B batch, T tokens, N images.
"""

import copy
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


def _checked_fallback(below: float, config: GenerationConfig, kwargs: dict[str, Any]) -> GenerationConfig:
    """The whole generation config of a call, if a fallback can be made in it."""
    config = copy.deepcopy(config)
    config.update(**kwargs)
    faults = {
        f"fallback_below is {below!r}: give a lead of probability from 0 to 1": not 0 <= below <= 1,
        "a sampled reply says nothing of how sure the model was: leave do_sample out": config.do_sample,
        "beams have no one reply: leave num_beams out": (config.num_beams or 1) > 1,
        "what was streamed cannot be taken back: leave the streamer out": kwargs.get("streamer") is not None,
        "the base cannot go on from a plan's cache: leave past_key_values out": cache_in(kwargs) is not None,
        "an assistant keeps no logits of what it guessed: leave assistant_model out": (
            kwargs.get("assistant_model") is not None or config.prompt_lookup_num_tokens
        ),
        "a fallback returns ids alone: leave return_dict_in_generate out": config.return_dict_in_generate,
    }
    if found := next((fault for fault, is_so in faults.items() if is_so), None):
        raise ValueError(f"generate with fallback_below: {found}.")
    return config


def least_leads(
    logits: tuple[torch.Tensor, ...], sequences: torch.Tensor, ends: int | list[int] | None
) -> torch.Tensor:
    """The least lead of each row's new tokens over the second likeliest one, up to its first end token.

    Args:
        logits: of each new token, (B, vocabulary).
        sequences: (B, prompt and new tokens).

    Returns:
        (B,) in float64, from 0 to 1.
    """
    best = torch.stack(logits, dim=1).double().softmax(dim=-1).topk(2, dim=-1).values
    new = sequences[:, -len(logits) :]
    is_end = torch.isin(new, torch.tensor([] if ends is None else ends, device=new.device, dtype=new.dtype))
    after_end = is_end.cumsum(dim=1) - is_end.long() > 0
    return (best[..., 0] - best[..., 1]).masked_fill(after_end, 1.0).amin(dim=1)


def put_rows(whole: torch.Tensor, rows: list[int], others: torch.Tensor, pad: int) -> torch.Tensor:
    """Ids (B, T) with those of some rows replaced by `others` (R, S); the shorter ones are filled up on the right."""
    length = max(whole.shape[1], others.shape[1])
    whole, others = (nn.functional.pad(ids, (0, length - ids.shape[1]), value=pad) for ids in (whole, others))
    whole[rows] = others
    return whole


class RoutedGeneration:
    """The mixin that `routed` puts before the class of a stock model with its head.

    Attributes:
        fell_back: of the latest call of `generate` with `fallback_below`, for each row whether the base answered.
    """

    fell_back: list[bool] | None = None

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        fallback_below: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the stock class generates; a greedy reply of which the plan was unsure may be made again by the base.

        Args:
            fallback_below: from 0 to 1. A row is generated again without the plan if, at any of its new tokens, the
                probability of this token leads that of the second by less. `python -m dpvr.benchmarks.fallback` finds
                the value that keeps the share of replies that differ from the base's below a tolerated one. Where the
                images of a batch cannot be told apart by rows, as of most families but LLaVA, the base runs all rows
                and answers those.

        Returns:
            With `fallback_below` the ids (B, T + new), padded on the right.

        Raises:
            ValueError: with `fallback_below`, for what is not greedy, streamed, or not answered with ids alone, and
                for a cache from before.
        """
        if fallback_below is None:
            return super().generate(inputs, generation_config, *args, **kwargs)
        config = _checked_fallback(fallback_below, generation_config or self.generation_config, kwargs)
        if inputs is not None:
            kwargs["input_ids"] = inputs
        own = kwargs | {"return_dict_in_generate": True, "output_logits": True}
        first = super().generate(None, generation_config, *args, **own)
        leads = least_leads(first.logits, first.sequences, config.eos_token_id)
        self.fell_back = [lead < fallback_below and not self.model.plan.is_vanilla for lead in leads.tolist()]
        if not any(self.fell_back):
            return first.sequences
        rows = [row for row, again in enumerate(self.fell_back) if again]
        chosen = None if all(self.fell_back) else self._of_rows(rows, kwargs)
        with self.model.as_base():
            again = super().generate(None, generation_config, *args, **(chosen or kwargs))
        if all(self.fell_back):
            return again
        again = again if chosen else again[rows]
        ends, pad = config.eos_token_id, config.pad_token_id
        ends = [ends] if isinstance(ends, int) else list(ends or [0])
        return put_rows(first.sequences, rows, again, ends[0] if pad is None else pad)

    def _of_rows(self, rows: list[int], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """The arguments of some rows of a batch; None where it is not known which images are theirs."""
        return None

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

    def _of_rows(self, rows: list[int], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        ids, pixels = kwargs.get("input_ids"), kwargs.get("pixel_values")
        images = self._images_per_row(ids, kwargs)
        if ids is None or images is None or (pixels is not None and sum(images) != len(pixels)):
            return None
        own = {name: kwargs[name][rows] for name in ("input_ids", "attention_mask") if kwargs.get(name) is not None}
        if pixels is not None:
            of_row = pixels.split(images)
            own["pixel_values"] = torch.cat([of_row[row] for row in rows])
        return kwargs | own

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
