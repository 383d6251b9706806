"""What a prompt costs under a routing: FLOPs of the prefill and bytes of the key-value cache, by formula.

    layer plan, V image and X text tokens
        |
    per layer: tokens that query, tokens that make keys
        |
    FLOPs, bytes            checked in the tests against torch.utils.flop_counter and the tensors of a real cache

The paper estimates its costs (Table 1, section 3.2) and measures latency (Table 6); these are exact counts.
"""

import torch

try:
    from .configuration_dpvr import CONTEXT, TEXT
except ImportError:
    from configuration_dpvr import CONTEXT, TEXT


class CostFormulas:
    """Costs as methods of a model with a `config`, a `side_branch` and a decoder; mixed in before the stock model."""

    def prefill_flops(
        self,
        num_image_tokens: int,
        num_text_tokens: int,
        *,
        batch_size: int = 1,
        logits_to_keep: int = 1,
        routing: str | None = None,
    ) -> int:
        """FLOPs of the language model's matrix products in one unpadded prefill (a multiply-add is 2).

        Counted as `torch.utils.flop_counter` counts them: attention without credit for causality, no norms,
        rotary, embedding look-up or vision tower. `routing`: another than the configured one ("none" is vanilla).

        Args:
            num_image_tokens, num_text_tokens: V and X of one row.
            logits_to_keep: how many last tokens get logits, 0 for all.
        """
        plan, text, image = self.config.layer_plan(routing), num_text_tokens, num_image_tokens
        total, depth = text + image, len(plan.modes)
        two_stream = plan.split_layer < depth and image > 0
        kept = min(logits_to_keep or total, total)
        flops = 0
        for index, mode in enumerate(plan.modes):
            queries = kept if two_stream and index == depth - 1 and kept < text else text
            if mode == TEXT:
                flops += self._layer_flops(queries, keys=text)
            elif mode == CONTEXT:
                flops += self._layer_flops(queries, keys=total)
            else:
                flops += self._layer_flops(total, keys=total)
        if two_stream and plan.reads_side_branch:
            flops += len(self.side_branch) * self._layer_flops(image, keys=image)
        flops += 2 * kept * self.config.text_config.hidden_size * self.config.text_config.vocab_size
        return batch_size * flops

    def _layer_flops(self, queries: int, keys: int) -> int:
        """A layer: `queries` tokens through q, o and the MLP, `keys` through k and v, attention between them."""
        text = self.config.text_config
        query_width, key_width = text.num_attention_heads * self._head_dim, text.num_key_value_heads * self._head_dim
        per_query = 2 * text.hidden_size * (2 * query_width + 3 * text.intermediate_size)
        return queries * (per_query + 4 * keys * query_width) + keys * 4 * text.hidden_size * key_width

    @property
    def _head_dim(self) -> int:
        return self.model.language_model.layers[0].self_attn.head_dim

    def kv_cache_bytes(
        self,
        num_image_tokens: int,
        num_text_tokens: int,
        *,
        batch_size: int = 1,
        routing: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> int:
        """Bytes of keys and values cached for prompts of V image and X text tokens (answers count as text).

        A joint or context layer holds V + X entries, a text layer X, a side layer V. A static cache has room for its
        `max_cache_len` tokens: that is X + V. `dtype`: default the model's.
        """
        plan, total = self.config.layer_plan(routing), num_image_tokens + num_text_tokens
        entries = sum(num_text_tokens if mode == TEXT else total for mode in plan.modes)
        if plan.split_layer < len(plan.modes) and plan.reads_side_branch:
            entries += len(self.side_branch) * num_image_tokens
        per_entry = 2 * self.config.text_config.num_key_value_heads * self._head_dim
        return batch_size * entries * per_entry * (dtype or self.dtype).itemsize
