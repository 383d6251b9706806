"""The cost of a prompt under a layer plan: FLOPs of the prefill, and bytes of keys and values. For any decoder.

    config of a decoder --its layers, without weights, run once for 1, 2 and 3 tokens under torch's counter-->
        |
    per kind of layer    FLOPs of a query, of a key without a query, and of a pair of both; numbers of K/V per token
        |
    layer plan, V image and X text tokens --the number of queries and of keys in every layer-->
        |
    FLOPs, bytes         tests compare them with torch.utils.flop_counter around models and with real caches

The paper estimates its costs (Table 1, section 3.2) and measures latency (Table 6); these are exact counts.
"""

import json
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModel, PretrainedConfig

try:
    from .configuration_dpvr import CONTEXT, JOINT, RESET, TEXT, LayerPlan
    from .decoders_dpvr import RECURRENT, layer_kinds, side_sources
    from .side_branch_dpvr import make_side_branch
    from .twins_dpvr import RoutedLayer, routed_decoder, twin
except ImportError:
    from configuration_dpvr import CONTEXT, JOINT, RESET, TEXT, LayerPlan
    from decoders_dpvr import RECURRENT, layer_kinds, side_sources
    from side_branch_dpvr import make_side_branch
    from twins_dpvr import RoutedLayer, routed_decoder, twin


class LayerCosts(NamedTuple):
    """FLOPs of a layer of attention, and the width of what it caches.

    Attributes:
        per_query: of a token that is a query and a key.
        per_key: of a token that is a key alone, whose keys and values another call makes.
        per_pair: of a query and a key that meet in attention.
        key_width: the numbers of a token's keys and values together, over all heads.
    """

    per_query: int
    per_key: int
    per_pair: int
    key_width: int

    def flops(self, queries: int, keys: int) -> int:
        """FLOPs for `queries` tokens that attend to `keys` tokens, themselves among them."""
        return queries * (self.per_query + self.per_pair * keys) + (keys - queries) * self.per_key


class Branch(NamedTuple):
    """What runs on image tokens past the split: side layers, and the latent of rank `latent_rank` if there is one.

    With `dense_mlp` a side layer has one MLP in place of experts.
    """

    num_side_layers: int = 1
    latent_rank: int | None = None
    dense_mlp: bool = False

    @classmethod
    def of(cls, plan: LayerPlan, fields: dict[str, Any], *, dense_mlp: bool = False) -> "Branch":
        """What runs under a plan that was made of these fields of a config."""
        if plan.latent_stride:
            return cls(fields["latent_side_layers"], fields["latent_rank"])
        return cls(fields["num_side_layers"], dense_mlp=dense_mlp)


ONE_LAYER = Branch()


class Count(NamedTuple):
    """What one call of a layer did."""

    output: Any
    flops: int
    flops_of_keys: int
    key_width: int


