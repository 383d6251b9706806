"""The method: past the split image tokens take a short side branch, text goes on alone, and both meet again late.

Late-Layer Fusion is Enough: Dual-Path Vision Token Routing, https://arxiv.org/abs/2606.09131, section 3.2, Algorithm
1.

    inputs_embeds (B, T, D)
        |
    layers 0 ... s-1            joint: image and text together, the frozen shared stack
        |--------------------.
    text (B, X, D)       image (B, V, D)
        |                    |
    layers s ... L-2     side branch          text runs alone; the side branch is the only trainable part
        |                    |
    layer L-1 <--- keys -----'                context: text attends to the side branch's image states
        |
    norm, lm_head

`two_stream_forward` runs any layer plan (configuration_dpvr.py) on stock decoder layers. A `context` layer writes the
image's keys and values into that layer's cache and then runs the stock layer on the text alone: attention does not
care in which order keys lie as long as the mask knows where each belongs. So every token keeps its slot, its index in
the whole sequence, and the one rule for all masks is: a query at slot p sees valid keys at slots <= p.

    a context layer, "u u I I t t" (text u, t around image I)        keys   I I u u t t
                                                               query u      . . x . . .
                                                                     u      . . x x . .
                                                                     t      x x x x x .
                                                                     t      x x x x x x

Axes: B batch, T all tokens of a chunk, X its text tokens, V its image tokens, D width, H heads, L layers.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

try:
    from .cache_dpvr import KINDS, CacheRecord, SideBranchKeys, fit_static_layers, is_static, let_line_4_crop
    from .configuration_dpvr import CONTEXT, JOINT, RESET, DpvrLlavaConfig, LayerPlan
except ImportError:
    from cache_dpvr import KINDS, CacheRecord, SideBranchKeys, fit_static_layers, is_static, let_line_4_crop
    from configuration_dpvr import CONTEXT, JOINT, RESET, DpvrLlavaConfig, LayerPlan

KEYS_OF = ("joint", "text", "image", "context")  # kinds of layers, by the tokens whose keys they hold
SUPPORTED_DECODERS = ("llama", "mistral", "qwen2")
SUPPORTED_ATTENTION = ("eager", "sdpa", "flex_attention")


def check_support(config: DpvrLlavaConfig) -> None:
    """Raise ValueError for a decoder or an attention implementation that the method does not run on."""
    text = config.text_config
    if text.model_type not in SUPPORTED_DECODERS:
        raise ValueError(
            f"Expected a decoder of type {SUPPORTED_DECODERS}; got {text.model_type!r}. Remedy: use a LLaVA on one of "
            "these."
        )
    if (
        text.model_type != "llama"
        and text.sliding_window is not None
        and (text.model_type != "qwen2" or text.use_sliding_window)
    ):
        raise ValueError(
            f"Expected a decoder with full attention; got sliding_window={text.sliding_window}. Remedy: set it to "
            "None."
        )
    if not 0 <= config.image_token_id < text.vocab_size:
        raise ValueError(
            f"Expected image_token_id, the id of '<image>', below the vocabulary size {text.vocab_size}; got "
            f"{config.image_token_id}. Remedy: set image_token_id in the config to the tokenizer's id of '<image>'."
        )
    for part in (config, text):
        if "flash" in (implementation := str(part._attn_implementation)):
            raise ValueError(unsupported_attention(implementation))


def unsupported_attention(implementation: str) -> str:
    """The error message."""
    return (
        f"Expected attn_implementation to be one of {SUPPORTED_ATTENTION}; got {implementation!r}. Remedy: use "
        "'sdpa', which runs the flash kernel wherever no mask is needed; a context layer needs one, which "
        "flash_attention_2 does not take."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Slots: which token lies where, in the streams of this chunk and in the cache


@dataclass
class Streams:
    """One chunk of T tokens sorted into a text and an image stream.

    A slot is a token's index in the whole sequence; -1 marks filler, put in front of the rows of a ragged batch that
    have fewer tokens in a stream than the longest row.
    """

    text: torch.Tensor  # int64 (B, X), slots
    image: torch.Tensor  # int64 (B, V), slots
    merge_index: torch.Tensor  # int64 (B, T), each token's entry in cat([text, image])
    first: int | torch.Tensor  # slot of the chunk's first token

    @classmethod
    def sort(cls, image_mask: torch.Tensor, first: int, num_text: int, num_image: int) -> "Streams":
        """Sort the tokens of `image_mask`, bool (B, T): True at image tokens, the counts are the largest of a row."""
        text_count, image_count = (~image_mask).cumsum(1), image_mask.cumsum(1)  # (B, T)
        text_entry = num_text - text_count[:, -1:] + text_count - 1
        image_entry = num_text + num_image - image_count[:, -1:] + image_count - 1
        merge_index = torch.where(image_mask, image_entry, text_entry)
        slots = torch.arange(first, first + image_mask.shape[1], device=image_mask.device).expand_as(merge_index)
        entries = slots.new_full((len(slots), num_text + num_image), -1).scatter(1, merge_index, slots)
        return cls(entries[:, :num_text], entries[:, num_text:], merge_index, first)

    @classmethod
    def text_alone(cls, batch_size: int, length: int, first: int | torch.Tensor, device: torch.device) -> "Streams":
        """A chunk without image tokens."""
        slots = consecutive(first, length, device).expand(batch_size, -1)
        return cls(slots, slots[:, :0], slots - first, first)

    @property
    def has_image(self) -> bool:
        return self.image.shape[1] > 0

    def pick(self, states: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """The (B, N, D) states at `slots` (B, N) of joint states (B, T, D); filler repeats the first token's."""
        if not self.has_image:
            return states[:, : slots.shape[1]]
        index = (slots - self.first).clamp(min=0).to(states.device)
        return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))

    def merge(self, text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Text (B, X, D) and image (B, V, D) states back in the order of the tokens, (B, T, D)."""
        if not self.has_image:
            return text
        both = torch.cat([text, image.to(text.device)], dim=1)
        return both.gather(1, self.merge_index[..., None].to(both.device).expand(-1, -1, both.shape[-1]))


def consecutive(first: int | torch.Tensor, count: int, device: torch.device) -> torch.Tensor:
    """int64 (count,): first, first + 1, ...; a `first` on the device stays there."""
    if isinstance(first, torch.Tensor):
        return first + torch.arange(count, device=device)
    return torch.arange(first, first + count, device=device)


def visible_keys(queries: torch.Tensor, keys: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """The one rule: a query sees valid keys at its slot or before it. Padding and filler see themselves, never NaN.

    Args:
        queries, keys: int64 (B, Q) and (B, K) slots.
        valid: bool (B, all slots), False at padding, or None.

    Returns:
        bool (B, 1, Q, K).
    """
    seen = (keys[:, None, :] <= queries[:, :, None]) & (keys >= 0)[:, None, :]
    if valid is not None:
        seen &= valid.gather(1, keys.clamp(0, valid.shape[1] - 1))[:, None, :]
    return (seen | (keys[:, None, :] == queries[:, :, None]))[:, None]


def as_attention_mask(seen: torch.Tensor, implementation: str, dtype: torch.dtype) -> torch.Tensor | BlockMask:
    """`seen` (B, 1, Q, K) in the form in which an attention implementation takes it."""
    if implementation == "sdpa":
        return seen
    if implementation == "eager":
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    batch_size, _, num_queries, num_keys = seen.shape

    def mask_mod(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return seen[row, 0, query, key]

    return create_block_mask(mask_mod, batch_size, None, num_queries, num_keys, device=seen.device)


# ---------------------------------------------------------------------------------------------------------------------
# The method: one forward pass over a layer plan


class TwoStreamPass:
    """The state of one forward pass: streams, masks, rotary tables, and the cache that the layers write to.

    A layer's kind says which tokens query and which keys it holds: "joint" T of T, "text" X of X, "image" V of V (the
    side branch), "context" X of V + X.
    """

    def __init__(
        self,
        language_model: nn.Module,
        plan: LayerPlan,
        inputs_embeds: torch.Tensor,
        image_mask: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
    ):
        self.plan, self.cache = plan, cache
        self.batch_size, self.length = inputs_embeds.shape[:2]
        self.record, self.static = CacheRecord.of(cache, plan), is_static(cache)
        self.past: int | torch.Tensor = 0 if cache is None else cache.get_seq_length()
        self.valid = None if attention_mask is None else attention_mask.bool()
        if self.static and self.length == 1 and image_mask is None:  # the next token: its slot stays on the device
            self.past, self.valid = self.past.clone(), None
        else:
            self.past = int(self.past)
        self._sort(image_mask, inputs_embeds.device)
        if cache is not None and not isinstance(self.past, torch.Tensor):
            self._make_room(cache)
        if position_ids is None:
            position_ids = consecutive(self.past, self.length, inputs_embeds.device)[None]
        self.cos, self.sin = language_model.rotary_emb(inputs_embeds, position_ids=position_ids)
        self.implementation, self.dtype = language_model.config._attn_implementation, inputs_embeds.dtype
        self.masks: dict[tuple[str, int], torch.Tensor | BlockMask] = {}
        self.tables: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        # keys that a layer needs beside those of its input go through a cache; without the user's, a throw-away one
        self.scratch = DynamicCache() if cache is None else cache

    def _sort(self, image_mask: torch.Tensor | None, device: torch.device) -> None:
        """Sort the chunk into streams; an image chunk asks the device for its counts, a decoded token asks nothing."""
        self.plain = self.record is None or self.record.plain
        if image_mask is None:
            self.streams = Streams.text_alone(self.batch_size, self.length, self.past, device)
            if self.length > 1 and self.valid is not None:
                self.plain = self.plain and bool(self.valid.all())
            return
        counts = image_mask.sum(1)
        padding = counts.new_zeros(()) if self.valid is None else (~self.valid).sum()
        text_at_end = (image_mask.flip(1).cumsum(1) == 0).sum(1).min()
        fewest, most, padding, text_at_end = torch.stack([counts.min(), counts.max(), padding, text_at_end]).tolist()
        self.last_image = self.past + self.length - text_at_end
        self.streams = Streams.sort(image_mask, self.past, num_text=self.length - fewest, num_image=most)
        self.plain = self.plain and padding == 0 and fewest == most

    def _make_room(self, cache: Cache) -> None:
        """Give the cache its decoder layers, and those of a static one their sizes."""
        while len(cache.layers) < len(self.plan.modes):
            cache.layers.append((cache.layer_class_to_replicate or DynamicLayer)())
        if self.static:
            num_text, num_image = self.streams.text.shape[1], self.streams.image.shape[1]
            new_keys = {"joint": self.length, "text": num_text, "context": num_image + num_text}
            fit_static_layers(cache, self.plan, self.record, self.past, new_keys, self.length)

    def write_record(self) -> None:
        """Note on the cache where the keys of an image chunk lie, and that a text chunk brought padding."""
        if self.cache is None:
            return
        if self.streams.has_image:
            tables, end = {kind: self.key_slots(kind) for kind in KEYS_OF}, self.past + self.length
            num_keys = {kind: table.shape[1] for kind, table in tables.items()}
            if self.static:
                tables = {kind: self._to_the_end(kind, table) for kind, table in tables.items()}
            notes = {"length": end, "last_image": self.last_image, "plain": self.plain}
            CacheRecord(self.plan, self.batch_size, **notes, tables=tables, num_keys=num_keys).put_on(self.cache)
            let_line_4_crop(self.cache, self.plan, num_keys, end)
        elif self.record is not None and not self.plain and self.length > 1:
            self.record.plain = False
            if self.static:
                self.record.tables = {kind: self._less_padding(table) for kind, table in self.record.tables.items()}

    def _to_the_end(self, kind: str, table: torch.Tensor) -> torch.Tensor:
        """The slots (B, N) of the keys in a static layer, and those of the text to come in the places left."""
        end = self.past + self.length
        later = consecutive(end, self._num_places(kind) - table.shape[1], table.device).expand(len(table), -1)
        return torch.cat([self._less_padding(table), later], dim=1)

    def _less_padding(self, table: torch.Tensor) -> torch.Tensor:
        """Slots (B, N) with -1 for those that the attention mask leaves out."""
        if self.valid is None:
            return table
        known = self.valid.shape[1]
        return table.masked_fill((table < known) & ~self.valid.gather(1, table.clamp(0, known - 1)), -1)

    def _num_places(self, kind: str) -> int:
        """Keys that a layer of this kind has room for, in a static cache; as many as it holds in a growing one."""
        if self.static and kind != "image":
            for mode, layer in zip(self.plan.modes, self.cache.layers, strict=False):
                if KINDS[mode] == kind:
                    return layer.max_cache_len
        return self.key_slots(kind).shape[1]

    def query_slots(self, kind: str) -> torch.Tensor:
        """Slots (B, Q) of the tokens that query in a layer of this kind."""
        if kind == "joint":
            return self._slots(self.past, self.length)
        return self.streams.image if kind == "image" else self.streams.text

    def key_slots(self, kind: str) -> torch.Tensor:
        """Slots (B, K) of the keys a layer of this kind sees, in the order in which they lie in its cache."""
        image, text = self.streams.image, self.streams.text
        new = [self.query_slots(kind)] if kind != "context" else [image, text]
        if self.record is not None:
            new = [self.record.slots(kind, self.past), *new]
        elif kind != "image":  # a cache that has seen no image holds one key per token
            new = [self._slots(0, self.past), *new]
        return torch.cat(new, dim=1)

    def place_slots(self, kind: str) -> torch.Tensor:
        """Slots (B, K) of all places of a layer of this kind; in a static cache some are still empty."""
        if not self.static or kind == "image":
            return self.key_slots(kind)
        if not self.streams.has_image:
            return self.record.tables[kind]
        held = self.key_slots(kind)
        return nn.functional.pad(held, (0, self._num_places(kind) - held.shape[1]), value=-1)

    def num_queries(self, kind: str) -> int:
        return {"joint": self.length, "image": self.streams.image.shape[1]}.get(kind, self.streams.text.shape[1])

    def _slots(self, first: int | torch.Tensor, count: int) -> torch.Tensor:
        return consecutive(first, count, self.cos.device).expand(self.batch_size, -1)

    def mask(self, kind: str, num_queries: int) -> torch.Tensor | BlockMask | None:
        """The mask (B, 1, Q, K) of the last queries, or None where the sdpa kernel's own causality is right."""
        if self.implementation == "sdpa" and self.plain and self._is_causal(kind, num_queries):
            return None
        if (kind, num_queries) not in self.masks:
            queries = self.query_slots(kind)[:, -num_queries:]
            seen = visible_keys(queries, self.place_slots(kind), self.valid)
            self.masks[kind, num_queries] = as_attention_mask(seen, self.implementation, self.dtype)
        return self.masks[kind, num_queries]

    def _is_causal(self, kind: str, num_queries: int) -> bool:
        """Whether, without padding, the n-th query sees the first n keys and nothing else, or the one query all."""
        all_query, empty_places = num_queries == self.num_queries(kind), self.static and kind != "image"
        if num_queries == 1:
            images_may_follow = kind == "context" and self.streams.has_image and all_query
            return not (images_may_follow or empty_places)
        return not isinstance(self.past, torch.Tensor) and self.past == 0 and all_query and kind != "context"

    def rotary(self, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, (B or 1, Q, head_dim), at the positions of the tokens that query."""
        if kind == "joint" or not self.streams.has_image:
            return self.cos, self.sin
        if kind not in self.tables:
            tables = (table.expand(self.batch_size, -1, -1) for table in (self.cos, self.sin))
            self.tables[kind] = tuple(self.streams.pick(table, self.query_slots(kind)) for table in tables)
        return self.tables[kind]

    def run(self, layer: nn.Module, states: torch.Tensor, kind: str, tail: int | None = None) -> torch.Tensor:
        """A stock decoder layer on one stream (B, N, D); with `tail`, only its last `tail` tokens query."""
        if states.shape[1] == 0:  # a chunk of nothing but image tokens has no text to run
            return states
        cos, sin = self.rotary(kind)
        cache = self.scratch if kind == "context" else self.cache
        if tail is not None and tail < states.shape[1]:
            cache = self.scratch
            self.write_keys(layer, states[:, :-tail], (cos[:, :-tail], sin[:, :-tail]))
            states, cos, sin = states[:, -tail:], cos[:, -tail:], sin[:, -tail:]
        return layer(
            states,
            attention_mask=self.mask(kind, states.shape[1]),
            position_embeddings=(cos, sin),
            past_key_values=cache,
        )

    def write_keys(self, layer: nn.Module, states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Write the keys and values that `layer` makes of `states` (B, N, D) into its cache, without querying."""
        attention, normed = layer.self_attn, layer.input_layernorm(states)
        shape = (*normed.shape[:-1], -1, attention.head_dim)
        keys = attention.k_proj(normed).view(shape).transpose(1, 2)  # (B, H, N, head_dim)
        values = attention.v_proj(normed).view(shape).transpose(1, 2)
        keys, _ = apply_rotary_pos_emb(keys, keys[:, :0], *(table.to(keys.device) for table in rotary))
        self.scratch.update(keys, values, attention.layer_idx)
        if self.scratch.offloading:  # more keys of this layer follow
            self.scratch.layers[attention.layer_idx].prefetch()

    def run_side_branch(self, side_branch: nn.ModuleList, image: torch.Tensor) -> torch.Tensor:
        """Algorithm 1, phase 2: the image tokens of a row among themselves, at their own positions, (B, V, D)."""
        if self.cache is not None:
            layers, depth = self.cache.layers, len(self.plan.modes)
            if self.record is None:
                layers[depth:] = [SideBranchKeys(layers) for _ in side_branch]
            elif len(layers) - depth - 1 != len(side_branch):
                raise ValueError(
                    f"Expected a cache filled with a side branch of {len(side_branch)} layers; got one of "
                    f"{len(layers) - depth - 1}. Remedy: prefill again after changing the side branch."
                )
        branch = image.to(next(side_branch.parameters()).dtype)  # PEFT trains in float32 on a base of half precision
        for layer in side_branch:
            branch = self.run(layer, branch, "image")
        return branch.to(image.dtype)


def two_stream_forward(
    language_model: nn.Module,
    side_branch: nn.ModuleList,
    plan: LayerPlan,
    inputs_embeds: torch.Tensor,
    image_mask: torch.Tensor | None,
    *,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cache: Cache | None = None,
    tail: int | None = None,
    output_hidden_states: bool = False,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
    """Run a layer plan on a stock decoder (paper Algorithm 1, generalised to plans; see configuration_dpvr.py).

    Args:
        language_model: a stock decoder of a type in `SUPPORTED_DECODERS`: its `layers`, `norm` and `rotary_emb` are
            used.
        side_branch: the trainable layers; their `layer_idx` follow the decoder's.
        plan: where the image leaves the stack, and the mode of every layer.
        inputs_embeds: float (B, T, D), image features in place.
        image_mask: bool (B, T), True at image tokens, or None when this chunk has none.
        attention_mask: (B, past + T), 0 at padding on either side; None means that nothing is padded. For a single new
            token after an unpadded prefill it is not read.
        position_ids: int64 (B or 1, T), the rotary positions; None counts on from the cache's length.
        cache: read and extended. A joint or context layer adds T keys to it, a text layer X, a side layer V.
        tail: only the final states of the last `tail` tokens are wanted, all of them text; not with hidden states.
        output_hidden_states: also return the states (B, T, D) before each layer, and the normed ones after the last.
            Past the split an image token shows the side branch's output until a joint layer moves it on.

    Returns:
        The normed states after the last layer, (B, T, D) or (B, tail, D), and the hidden states if asked for.

    Raises:
        ValueError: if gradient checkpointing is on (it would drop the keys that context layers read), or if the cache
            was filled under another plan.
    """
    _refuse_checkpointing(language_model)
    this = TwoStreamPass(language_model, plan, inputs_embeds, image_mask, attention_mask, position_ids, cache)
    streams, layers = this.streams, language_model.layers
    hidden, seen = inputs_embeds, []
    for layer in layers[: plan.split_layer]:
        if output_hidden_states:
            seen.append(hidden)
        hidden = this.run(layer, hidden, "joint")

    text, image = streams.pick(hidden, streams.text), streams.pick(hidden, streams.image)
    if streams.has_image and plan.reads_side_branch:
        image = this.run_side_branch(side_branch, image)

    for index, mode in list(enumerate(plan.modes))[plan.split_layer :]:
        layer, last = layers[index], tail if index == len(layers) - 1 else None
        if output_hidden_states:
            seen.append(hidden if index == plan.split_layer else streams.merge(text, image))
        if mode in (JOINT, RESET):
            hidden = this.run(layer, streams.merge(text, image), "joint")
            text = streams.pick(hidden, streams.text)
            image = streams.pick(hidden, streams.image) if mode == JOINT else image
        elif mode == CONTEXT:
            if streams.has_image:
                this.write_keys(layer, image, this.rotary("image"))
            text = this.run(layer, text, "context", last)
        else:
            text = this.run(layer, text, "text", last)

    this.write_record()
    if tail is not None:
        return language_model.norm(text[:, -tail:]), None
    states = language_model.norm(streams.merge(text, image))
    return states, (*seen, states) if output_hidden_states else None


def _refuse_checkpointing(language_model: nn.Module) -> None:
    if language_model.training and any(layer.gradient_checkpointing for layer in language_model.layers):
        raise ValueError(
            "Expected gradient checkpointing to be off; got it on. Remedy: gradient_checkpointing=False. It saves "
            "nothing here: no activation is kept below the first layer that reads the trainable side branch."
        )
