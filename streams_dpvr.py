"""The text and image stream of a chunk, and their parts of the attention mask that the stock decoder makes.

Every token has a slot, its index in the whole sequence. In the mask for all tokens, the queries of a stream are some
of the rows and its keys some of the columns:

    the stock mask of "u u I I t t"        of its text, with the keys in the order I I u u t t
        query u    x . . . . .                          query u      . . x . . .
              u    x x . . . .                                u      . . x x . .
              I    x x x . . .
              I    x x x x . .
              t    x x x x x .                                t      x x x x x .
              t    x x x x x x                                t      x x x x x x

Axes: B batch, T all tokens of a chunk, X its text tokens, V its image tokens, D width, H heads, Q queries, K keys.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


@dataclass
class Streams:
    """One chunk of T tokens, sorted into a text and an image stream.

    Rows with fewer tokens in a stream than the longest row start with padding slots, which are -1.
    """

    text: torch.Tensor  # int64 (B, X), slots
    image: torch.Tensor  # int64 (B, V), slots
    merge_index: torch.Tensor  # int64 (B, T), each token's entry in cat([text, image])
    first: int  # slot of the chunk's first token

    @classmethod
    def sort(cls, image_mask: torch.Tensor, first: int, num_text: int, num_image: int) -> "Streams":
        """Sort the tokens of a chunk.

        Args:
            image_mask: bool (B, T), True at image tokens.
            first: slot of the chunk's first token.
            num_text, num_image: X and V, the largest number of text and image tokens in a row.
        """
        text_count, image_count = (~image_mask).cumsum(1), image_mask.cumsum(1)  # (B, T)
        text_entry = num_text - text_count[:, -1:] + text_count - 1
        image_entry = num_text + num_image - image_count[:, -1:] + image_count - 1
        merge_index = torch.where(image_mask, image_entry, text_entry)
        slots = torch.arange(first, first + image_mask.shape[1], device=image_mask.device).expand_as(merge_index)
        entries = slots.new_full((len(slots), num_text + num_image), -1).scatter(1, merge_index, slots)
        return cls(entries[:, :num_text], entries[:, num_text:], merge_index, first)

    def pick(self, states: torch.Tensor, slots: torch.Tensor, axis: int = 1) -> torch.Tensor:
        """The entries of a tensor at `slots` (B, N) along its token axis; at padding slots the first token's.

        Args:
            states: (..., B or 1, T, ...), the batch axis right before the token axis.
            axis: the token axis.
        """
        index, batch_axis = (slots - self.first).clamp(min=0).to(states.device), axis % states.ndim - 1
        shape = list(states.shape)
        shape[batch_axis] = index.shape[0]
        states, shape[batch_axis + 1] = states.expand(shape), index.shape[1]
        view = [1] * states.ndim
        view[batch_axis], view[batch_axis + 1] = index.shape
        return states.gather(batch_axis + 1, index.view(view).expand(shape))

    def merge(self, text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Text (B, X, D) and image (B, V, D) states in the order of the tokens again, (B, T, D)."""
        both = torch.cat([text, image.to(text.device)], dim=1)
        return both.gather(1, self.merge_index[..., None].to(both.device).expand(-1, -1, both.shape[-1]))


