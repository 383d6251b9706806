"""FastV and random pruning: what late fusion is compared with. Inference only, on the weights of a model at hand.

FastV (Chen et al., ECCV 2024, https://arxiv.org/abs/2403.06764) drops the image tokens that the prompt's last token
looks at least, once, after the first K layers:

    layers 0 ... K-1     all tokens                                         T keys
        |
    rank                 a row's image tokens, by the attention that its last token gives them in layer K-1
        |                (the mean over heads), or at random: the control at the same cut
    layers K ... L-1     text and the best `keep` share of the image tokens, in their order and at their positions

To the two streams of two_stream_dpvr.py that is a text-only plan split at K whose second stream is the tokens to drop:
masks, ragged rows, the cache and decoding are those of the method itself, on the same kernels.

    pruned = prune(model, layer=3, keep=0.5)         any vision-language model with full attention in every layer
    pruned.generate(**inputs, max_new_tokens=20)

Axes: B batch, T tokens of a chunk, V image tokens, N keys, H heads, D width.
"""

from functools import lru_cache, partial, wraps
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import can_return_tuple

from configuration_dpvr import JOINT, TEXT, LayerPlan
from costs_dpvr import DecoderCosts
from decoders_dpvr import check_decoder, layer_kinds, lowest_split, owner_of
from dpvr.benchmarks.ranking import RANKS, RankingPass, ranking_flops
from forward_dpvr import check_attention, routed_forward, stock_class
from generation_dpvr import routed
from twins_dpvr import twin
from versions_dpvr import argument_names

BRANCHES = ("side_branch", "own_branch")  # of DPVR models and adapters, which pruning does not run


def prune(
    model: PreTrainedModel,
    *,
    layer: int = 3,
    keep: float = 0.5,
    rank: Literal["attention", "random"] = "attention",
    seed: int = 0,
) -> "Pruned":
    """A model that shares all weights with `model` and prunes.

    Args:
        model: a stock vision-language model with its head, or the vanilla base of a DPVR one or of one with adapters.
        layer: K, how many layers see every token.
        keep: share of each row's image tokens that the later layers see; V tokens leave round(keep * V), at least one.
        rank: "attention" is FastV, "random" the control.
        seed: of the random ranks, which depend on it and on a row's number of image tokens alone.

    Raises:
        ValueError: for arguments that make no plan, and decoders that the method does not run on.
    """
    if not 0 < keep <= 1:
        raise ValueError(
            f"keep is {keep!r}, and must be a share of the image tokens above 0 and at most 1; to keep none use "
            "routing='text_only'."
        )
    if rank not in RANKS:
        raise ValueError(f"rank is {rank!r}: choose {' or '.join(map(repr, RANKS))}.")
    check_prunable(model.config, layer)
    check_attention(model.config)
    owner = owner_of(model)
    stock = type(model).own if hasattr(type(model), "own") else type(model)
    parts = {name: part for name, part in owner._modules.items() if name not in BRANCHES}
    without_head, pruned = twin(owner), twin(model)
    without_head.__class__, pruned.__class__ = pruned_model(stock_class(owner)), pruned_head(stock)
    vars(without_head)["_modules"] = parts
    vars(pruned)["_modules"] = {**model._modules, "model": without_head}
    depth = model.config.get_text_config().num_hidden_layers
    cut = Cut(LayerPlan(layer, (JOINT,) * layer + (TEXT,) * (depth - layer)), layer, keep, rank, seed)
    vars(without_head)["cut"] = vars(pruned)["cut"] = cut
    return pruned


def check_prunable(config: PretrainedConfig, layer: int) -> None:
    """Raise ValueError, with the reason, if a model cannot drop image tokens after its first `layer` layers.

    Args:
        config: of the whole vision-language model.
    """
    text = config.get_text_config()
    others = sorted(set(layer_kinds(text)) - {"full_attention"})
    if others:
        raise ValueError(
            f"FastV and random pruning need full attention in every layer, and the decoder of {config.model_type!r} "
            f"has layers of {' and '.join(others)}: choose another method, such as late_fusion, or another model."
        )
    depth, lowest = text.num_hidden_layers, lowest_split(config)
    if not (type(layer) is int and lowest <= layer < depth):
        stacked = " and adds features of its tower after the first of them (DeepStack)" if lowest > 1 else ""
        raise ValueError(
            f"layer is {layer!r}, but this decoder has {depth} layers{stacked}: choose {lowest} to {depth - 1} "
            "(FastV's own is 2 of 32, the paper's comparison 3)."
        )
    check_decoder(config, layer)


class Cut(NamedTuple):
    """Where image tokens leave, how many are left, and how they are ranked; as `prune` takes it."""

    plan: LayerPlan
    layer: int
    keep: float
    rank: str
    seed: int


