"""How image tokens are ranked by the prompt or by chance: for pruning.py, and for reduction.py, which chooses tokens.

    layers 0 ... s-1     all tokens
        |
    rank                 "attention", FastV's score: what the prompt's last token gives an image token in layer s-1,
        |                the mean over heads; or "random", the control
    layers s ... L-1     a subclass of `RankingPass` says what becomes of the best

FastV: Chen et al., ECCV 2024, https://arxiv.org/abs/2403.06764. Axes: B batch, T tokens of a chunk, N keys, H heads, D
width.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache

from costs_dpvr import DecoderCosts
from dpvr.analysis.attention import attention_inputs
from twins_dpvr import RoutedLayer
from two_stream_dpvr import TwoStreamPass

RANKS = ("attention", "random")


class Watch:
    """In a cache's place: looks at the keys that a layer reads."""

    def __init__(self, cache: Cache | None) -> None:
        self.cache = cache

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any):
        both = (keys, values) if self.cache is None else self.cache.update(keys, values, *args, **kwargs)
        self.keys = both[0]
        return both


class RankingPass(TwoStreamPass):
    """A forward pass that ranks the chunk's image tokens on its way to the split.

    Args:
        rank: "attention", which needs a layer below the split, or "random".
        seed: of the random ranks, which depend on it and on a row's number of image tokens alone.
        valid: the padding mask (B, past + T), if any.
    """

    def __init__(self, *args: Any, rank: str, seed: int, valid: torch.Tensor | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rank, self.seed, self.valid = rank, seed, valid

    def ranked(self) -> torch.Tensor:
        """Scores (B, T), of which those at image tokens count; from the last layer below the split on."""
        return self.attention_given if self.rank == "attention" else random_scores(self.image_mask, self.seed)

    def shared_layer(
        self, layer: RoutedLayer, hidden: torch.Tensor, arguments: dict[str, Any], cache: Cache | None
    ) -> Any:
        """As without ranks; the last of these layers also makes them."""
        if layer.index < self.plan.split_layer - 1 or self.rank == "random":
            return super().shared_layer(layer, hidden, arguments, cache)
        watch = Watch(cache)
        out = super().shared_layer(layer, hidden, arguments, watch)
        self.attention_given = self._last_token_attention(layer, hidden, arguments, watch.keys)
        return out

    def query_slots(self, kind: str) -> torch.Tensor:
        """As without pruning, and of kind "last" each row's last token."""
        if kind != "last":
            return super().query_slots(kind)
        if self.valid is None or self.valid.ndim != 2:
            return self.all_slots[:, -1:]
        place = torch.arange(self.length, device=self.valid.device)
        return self.all_slots.gather(1, (self.valid[:, -self.length :] * place).argmax(1, keepdim=True))

    def _last_token_attention(
        self, layer: RoutedLayer, hidden: torch.Tensor, arguments: dict[str, Any], keys: torch.Tensor
    ) -> torch.Tensor:
        """What each row's last token gives the chunk's tokens in `layer`, the mean over heads, float (B, T).

        `hidden` (B, T, D) are the layer's input; it has cached `keys`.
        """
        last, known = self.query_slots("last"), self.past + self.length
        of_last = {name: value for name, value in arguments.items() if name != "attention_mask"}
        found = attention_inputs(
            layer.stock, self.streams.pick(hidden, last), self.arguments(of_last, "last"), keys[:, :, :known]
        )
        seen = torch.arange(known, device=last.device) <= last  # (B, K)
        if self.valid is not None and self.valid.ndim == 2:
            seen &= self.valid[:, :known].bool()
        return found.weights(seen[:, None, None])[:, :, 0, self.past :].mean(1)


def random_scores(image_mask: torch.Tensor, seed: int) -> torch.Tensor:
    """Scores (B, T) that depend on the seed and on how many image tokens a row has, not on the batch it is in."""
    scores = torch.zeros(image_mask.shape)
    for row, row_mask in zip(scores, image_mask.cpu(), strict=True):
        row[row_mask] = torch.rand(int(row_mask.sum()), generator=torch.Generator().manual_seed(seed))
    return scores.to(image_mask.device)


def ranking_flops(costs: DecoderCosts, rank: str, num_image_tokens: int, num_text_tokens: int, *, layer: int) -> int:
    """FLOPs of the ranks of one prompt: by attention, one query's projection and scores in `layer`."""
    if rank == "random" or not num_image_tokens:
        return 0
    query_width = costs.layers[layer].per_pair // 4  # a query meets a key in two products
    return 2 * query_width * (costs.width + num_image_tokens + num_text_tokens)
