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

    def layer_flops(self, queries: int, keys: int) -> int:
        """FLOPs of a layer: q, o and the MLP for `queries` tokens, k and v for `keys` tokens, and attention."""
        per_query = 2 * self.width * (2 * self.query_width + 3 * self.mlp_width)
        return queries * (per_query + 4 * keys * self.query_width) + keys * 4 * self.width * self.key_width

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
    logits_to_keep: int = 1,
) -> int:
    """FLOPs of the language model's matrix products in the prefill of one row without padding (a multiply-add is 2).

    Counted as `torch.utils.flop_counter` does: attention over all pairs of query and key, although half are masked;
    no norms, rotary embedding or embedding look-up, and not the vision tower.

    Args:
        num_image_tokens, num_text_tokens: V and X.
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
            flops += shape.layer_flops(queries, keys=total)
        else:
            flops += shape.layer_flops(total, keys=total)
    if two_stream and plan.reads_side_branch:
        flops += num_side_layers * shape.layer_flops(image, keys=image)
    return flops


def kv_entries(plan: LayerPlan, num_image_tokens: int, num_text_tokens: int, *, num_side_layers: int = 1) -> int:
    """Number of tokens whose keys and values a cache holds after a prompt, summed over layers.

    A joint or context layer holds V + X, a text layer X, a side layer V. For a static cache V + X is its
    `max_cache_len`.
    """
    total = num_image_tokens + num_text_tokens
    entries = sum(num_text_tokens if mode == TEXT else total for mode in plan.modes)
    return entries + (num_side_layers * num_image_tokens if plan.reads_side_branch else 0)


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
        return batch_size * prefill_flops(
            DecoderShape.of(self.config.text_config),
            self.config.layer_plan(routing),
            num_image_tokens,
            num_text_tokens,
            num_side_layers=len(self.side_branch),
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
        plan, side = self.config.layer_plan(routing), len(self.side_branch)
        entries = batch_size * kv_entries(plan, num_image_tokens, num_text_tokens, num_side_layers=side)
        return DecoderShape.of(self.config.text_config).key_bytes(entries, dtype or self.dtype)