def visible_keys(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The causal mask of slots, for when the stock decoder makes no mask and leaves causality to the kernel.

    A padding slot attends to padding slots, as a row without any key would give NaN.

    Args:
        queries, keys: int64 (B, Q) and (B, K) slots.

    Returns:
        bool (B, 1, Q, K).
    """
    seen = (keys[:, None, :] <= queries[:, :, None]) & (keys >= 0)[:, None, :]
    return (seen | (keys[:, None, :] == queries[:, :, None]))[:, None]


def mask_of_keys(full: torch.Tensor | BlockMask, rows: torch.Tensor | None, columns: torch.Tensor) -> Any:
    """Some rows and columns of a stock mask, in its form. Padding slots are seen by themselves alone.

    Args:
        full: the mask of all tokens: bool or additive (B or 1, H or 1, T, K), or a `BlockMask`.
        rows: int64 (B, Q), the places of the queries in the chunk, negative at padding slots; None: all, in order.
        columns: int64 (B, N), the places of the keys in `full`, negative at padding slots.
    """
    if isinstance(full, BlockMask):
        return _block_mask_of_keys(full, rows, columns)
    batch_size, num_keys = columns.shape
    picked = full.expand(batch_size, *full.shape[1:])
    if rows is not None:
        at = rows.clamp(min=0)[:, None, :, None]
        picked = picked.gather(2, at.expand(-1, picked.shape[1], -1, picked.shape[3]))
    at = columns.clamp(min=0)[:, None, None, :].expand(-1, *picked.shape[1:3], -1)
    picked, hidden = picked.gather(3, at), (columns < 0)[:, None, None, :]
    alone = None if rows is None else ((columns[:, None] == rows[..., None]) & (rows < 0)[..., None])[:, None]
    if picked.dtype == torch.bool:
        picked = picked & ~hidden
        return picked if alone is None else picked | alone
    picked = picked.masked_fill(hidden, torch.finfo(picked.dtype).min)
    return picked if alone is None else picked.masked_fill(alone, 0.0)


def _block_mask_of_keys(full: BlockMask, rows: torch.Tensor | None, columns: torch.Tensor) -> BlockMask:
    (batch_size, num_keys), stock_mod = columns.shape, full.mask_mod
    num_queries = full.shape[-2] if rows is None else rows.shape[1]
    if rows is None:
        rows = torch.arange(num_queries, device=columns.device).expand(batch_size, -1)

    def mask_mod(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        at, place = rows[row, query], columns[row, key]
        seen = stock_mod(row, head, at.clamp(min=0), place.clamp(min=0)) & (place >= 0)
        return seen | ((place == at) & (at < 0))

    return create_block_mask(mask_mod, batch_size, None, num_queries, num_keys, device=columns.device)


@dataclass
class Runs:
    """The runs of neighbouring tokens in a stream: the tokens of one picture, or of one tile of it.

    Args:
        slots: int64 (B, V), negative at padding slots, which are in no run.
    """

    slots: torch.Tensor

    def __post_init__(self) -> None:
        before = nn.functional.pad(self.slots, (1, 0), value=-2)[:, :-1]
        starts, places = self.slots != before + 1, torch.arange(self.slots.shape[1], device=self.slots.device)
        self.held = self.slots >= 0
        self.of = starts.cumsum(1)  # the number of each token's run, which never falls along a row
        self.place = places - (starts * places).cummax(1).values  # among the tokens of its run
        empty = self.slots.new_zeros(len(self.slots), self.slots.shape[1] + 1)
        self.sizes = empty.scatter_add(1, self.of, self.held.to(empty))  # (B, V + 1), by the number of the run

    def count(self, stride: int) -> torch.Tensor:
        """How many tokens of a row are kept, (B,), if of every run one of `stride` is, rounded up."""
        return (-(-self.sizes // stride)).sum(1)

    def best(self, scores: torch.Tensor, stride: int) -> torch.Tensor:
        """bool (B, V): of every run one token of `stride`, with the highest scores (B, V); of equals the first."""
        order = scores.masked_fill(~self.held, -torch.inf).argsort(dim=1, descending=True, stable=True)
        order = order.gather(1, self.of.gather(1, order).argsort(dim=1, stable=True))  # run by run, as the tokens are
        within = self.place < (-(-self.sizes // stride)).gather(1, self.of)
        return torch.zeros_like(self.held).scatter(1, order, within) & self.held

    def mean(self, states: torch.Tensor) -> torch.Tensor:
        """For every token the mean (B, V, D) of the states (B, V, D) in its run."""
        at = self.of[..., None].expand_as(states)
        sums = states.new_zeros(len(states), self.sizes.shape[1], states.shape[2])
        sums = sums.scatter_add(1, at, states * self.held[..., None])
        return (sums / self.sizes.clamp(min=1)[..., None]).gather(1, at)


def shifted(first: int, slots: torch.Tensor) -> torch.Tensor:
    """Slots counted from `first`; padding slots stay negative, and slots before `first` become so."""
    return torch.where(slots < 0, slots, slots - first) if first else slots
