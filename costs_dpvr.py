"""The cost of a prompt under a layer plan, by formula: FLOPs of the prefill, and bytes of keys and values.

    shape of a decoder, layer plan, V image and X text tokens
        |
    per layer: the number of queries and the number of keys
        |
    FLOPs, bytes            tests compare them with torch.utils.flop_counter and with the tensors of a real cache

The paper estimates its costs (Table 1, section 3.2) and measures latency (Table 6); these are exact counts.
"""

from typing import NamedTuple

import torch
from transformers import PretrainedConfig

try:
    from .configuration_dpvr import CONTEXT, TEXT, LayerPlan
except ImportError:
    from configuration_dpvr import CONTEXT, TEXT, LayerPlan


class DecoderShape(NamedTuple):
    """What the cost of a decoder depends on; `query_width` and `key_width` are those of all heads together."""

    width: int
    mlp_width: int
    query_width: int
    key_width: int
    vocabulary: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> "DecoderShape":
        """The shape of the decoder that a text config describes."""
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads * head,
            config.num_key_value_heads * head,
            config.vocab_size,
        )

    def layer_flops(self, queries: int, keys: int, *, from_latent: int = 0, rank: int = 0) -> int:
        """FLOPs of a layer: q, o and the MLP for `queries` tokens, k and v for `keys` tokens, and attention.

        The keys and values of `from_latent` of these tokens are made from a latent of this rank.
        """
        per_query = 2 * self.width * (2 * self.query_width + 3 * self.mlp_width)
        projected = (keys - from_latent) * self.width + from_latent * rank
        return queries * (per_query + 4 * keys * self.query_width) + projected * 4 * self.key_width

    def head_flops(self, tokens: int) -> int:
        """FLOPs of the logits of `tokens` tokens."""
        return 2 * tokens * self.width * self.vocabulary

    def key_bytes(self, entries: int, dtype: torch.dtype) -> int:
        """Bytes of the keys and values of `entries` tokens in one layer."""
        return 2 * entries * self.key_width * dtype.itemsize


def prefill_flops(
    shape: DecoderShape,
    plan: LayerPlan,
    num_image_tokens: int,
    num_text_tokens: int,
    *,
    num_side_layers: int = 1,
    latent_rank: int = 0,
    logits_to_keep: int = 1,
) -> int:
    """FLOPs of the language model's matrix products in the prefill of one row without padding (a multiply-add is 2).

    Counted as `torch.utils.flop_counter` does: attention over all pairs of query and key, although half are masked;
    no norms, rotary embedding or embedding look-up, and not the vision tower.

    Args:
        num_image_tokens, num_text_tokens: V and X.
        num_side_layers, latent_rank: of the side branch, or of the latent if the plan reads one.
        logits_to_keep: the number of last tokens that get logits; 0 for all.
    """
    text, image, total = num_text_tokens, num_image_tokens, num_text_tokens + num_image_tokens
    two_stream = not plan.is_vanilla and image > 0
    kept = min(logits_to_keep or total, total)
    flops = shape.head_flops(kept)
    for index, mode in enumerate(plan.modes):
        queries = kept if two_stream and index == len(plan.modes) - 1 and kept < text else text
        if mode == TEXT:
            flops += shape.layer_flops(queries, keys=text)
        elif mode == CONTEXT:
            read = tokens_read(plan, index, image)
            latent = {"from_latent": read, "rank": latent_rank} if plan.latent_stride else {}
            flops += shape.layer_flops(queries, keys=text + read, **latent)
        else:
            flops += shape.layer_flops(total, keys=total)
    if two_stream and plan.reads_side_branch:
        flops += num_side_layers * shape.layer_flops(image, keys=image)
        flops += 2 * image * shape.width * latent_rank if plan.latent_stride else 0
    return flops


def tokens_read(plan: LayerPlan, layer: int, num_image_tokens: int) -> int:
    """The number of image tokens whose keys a context layer holds, of a row with so many."""
    return num_image_tokens if layer == 0 else -(-num_image_tokens // (plan.latent_stride or 1))


def kv_entries(plan: LayerPlan, num_image_tokens: int, num_text_tokens: int, *, num_side_layers: int = 1) -> int:
    """Number of tokens whose keys and values a cache holds after a prompt, summed over layers.

    A joint layer holds V + X, a text layer X, a side layer V, a context layer X and the image tokens that it reads.
    For a static cache V + X is its `max_cache_len`.
    """
    entries = num_side_layers * num_image_tokens if plan.reads_side_branch else 0
    for index, mode in enumerate(plan.modes):
        image = tokens_read(plan, index, num_image_tokens) if mode == CONTEXT else num_image_tokens
        entries += num_text_tokens + (0 if mode == TEXT else image)
    return entries


class CostFormulas:
    """The formulas as methods of a model with a `config` and a `side_branch`; a mixin before the stock class."""

    def prefill_flops(
        self,
        num_image_tokens: int,
        num_text_tokens: int,
        *,
        batch_size: int = 1,
        logits_to_keep: int = 1,
        routing: str | None = None,
    ) -> int:
        """FLOPs of a prefill, as the function of this name.

        Args:
            routing: used in place of the configured one ("none" is vanilla LLaVA).
        """
        plan = self.config.layer_plan(routing)
        return batch_size * prefill_flops(
            DecoderShape.of(self.config.text_config),
            plan,
            num_image_tokens,
            num_text_tokens,
            num_side_layers=self._side_layers(plan),
            latent_rank=self.config.latent_rank or 0,
            logits_to_keep=logits_to_keep,
        )

    def kv_cache_bytes(
        self,
        num_image_tokens: int,
        num_text_tokens: int,
        *,
        batch_size: int = 1,
        routing: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> int:
        """Bytes of keys and values cached for prompts of V image and X text tokens; answers count as text.

        Args:
            routing: used in place of the configured one ("none" is vanilla LLaVA).
            dtype: None: the model's.
        """
        plan = self.config.layer_plan(routing)
        side = self._side_layers(plan)
        entries = batch_size * kv_entries(plan, num_image_tokens, num_text_tokens, num_side_layers=side)
        return DecoderShape.of(self.config.text_config).key_bytes(entries, dtype or self.dtype)

    def _side_layers(self, plan: LayerPlan) -> int:
        return self.config.latent_side_layers if plan.latent_stride else self.config.num_side_layers
