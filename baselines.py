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

    pruned = prune(llava, layer=3, keep=0.5)
    pruned.generate(**inputs, max_new_tokens=20)

Axes: B batch, T tokens of a chunk, V image tokens, N keys, H heads, D width.
"""

from functools import partial
from typing import Literal

import torch
from torch import nn
from transformers import DynamicCache, LlavaForConditionalGeneration
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast
from transformers.utils import can_return_tuple

from configuration_dpvr import JOINT, TEXT, LayerPlan
from costs_dpvr import CostFormulas
from routing_dpvr import routed_forward
from two_stream_dpvr import TwoStreamPass, check_support, two_stream_forward, visible_keys

RANKS = ("attention", "random")


def prune(
    model: LlavaForConditionalGeneration,
    *,
    layer: int = 3,
    keep: float = 0.5,
    rank: Literal["attention", "random"] = "attention",
    seed: int = 0,
) -> "PrunedLlava":
    """A model that shares all weights with `model` (a stock LLaVA, or the vanilla base of a DPVR one) and prunes.

    Args:
        layer: K, how many layers see every token.
        keep: share of each row's image tokens that the later layers see; V tokens leave round(keep * V), at least one.
        rank: "attention" is FastV, "random" the control.
        seed: of the random ranks, which depend on it and on a row's number of image tokens alone.

    Raises:
        ValueError: for arguments that make no plan, and decoders that the method does not run on.
    """
    depth = model.config.text_config.num_hidden_layers
    if not (type(layer) is int and 1 <= layer < depth):
        raise ValueError(
            f"Expected layer to be an integer from 1 to {depth - 1}, for a decoder of {depth} layers; got {layer!r}. "
            "Remedy: FastV's own is 2 of 32, the paper's comparison 3."
        )
    if not 0 < keep <= 1:
        raise ValueError(
            f"Expected keep, a share of the image tokens, above 0 and at most 1; got {keep!r}. Remedy: no image "
            "token at all is routing='text_only'."
        )
    if rank not in RANKS:
        raise ValueError(f"Expected rank to be one of {RANKS}; got {rank!r}. Remedy: pick one of these names.")
    check_support(model.config)
    return PrunedLlava(model, layer, keep, rank, seed)


class PrunedLlava(CostFormulas, LlavaForConditionalGeneration):
    """LLaVA with fewer image tokens from layer `layer` on; made by `prune`, where the arguments are described."""

    def __init__(self, llava: LlavaForConditionalGeneration, layer: int, keep: float, rank: str, seed: int):
        super(LlavaForConditionalGeneration, self).__init__(llava.config)
        self.model, self.lm_head = llava.model, llava.lm_head
        self.generation_config, self.training = llava.generation_config, llava.training
        self.layer, self.keep, self.rank, self.seed = layer, keep, rank, seed
        depth = llava.config.text_config.num_hidden_layers
        self.plan = LayerPlan(layer, (JOINT,) * layer + (TEXT,) * (depth - layer))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> LlavaCausalLMOutputWithPast:
        """LLaVA's forward; the last token given with an image is the one whose attention ranks.

        So generate with a cache, as is the default: without one every new token would rank anew.

        Returns:
            logits (B, T or kept, vocabulary). Those at dropped image tokens predict nothing.

        Raises:
            ValueError: as DPVR's forward, and for labels and hidden states, which belong to training and probing.
        """
        for name in ("labels", "output_hidden_states"):
            value = kwargs.pop(name, None)
            if value is not None and value is not False:
                raise ValueError(f"Expected no {name} for an inference-only baseline; got them. Remedy: drop them.")
        output = routed_forward(
            self.model,
            nn.ModuleList(),
            self.plan,
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            logits_to_keep=logits_to_keep,
            run_plan=partial(pruned_forward, pruning=self),
            **{**kwargs, "return_dict": True},
        )
        logits = self.lm_head(output.last_hidden_state)
        return LlavaCausalLMOutputWithPast(
            logits=logits, past_key_values=output.past_key_values, image_hidden_states=output.image_hidden_states
        )

    def num_kept(self, num_image_tokens: int) -> int:
        """Image tokens of a row that the later layers see."""
        return min(num_image_tokens, max(1, round(self.keep * num_image_tokens)))

    def prefill_flops(
        self, num_image_tokens: int, num_text_tokens: int, *, batch_size: int = 1, logits_to_keep: int = 1
    ) -> int:
        """As `CostFormulas.prefill_flops`, with the one query's scores that rank the image tokens."""
        text, total = self.config.text_config, num_image_tokens + num_text_tokens
        survivors = num_text_tokens + self.num_kept(num_image_tokens)
        kept = min(logits_to_keep or total, total)
        last = kept if num_image_tokens and kept < num_text_tokens else survivors  # queries of the last layer
        flops = self.layer * self._layer_flops(total, keys=total)
        flops += (text.num_hidden_layers - self.layer - 1) * self._layer_flops(survivors, keys=survivors)
        flops += self._layer_flops(last, keys=survivors) + 2 * kept * text.hidden_size * text.vocab_size
        if self.rank == "attention" and num_image_tokens:
            flops += 2 * text.num_attention_heads * self._head_dim * (text.hidden_size + total)
        return batch_size * flops

    def kv_cache_bytes(
        self,
        num_image_tokens: int,
        num_text_tokens: int,
        *,
        batch_size: int = 1,
        dtype: torch.dtype | None = None,
    ) -> int:
        """As `CostFormulas.kv_cache_bytes`: the first layers hold all tokens, the others the survivors."""
        text, kept = self.config.text_config, self.num_kept(num_image_tokens)
        entries = text.num_hidden_layers * num_text_tokens
        entries += self.layer * num_image_tokens + (text.num_hidden_layers - self.layer) * kept
        per_entry = 2 * text.num_key_value_heads * self._head_dim
        return batch_size * entries * per_entry * (dtype or self.dtype).itemsize