class DecoderCosts:
    """The costs of a decoder's layers, counted on layers without weights.

    Attributes:
        width, vocabulary: D, and the number of logits of a token.
        layers: the costs of every layer; None for a recurrent one, which `layer_flops` counts at each length.

    Raises:
        ValueError: if the FLOPs of a layer of attention are not those of queries, keys and pairs.
    """

    def __init__(self, decoder: nn.Module, fake: FakeTensorMode) -> None:
        self.decoder, self.fake = decoder, fake
        self.width, self.vocabulary = decoder.config.hidden_size, decoder.config.vocab_size
        self.kinds, self.lengths = layer_kinds(decoder.config), {}
        one, two, three = (self._counts(tokens) for tokens in (1, 2, 3))
        self.layers = [
            None if kind == RECURRENT else _fit(*of) for kind, *of in zip(self.kinds, one, two, three, strict=True)
        ]
        self.windows = [_window(decoder.config, kind) for kind in self.kinds]

    @classmethod
    def of(cls, text_config: PretrainedConfig) -> "DecoderCosts":
        """The costs of the decoder that a text config describes; counted once for each config."""
        return _counted(text_config.model_type, text_config.to_json_string(use_diff=False))

    def layer_flops(self, index: int, queries: int, keys: int) -> int:
        """FLOPs of a layer for `queries` tokens that attend to `keys` tokens, themselves among them.

        A recurrent layer has no keys but those of its queries. Its FLOPs are those of the torch code of the library,
        which runs in chunks.
        """
        layer = self.layers[index]
        return self._counts(queries)[index].flops if layer is None else layer.flops(queries, keys)

    def head_flops(self, tokens: int) -> int:
        """FLOPs of the logits of `tokens` tokens."""
        return 2 * tokens * self.width * self.vocabulary

    def side_layers(self, split_layer: int, branch: Branch) -> list[LayerCosts]:
        """The costs of the side layers that leave the decoder at `split_layer`."""
        sources = side_sources(self.decoder.config, split_layer, branch.num_side_layers)
        if not branch.dense_mlp:
            return [self.layers[source] for source in sources]
        layers = list(self.decoder.layers)
        with self.fake:
            made = make_side_branch(self.decoder, split_layer, branch.num_side_layers, dense_mlp=True)
        for source, layer in zip(sources, made, strict=True):
            layers[source] = layer
        dense = DecoderCosts(twin(self.decoder, layers=nn.ModuleList(layers)), self.fake)
        return [dense.layers[source] for source in sources]

    def kept_keys(self, index: int, keys: int, *, windowed: bool) -> int:
        """The number of keys that a layer caches of `keys`; with `windowed`, one less than its sliding window."""
        window = self.windows[index] if windowed else None
        return 0 if self.layers[index] is None else keys if window is None else min(keys, window - 1)

    @torch.no_grad()
    def _counts(self, tokens: int) -> list[Count]:
        """What each layer does for `tokens` tokens; layers of one kind are called once."""
        if tokens in self.lengths:
            return self.lengths[tokens]
        done, counts = {}, []

        def run(layer: RoutedLayer, hidden: torch.Tensor, arguments: dict[str, Any], cache: Any) -> Any:
            sizes = tuple((name, tuple(weight.shape)) for name, weight in layer.stock.named_parameters())
            kind = layer.kind, type(layer.stock), sizes
            if kind not in done:
                done[kind] = _count(layer, hidden, arguments, cache)
            counts.append(done[kind])
            return done[kind].output

        with self.fake:
            states, mask = torch.empty(1, tokens, self.width), torch.ones(1, tokens, dtype=torch.long)
            states = states.to(self.decoder.dtype)
            routed_decoder(self.decoder, run)(inputs_embeds=states, attention_mask=mask, use_cache=False)
        self.lengths[tokens] = [count._replace(output=None) for count in counts]
        return self.lengths[tokens]


