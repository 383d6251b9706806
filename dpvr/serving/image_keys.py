"""What deep layers read of the image in vLLM: side layers, a latent, and each layer's keys and values.

    image states z (V, D) at the split
        side layers         decoder layers of vLLM's own class, among image tokens alone
        latent              c = A z / rms(z)                                      (latent_dpvr.py)
        for each deep layer
            side branch     k_proj and v_proj of the layer on its own norm of z
            latent          K = W c + b, V = W' c + b'
            the layer's k-norm and rotary embedding, then its cache

Axes: N tokens of a batch, V image tokens among them, D width, H query and G key heads, E head width, S slots.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import ReplicatedLinear

from latent_dpvr import normalised

PICTURES = "dpvr_pictures"  # in a forward context: the `Pictures` of the batch


class Pictures(NamedTuple):
    """Where a batch's image tokens are in the cache.

    Attributes:
        requests, slots: int64 (V,), each token's request and its place there.
        cache_slots: int64 (V,), its place in a layer's cache.
        block_table: int (B, blocks), the cache's blocks that each request holds.
        block_size: slots in a block.
    """

    requests: np.ndarray
    slots: np.ndarray
    cache_slots: torch.Tensor
    block_table: torch.Tensor
    block_size: int


class SideAttention(nn.Module):
    """Causal attention among the image tokens of a request, in place of a side layer's stock attention.

    Paged kernels give a query all slots before it, and here it must not see those of text. So this reads the layer's
    cache itself. All tokens of a request have a slot in it, as in any layer, which keeps prefix caching and chunks
    right: image tokens their key and value, text tokens NaN in the first place, by which they are passed over.
    """

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.stock = stock

    def rows(self) -> torch.Tensor:
        """The layer's cache as (S, 2 G E); no kernel of vLLM reads it."""
        return self.stock.kv_cache.view(-1, 2 * self.stock.num_kv_heads * self.stock.head_size)

    def pass_over(self, cache_slots: torch.Tensor) -> None:
        """Mark the slots of text tokens."""
        self.rows()[cache_slots, 0] = torch.nan

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """(V, H E) of queries (V, H E), keys and values (V, G E)."""
        pictures, rows = get_forward_context().additional_kwargs[PICTURES], self.rows()
        rows[pictures.cache_slots] = torch.cat([key, value], dim=-1).to(rows.dtype)
        outputs = [
            self._attend(query[places[0] : places[-1] + 1], pictures, places, rows)
            for places in np.split(np.arange(len(pictures.requests)), np.flatnonzero(np.diff(pictures.requests)) + 1)
        ]
        return torch.cat(outputs)

    def _attend(self, query: torch.Tensor, pictures: Pictures, places: np.ndarray, rows: torch.Tensor) -> torch.Tensor:
        """The image tokens of one request, which are at `places` of the batch's."""
        slots = torch.from_numpy(pictures.slots[places]).to(rows.device)
        all_slots = torch.arange(int(pictures.slots[places[-1]]) + 1, device=rows.device)
        blocks = pictures.block_table[pictures.requests[places[0]]].long()
        seen = rows[blocks[all_slots // pictures.block_size] * pictures.block_size + all_slots % pictures.block_size]
        held = ~seen[:, 0].isnan()
        key, value = seen[held].to(query.dtype).chunk(2, dim=-1)  # (K, G E)
        output = scaled_dot_product_attention(
            self._heads(query),
            self._heads(key),
            self._heads(value),
            attn_mask=all_slots[held] <= slots[:, None],
            scale=self.stock.impl.scale,
            enable_gqa=True,
        )
        return output[0].transpose(0, 1).reshape(len(query), -1)

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        """(1, H, N, E) of (N, H E)."""
        return states.view(1, len(states), -1, self.stock.head_size).transpose(1, 2)


class Latent(nn.Module):
    """The map to the latent, and from it to each deep layer's keys and values: this process's heads of them.

    Args:
        attentions: of the layers that read, by their index.
        width, rank: D and r.
    """

    def __init__(self, attentions: dict[int, nn.Module], width: int, rank: int) -> None:
        super().__init__()
        self.reduce = ReplicatedLinear(width, rank, bias=False, return_bias=False)
        self.keys, self.values = (
            nn.ModuleDict(
                {
                    str(index): ReplicatedLinear(rank, attention.kv_size, return_bias=False)
                    for index, attention in attentions.items()
                }
            )
            for _ in range(2)
        )

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """The latent (V, r) of image states (V, D)."""
        return self.reduce(normalised(states))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Called by vLLM's loader with the saved weights."""
        own, loaded = dict(self.named_parameters()), set()
        for name, weight in weights:
            own[name].data.copy_(weight if name.startswith("reduce") else own_heads(weight, len(own[name])))
            loaded.add(name)
        return loaded


def own_heads(weight: torch.Tensor, size: int) -> torch.Tensor:
    """The rows of this process, `size` of them, of a projection to all key heads."""
    processes, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
    shares = len(weight) // size  # fewer than processes if they share heads
    return weight.narrow(0, rank * shares // processes * size, size)


class KeyValueProjection(ReplicatedLinear):
    """k_proj and v_proj of a decoder layer without its q_proj: the last rows of its `qkv_proj`, not loaded anew."""

    def __init__(self, attention: nn.Module, width: int) -> None:
        bias = attention.qkv_proj.bias is not None
        super().__init__(width, 2 * attention.kv_size, bias=bias, return_bias=False)

    def take_rows(self, attention: nn.Module) -> None:
        """Share the weights of `qkv_proj`, once these are loaded."""
        for name, weight in self.named_parameters():
            weight.data = attention.qkv_proj.get_parameter(name).data[attention.q_size :]


def write_keys(
    layer: nn.Module, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor
) -> None:
    """Write keys and values (V, G E) of image tokens, as they come from the projections, to a layer's cache."""
    attention, cached = layer.self_attn, layer.self_attn.attn
    if "k_norm" in attention._modules:
        keys = attention.k_norm(keys.reshape(-1, cached.head_size)).view_as(keys)
    _, keys = attention.rotary_emb(positions, keys.clone(), keys.contiguous())  # it wants queries, too
    shape = (-1, cached.num_kv_heads, cached.head_size)
    cached.impl.do_kv_cache_update(
        cached, keys.reshape(shape), values.reshape(shape).contiguous(), cached.kv_cache, slots
    )