class PruningPass(TwoStreamPass):
    """A forward pass that finds out on the way which tokens leave: the image stream is the tokens to drop."""

    def drop(self, dropped: torch.Tensor) -> None:
        """Sort the chunk anew: the second stream is no longer the image but what is marked in bool (B, T)."""
        self._sort(dropped, dropped.device)
        if self.static:
            self._make_room(self.cache)

    def last_token_attention(self, layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
        """What each row's last token gives the chunk's tokens in `layer`, the mean over heads, float (B, T).

        `states` (B, T, D) are the layer's input; its keys are in the cache.
        """
        attention, rows = layer.self_attn, torch.arange(self.batch_size, device=states.device)
        last = torch.full_like(rows, self.length - 1)
        if self.valid is not None:
            last = (self.valid[:, self.past :] * torch.arange(self.length, device=states.device)).argmax(1)
        query = attention.q_proj(layer.input_layernorm(states[rows, last]))  # (B, H * head_dim)
        query = query.view(self.batch_size, -1, 1, attention.head_dim)
        cos, sin = (table.expand(self.batch_size, -1, -1)[rows, last][:, None] for table in self.rotary("joint"))
        query, _ = apply_rotary_pos_emb(query, query[:, :0], cos, sin)
        keys = self.scratch.layers[attention.layer_idx].keys  # (B, H / group, N, head_dim)
        query = query.view(self.batch_size, keys.shape[1], -1, attention.head_dim)  # (B, H / group, group, head_dim)
        scores = query @ keys.transpose(2, 3) * attention.scaling  # (B, H / group, group, N)
        seen = visible_keys(last[:, None] + self.past, self.place_slots("joint"), self.valid)  # (B, 1, 1, N)
        given = scores.masked_fill(~seen, -torch.inf)
        given = given.softmax(-1, dtype=torch.promote_types(given.dtype, torch.float32)).mean((1, 2))
        return given[:, self.past : self.past + self.length]


def pruned_forward(
    language_model: nn.Module,
    side_branch: nn.ModuleList,
    plan: LayerPlan,
    inputs_embeds: torch.Tensor,
    image_mask: torch.Tensor | None,
    *,
    pruning: PrunedLlava,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cache: Cache | None = None,
    tail: int | None = None,
    output_hidden_states: bool = False,
) -> tuple[torch.Tensor, None]:
    """`two_stream_forward` for a chunk whose images are to be pruned; any other goes on as the cache has it."""
    inputs = {"attention_mask": attention_mask, "position_ids": position_ids, "cache": cache}
    if image_mask is None:
        return two_stream_forward(language_model, side_branch, plan, inputs_embeds, None, tail=tail, **inputs)
    if inputs["cache"] is None:  # a throw-away one: its keys rank
        inputs["cache"] = DynamicCache()
    this = PruningPass(language_model, plan, inputs_embeds, image_mask, *inputs.values())
    hidden, layers = inputs_embeds, language_model.layers
    for layer in layers[: plan.split_layer]:
        before, hidden = hidden, this.run(layer, hidden, "joint")
    if pruning.rank == "attention":
        scores = this.last_token_attention(layers[plan.split_layer - 1], before)
    else:
        scores = random_scores(image_mask, pruning.seed)
    this.drop(image_mask & ~best_image_tokens(scores, image_mask, pruning.keep))

    streams = this.streams
    kept, dropped = streams.pick(hidden, streams.text), streams.pick(hidden, streams.image)
    for layer in layers[plan.split_layer :]:
        kept = this.run(layer, kept, "text", tail if layer is layers[-1] else None)
    this.write_record()
    return language_model.norm(streams.merge(kept, dropped) if tail is None else kept[:, -tail:]), None


def best_image_tokens(scores: torch.Tensor, image_mask: torch.Tensor, keep: float) -> torch.Tensor:
    """bool (B, T): in each row the `keep` share of its image tokens with the highest scores (B, T)."""
    counts = image_mask.sum(1, keepdim=True)
    num_kept = (keep * counts.double()).round().clamp(min=1)
    order = scores.masked_fill(~image_mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return image_mask & (order.argsort(1) < num_kept)


def random_scores(image_mask: torch.Tensor, seed: int) -> torch.Tensor:
    """Scores (B, T) that depend on the seed and on how many image tokens a row has, not on the batch it is in."""
    scores = torch.zeros(image_mask.shape)
    for row, row_mask in zip(scores, image_mask.cpu(), strict=True):
        row[row_mask] = torch.rand(int(row_mask.sum()), generator=torch.Generator().manual_seed(seed))
    return scores.to(image_mask.device)