@lru_cache
def pruned_model(stock: type) -> type:
    """The class for a model without its head that prunes, a subclass of the stock class with the same name.

    It has no side branch, and its plan is that of its `cut`.
    """
    names = argument_names(stock.forward)

    @can_return_tuple
    @wraps(stock.forward)
    def forward(self, *args: Any, **kwargs: Any):
        arguments = dict(zip(names, args, strict=False)) | kwargs
        how = {"rank": self.cut.rank, "seed": self.cut.seed, "valid": arguments.get("attention_mask")}
        make_pass = partial(PruningPass, keep=self.cut.keep, **how)
        return routed_forward(self, stock.forward, nn.ModuleList(), self.plan, arguments, make_pass=make_pass)

    own = {"forward": forward, "plan": property(lambda self: self.cut.plan), "stock": stock}
    named = {"__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return type(stock.__name__, (stock,), own | named)


@lru_cache
def pruned_head(stock: type) -> type:
    """The class for a model with its head that prunes, a subclass of the stock class with the same name."""
    base = routed(stock)

    @wraps(stock.forward)
    def forward(self, *args: Any, **kwargs: Any):
        """The stock forward; the last token given with an image is the one whose attention ranks.

        So generate with a cache, as is the default: without one every new token would rank anew.

        Returns:
            logits (B, T or kept, vocabulary). Those at dropped image tokens predict nothing.

        Raises:
            ValueError: as DPVR's forward, and for labels and hidden states, which belong to training and probing.
        """
        for name in ("labels", "output_hidden_states"):
            value = kwargs.get(name)
            if value is not None and value is not False:
                raise ValueError(f"A pruned model is for inference only and takes no {name}: leave them out.")
        return base.forward(self, *args, **kwargs)

    named = {"__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return type(stock.__name__, (Pruned, base), {"forward": forward} | named)


class Pruned:
    """The mixin before a stock class with its head, for a model that `prune` makes; there its `cut` is described."""

    cut: Cut

    @property
    def plan(self) -> LayerPlan:
        return self.cut.plan

    def prefill_flops(
        self, num_image_tokens: int, num_text_tokens: int, *, batch_size: int = 1, logits_to_keep: int = 1
    ) -> int:
        """As `CountedCosts.prefill_flops`."""
        return batch_size * pruned_flops(
            DecoderCosts.of(self.config.get_text_config()),
            num_image_tokens,
            num_text_tokens,
            layer=self.cut.layer,
            keep=self.cut.keep,
            rank=self.cut.rank,
            logits_to_keep=logits_to_keep,
        )

    def kv_cache_bytes(
        self,
        num_image_tokens: int,
        num_text_tokens: int,
        *,
        batch_size: int = 1,
        dtype: torch.dtype | None = None,
    ) -> int:
        """As `CountedCosts.kv_cache_bytes`."""
        costs, size = DecoderCosts.of(self.config.get_text_config()), (num_image_tokens, num_text_tokens)
        numbers = pruned_kv_numbers(costs, *size, layer=self.cut.layer, keep=self.cut.keep)
        return batch_size * numbers * (dtype or self.dtype).itemsize


def pruned_kv_numbers(
    costs: DecoderCosts, num_image_tokens: int, num_text_tokens: int, *, layer: int, keep: float
) -> int:
    """As `costs_dpvr.kv_numbers`: the first layers hold all tokens, the others the survivors."""
    kept = num_kept(num_image_tokens, keep)
    image = [num_image_tokens] * layer + [kept] * (len(costs.layers) - layer)
    return sum((num_text_tokens + held) * each.key_width for held, each in zip(image, costs.layers, strict=True))


def num_kept(num_image_tokens: int, keep: float) -> int:
    """Image tokens of a row that the later layers see."""
    return min(num_image_tokens, max(1, round(keep * num_image_tokens)))


def pruned_flops(
    costs: DecoderCosts,
    num_image_tokens: int,
    num_text_tokens: int,
    *,
    layer: int,
    keep: float,
    rank: str,
    logits_to_keep: int = 1,
) -> int:
    """As `costs_dpvr.prefill_flops`, with the one query's scores that rank the image tokens."""
    total, survivors = num_image_tokens + num_text_tokens, num_text_tokens + num_kept(num_image_tokens, keep)
    kept = min(logits_to_keep or total, total)
    last = kept if num_image_tokens and kept < num_text_tokens else survivors  # queries of the last layer
    flops = sum(costs.layer_flops(index, total, total) for index in range(layer))
    flops += sum(costs.layer_flops(index, survivors, survivors) for index in range(layer, len(costs.layers) - 1))
    flops += costs.layer_flops(len(costs.layers) - 1, last, survivors) + costs.head_flops(kept)
    return flops + ranking_flops(costs, rank, num_image_tokens, num_text_tokens, layer=layer - 1)


class PruningPass(RankingPass):
    """A forward pass that finds out on the way which tokens leave: the second stream is the tokens to drop.

    Args:
        keep: share of a row's image tokens that the layers past the split see.
    """

    def __init__(self, *args: Any, keep: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.keep = keep

    def leave(self, hidden: torch.Tensor) -> None:
        """Sort the chunk anew: the second stream is no longer the image but what is dropped."""
        self.sort(self.image_mask & ~best_image_tokens(self.ranked(), self.image_mask, self.keep))
        super().leave(hidden)


def best_image_tokens(scores: torch.Tensor, image_mask: torch.Tensor, keep: float) -> torch.Tensor:
    """bool (B, T): in each row the `keep` share of its image tokens with the highest scores (B, T)."""
    counts = image_mask.sum(1, keepdim=True)
    num_kept = (keep * counts.double()).round().clamp(min=1)
    order = scores.masked_fill(~image_mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return image_mask & (order.argsort(1) < num_kept)
