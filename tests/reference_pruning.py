"""A naive FastV to measure pruning.py against, in float64: one row, no cache, no batch, tokens deleted by hand.

h (T, D) --layers 0 ... K-1--> weights of the prompt's last token in layer K-1, head by head
       --> delete image tokens from h and from the list of positions --layers K ... L-1--> logits

`masked_pruned_logits` is one for any family: the stock model, whose later layers hide the deleted tokens by its mask.
"""

from contextlib import ExitStack

import torch
from families import forget
from reference import _Block, _image_features, _linear, _rms_norm
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from decoders_dpvr import decoder_of
from images_dpvr import image_marks


def naive_pruned_logits(
    model: LlavaForConditionalGeneration,
    ids: Tensor,
    pixel_values: Tensor,
    *,
    layer: int,
    keep: float,
    rank: str = "attention",
    seed: int = 0,
    prompt_length: int | None = None,
) -> tuple[list[int], Tensor]:
    """The positions that are left of one row of ids (T,), and their logits.

    prompt_length: how many of the ids are the prompt, whose last token ranks; the others are its answer.
    """
    decoder, block = model.model.language_model, _Block(model)
    image = (ids == model.config.image_token_id).nonzero().flatten()
    h = decoder.embed_tokens.weight[ids].index_copy(0, image, _image_features(model, pixel_values))
    place = torch.arange(len(ids))
    for index in range(layer):
        before, h = h, block(decoder.layers[index], h, place, h, place)
    if rank == "attention":
        worth = _attention(block, decoder.layers[layer - 1], before[: prompt_length or len(ids)])[image]
    else:
        worth = torch.rand(len(image), generator=torch.Generator().manual_seed(seed))
    best_first = sorted(range(len(image)), key=lambda index: -worth[index].item())
    gone = {int(image[index]) for index in best_first[max(1, round(keep * len(image))) :]}
    left = [position for position in range(len(ids)) if position not in gone]
    h, place = h[left], place[left]
    for stock in decoder.layers[layer:]:
        h = block(stock, h, place, h, place)
    return left, _linear(model.lm_head, _rms_norm(decoder.norm, h))


def masked_pruned_logits(
    model: nn.Module, inputs: dict[str, Tensor], *, layer: int, keep: float, rank: str = "attention", seed: int = 0
) -> tuple[list[int], Tensor]:
    """The positions that are left of one row without padding, and their logits.

    model: of any family with full attention in every layer, with eager attention, which shows its weights and takes a
        mask that is added to the scores.
    """
    forget(model)
    weights = model(**inputs, use_cache=False, output_attentions=True).attentions[layer - 1]  # (1, H, T, T)
    image = image_marks(model.model, inputs["input_ids"], None)[0].nonzero().flatten()
    if rank == "attention":
        worth = weights[0, :, -1].mean(0)[image]
    else:
        worth = torch.rand(len(image), generator=torch.Generator().manual_seed(seed))
    best_first = sorted(range(len(image)), key=lambda index: -worth[index].item())
    gone = image[best_first[max(1, round(keep * len(image))) :]]

    def hide(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        mask = kwargs["attention_mask"].clone()  # (1, 1, T, T)
        mask[..., gone] = torch.finfo(mask.dtype).min
        return args, kwargs | {"attention_mask": mask}

    forget(model)
    with ExitStack() as stack:
        for stock in decoder_of(model.model)[1].layers[layer:]:
            stack.callback(stock.register_forward_pre_hook(hide, with_kwargs=True).remove)
        logits = model(**inputs, use_cache=False).logits[0]
    left = [position for position in range(len(logits)) if position not in gone]
    return left, logits[left]


def _attention(block: _Block, layer: torch.nn.Module, h: Tensor) -> Tensor:
    """How much the last of the states (T, D) attends to each, (T,), the mean over heads."""
    attention, place = layer.self_attn, torch.arange(len(h))
    normed = _rms_norm(layer.input_layernorm, h)
    queries = block._rotate(block._split(_linear(attention.q_proj, normed)), place)  # (T, H, d)
    keys = block._rotate(block._split(_linear(attention.k_proj, normed)), place)
    given = torch.zeros(len(h), dtype=torch.float64)
    for head in range(block.heads):
        scores = keys[:, head * block.kv_heads // block.heads] @ queries[-1, head] / block.head_width**0.5
        given += torch.softmax(scores, dim=0) / block.heads
    return given