class ActiveExperts(nn.Module):
    """Stands for the experts of a layer: counts the products of each token with the experts that it is sent to.

    That is what grouped kernels compute. Loops over experts compute the same; some code of transformers 4 runs all
    experts on all tokens.
    """

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.matrices = [weight.shape[1:] for weight in experts.parameters() if weight.ndim == 3]

    def forward(self, states: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
        """Called with the states, and the chosen experts (tokens, experts of a token) and their weights, in any order.

        Returns:
            States like those that came, without meaning.
        """
        sent = next(chosen.numel() for chosen in routing if not chosen.is_floating_point())
        for rows, columns in self.matrices:
            torch.mm(states.new_empty(sent, rows), states.new_empty(rows, columns))
        return torch.empty_like(states)


@lru_cache(maxsize=32)
def _counted(model_type: str, fields: str) -> DecoderCosts:
    fake = FakeTensorMode()
    config = CONFIG_MAPPING[model_type].from_dict(json.loads(fields))
    with fake:
        decoder = AutoModel.from_config(config, attn_implementation="eager").eval()  # whose products are counted
    for module in list(decoder.modules()):
        for name, child in list(module.named_children()):
            if name == "experts" and isinstance(child, nn.ModuleList):
                raise ValueError(
                    f"This release of transformers runs the experts of {model_type!r} one by one, which cannot be "
                    "counted without data: pip install 'transformers>=5.18'."
                )
            if name == "experts":
                module.experts = ActiveExperts(child)
    return DecoderCosts(decoder, fake)


def _count(layer: RoutedLayer, hidden: torch.Tensor, arguments: dict[str, Any], cache: Any) -> Count:
    with FlopCounterMode(display=False) as whole:
        output = layer.call(hidden, arguments, cache)
    if layer.kind == RECURRENT:
        return Count(output, whole.get_total_flops(), 0, 0)
    with FlopCounterMode(display=False) as alone:
        made = layer.keys_and_values(hidden, arguments, hidden.device)
    width = sum(part.shape[1] * part.shape[3] for part in made)
    return Count(output, whole.get_total_flops(), alone.get_total_flops(), width)


def _fit(one: Count, two: Count, three: Count) -> LayerCosts:
    """The costs of a layer from its counts for one and two tokens, checked with three."""
    per_pair = (two.flops - 2 * one.flops) // 2
    costs = LayerCosts(one.flops - per_pair, one.flops_of_keys, per_pair, one.key_width)
    if costs.flops(3, 3) != three.flops or 3 * costs.per_key != three.flops_of_keys:
        raise ValueError(
            f"The FLOPs of a layer for 1, 2 and 3 tokens, {one.flops}, {two.flops} and {three.flops}, are not a cost "
            "of queries, keys and pairs of them, so those of a longer prompt cannot be told."
        )
    return costs


def _window(config: PretrainedConfig, kind: str) -> int | None:
    """The window of a kind of attention that a cache made for this config keeps; None: it keeps all keys."""
    names = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    return getattr(config, names[kind]) if kind in names else None


def prefill_flops(
    costs: DecoderCosts,
    plan: LayerPlan,
    num_image_tokens: int,
    num_text_tokens: int,
    *,
    branch: Branch = ONE_LAYER,
    logits_to_keep: int = 1,
    short_vanilla: bool = False,
) -> int:
    """FLOPs of the language model's matrix products in the prefill of one row without padding (a multiply-add is 2).

    Counted as `torch.utils.flop_counter` does: attention over all pairs of query and key, although half are masked,
    and more in a sliding window; no norms, rotary embedding or embedding look-up, and not the vision tower.

    Under a plan the last layer has only the last `logits_to_keep` tokens as queries, where it reads or has text alone.
    A stock decoder computes all of them, so vanilla is charged for all.

    Args:
        num_image_tokens, num_text_tokens: V and X.
        branch: what runs on image tokens past the split, if the plan reads it.
        logits_to_keep: the number of last tokens that get logits; 0 for all.
        short_vanilla: give a vanilla decoder's last layer the same few queries, as a decoder could that drops them.
    """
    text, image, total = num_text_tokens, num_image_tokens, num_text_tokens + num_image_tokens
    two_stream = not plan.is_vanilla and image > 0
    kept, last = min(logits_to_keep or total, total), len(plan.modes) - 1
    flops = costs.head_flops(kept)
    for index, mode in enumerate(plan.modes):
        queries, keys = (total, total) if mode in (JOINT, RESET) else (text, text)
        if mode == CONTEXT:
            read = num_read(plan, index, image)
            keys = text + read
            if plan.latent_stride:  # its maps are in place of the layer's own
                flops += read * (2 * branch.latent_rank * costs.layers[index].key_width - costs.layers[index].per_key)
        alone = (two_stream and mode in (TEXT, CONTEXT)) or (short_vanilla and plan.is_vanilla)
        if index == last and alone and kept < text and costs.layers[index] is not None:
            queries = kept
        flops += costs.layer_flops(index, queries, keys)
    if two_stream and plan.reads_side_branch:
        flops += sum(layer.flops(image, image) for layer in costs.side_layers(plan.split_layer, branch))
        flops += 2 * image * costs.width * branch.latent_rank if plan.latent_stride else 0
    return flops


def num_read(plan: LayerPlan, layer: int, num_image_tokens: int) -> int:
    """The number of image tokens that a context layer reads: with a latent of stride k every k-th, in layer 0 all."""
    return -(-num_image_tokens // (plan.latent_stride or 1)) if layer else num_image_tokens


def kv_numbers(
    costs: DecoderCosts, plan: LayerPlan, num_image_tokens: int, num_text_tokens: int, *, branch: Branch = ONE_LAYER
) -> int:
    """How many numbers a growing cache holds as keys and values after a prompt, summed over layers.

    A joint layer holds V + X tokens, or those of its sliding window; a context layer X and what it reads of V; a text
    layer X; a side layer V; a recurrent layer none, as its state is no key. For a static cache V + X is its
    `max_cache_len`.
    """
    image, text = num_image_tokens, num_text_tokens
    numbers = 0
    for index, (mode, layer) in enumerate(zip(plan.modes, costs.layers, strict=True)):
        keys = text if mode == TEXT else text + (num_read(plan, index, image) if mode == CONTEXT else image)
        windowed = plan.keys_in(index) == "joint" or image == 0
        numbers += costs.kept_keys(index, keys, windowed=windowed) * (0 if layer is None else layer.key_width)
    if plan.reads_side_branch and image:
        numbers += sum(image * layer.key_width for layer in costs.side_layers(plan.split_layer, branch))
    return numbers


class CountedCosts:
    """The costs as methods of a model with a `config` and a `side_branch`; a mixin before the stock class."""

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
            DecoderCosts.of(self.config.text_config),
            self.config.layer_plan(routing),
            num_image_tokens,
            num_text_tokens,
            branch=self._branch(routing),
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
        costs, plan = DecoderCosts.of(self.config.text_config), self.config.layer_plan(routing)
        numbers = kv_numbers(costs, plan, num_image_tokens, num_text_tokens, branch=self._branch(routing))
        return batch_size * numbers * (dtype or self.dtype).itemsize

    def _branch(self, routing: str | None) -> Branch:
        if (routing or self.config.routing) == "latent":
            return Branch(self.config.latent_side_layers, self.config.latent_rank)
        return Branch(len(self.side_branch))
