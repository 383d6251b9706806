"""vLLM's vision-language models under a DPVR plan: past the split image tokens are keys and values, not queries.

    stock model's forward          on a twin: a copy of the same weights, whose decoder is
        stock decoder's forward    a twin, whose layers are `RoutedLayer`s
            below the split        the stock layer, with all tokens
            past it                image keys and values to the layer's cache, then the stock layer with text alone:
                                   other attention metadata, the same kernel and block table (runs.py)

A batch without image tokens, as every decoded token, runs through the stock model untouched. The cache has the size of
vanilla's: each slot of each layer holds a key. Paper sections 3.2 and 3.3; two_stream_dpvr.py is the reference.

Axes: N tokens of a batch, X text and V image tokens among them, D width.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context, override_forward_context
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.llava import LlavaForConditionalGeneration
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata, subclass_attention_backend

from dpvr.serving.image_keys import PICTURES, KeyValueProjection, Latent, Pictures, SideAttention, write_keys
from dpvr.serving.plans import check_graphs, served
from dpvr.serving.runs import Runs, sort_tokens
from images_dpvr import mark_ids


class Batch(NamedTuple):
    """What a builder of attention metadata was called with for a batch, and the builder."""

    builder: Any
    common: CommonAttentionMetadata

    @property
    def num_tokens(self) -> int:
        """N, without the padding of CUDA graphs."""
        return int(self.common.query_start_loc_cpu[-1])


def remembering(backend: type[AttentionBackend]) -> type[AttentionBackend]:
    """An attention backend whose metadata have a `batch`, from which those for some of the tokens can be made."""

    class Builder(backend.get_builder_cls()):
        supports_update_block_table = False

        def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, **options: Any) -> Any:
            metadata = super().build(common_prefix_len, common_attn_metadata, **options)
            metadata.batch = Batch(self, common_attn_metadata)
            return metadata

    return subclass_attention_backend("Dpvr", backend, Builder)


class RoutedLayer(nn.Module):
    """A decoder layer of a twin."""

    def __init__(self, stock: nn.Module, run: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__()
        self.stock, self.run = stock, run

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.run(self.stock, positions, hidden_states, residual)


class RoutedPass:
    """Runs the decoder layers for one batch with image tokens.

    Args:
        model: the DPVR model.
        runs: the batch's tokens, sorted.
        batch: of the attention metadata.
    """

    def __init__(self, model: "RoutedModel", runs: Runs, batch: Batch) -> None:
        self.model, self.runs, self.batch = model, runs, batch
        device = batch.common.slot_mapping.device
        self.text, self.image = (torch.from_numpy(places).to(device) for places in (runs.text, runs.image))
        self.image_slots = batch.common.slot_mapping[self.image]

    def layers(self) -> nn.ModuleList:
        """The layers of the decoder's twin."""
        split, stock = self.model.served.plan.split_layer, list(self.model.decoder.layers)[: self.model.depth]
        runs = [self._joint] * split + [self._first] + [self._deep] * (len(stock) - split - 1)
        return nn.ModuleList(RoutedLayer(layer, run) for layer, run in zip(stock, runs, strict=True))

    def _joint(self, layer: nn.Module, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return layer(*arguments)

    def _first(
        self, layer: nn.Module, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer at the split: the streams part before it."""
        self.text_positions, self.image_positions = positions[..., self.text], positions[..., self.image]
        self.context = self._text_context()
        image = hidden[self.image] if residual is None else hidden[self.image] + residual[self.image]
        image = self._side_layers(image)
        self.source = image if self.model.latent is None else self.model.latent(image)
        text_residual = None if residual is None else residual[self.text]
        return self._deep(layer, positions, hidden[self.text], text_residual)

    def _deep(
        self, layer: nn.Module, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer with text (X, D) as queries; it reads image keys that are written first."""
        keys, values = self.model.image_keys(layer, self.source)
        write_keys(layer, keys, values, self.image_positions, self.image_slots)
        if len(self.text) == 0:  # a chunk within an image
            return hidden, hidden if residual is None else residual
        with override_forward_context(self.context):
            return layer(self.text_positions, hidden, residual)

    def _side_layers(self, image: torch.Tensor) -> torch.Tensor:
        """The output (V, D) of the side layers, at the image's own positions."""
        if not self.model.side_layers:
            return image
        common, block_size = self.batch.common, self.batch.builder.kv_cache_spec.block_size
        pictures = Pictures(
            self.runs.image_requests, self.runs.image_slots, self.image_slots, common.block_table_tensor, block_size
        )
        context, residual = get_forward_context(), None
        known = {**context.additional_kwargs, PICTURES: pictures}
        with override_forward_context(replace(context, additional_kwargs=known)):
            for layer in self.model.side_layers:
                image, residual = layer(self.image_positions, image, residual)
        return image + residual

    def _text_context(self) -> Any:
        """The forward context of text alone: each run of it is a sequence over its request's block table."""
        stock, common, runs = get_forward_context(), self.batch.common, self.runs
        if len(runs.text) == 0:
            return stock
        device = common.slot_mapping.device
        starts, ends, requests = (torch.from_numpy(each) for each in (runs.starts, runs.ends, runs.requests))
        rows, slots = requests.to(device), common.slot_mapping[self.text]
        metadata = self.batch.builder.build(
            0,
            CommonAttentionMetadata(
                query_start_loc=starts.to(device),
                query_start_loc_cpu=starts,
                seq_lens=ends.to(device),
                seq_lens_cpu_upper_bound=ends,
                num_reqs=len(ends),
                num_actual_tokens=len(runs.text),
                max_query_len=int(starts.diff().max()),
                max_seq_len=int(ends.max()),
                block_table_tensor=common.block_table_tensor[rows],
                slot_mapping=slots,
                positions=None if common.positions is None else common.positions[..., self.text],
                is_prefilling=None if common.is_prefilling is None else common.is_prefilling[requests],
            ),
        )
        names = [layer.self_attn.attn.layer_name for layer in self.model.decoder.layers[: self.model.depth]]
        return replace(
            stock,
            attn_metadata={**stock.attn_metadata, **dict.fromkeys(names, metadata)},
            slot_mapping={**stock.slot_mapping, **dict.fromkeys(names, slots)},
        )


class RoutedModel:
    """A mixin that `routed` puts before the class of a stock model of vLLM.

    Attributes:
        served: what is run.
        decoder, depth: the stock decoder and its number of layers; behind these it holds the side layers.
        side_layers, latent: what makes of image states what deep layers read.
        projections: of the deep layers, to keys and values, where these read the side layers' output.
    """

    stock: type
    requires_raw_input_tokens = True  # of vLLM: beside the embeddings

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        wanted = served(config)
        text = config.get_text_config()
        with _more_layers(text, wanted.num_side_layers) as depth:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.served, self.depth, self.marks = wanted, depth, mark_ids(config)
        self.decoder.end_layer = depth  # the stock forward runs those below
        self.latent, self.projections, self.secondary_weights = None, None, ()
        if wanted.source is not None:
            self.secondary_weights = (DefaultModelLoader.Source(wanted.source, revision=None, fall_back_to_pt=False),)
        if wanted.plan.is_vanilla:
            return
        check_graphs(vllm_config)
        deep = dict(list(enumerate(self.decoder.layers))[wanted.plan.split_layer : depth])
        for layer in self.decoder.layers:
            _check_attention(layer.self_attn.attn)
            layer.self_attn.attn.attn_backend = remembering(layer.self_attn.attn.attn_backend)
        for layer in self.side_layers:
            layer.self_attn.attn = SideAttention(layer.self_attn.attn)
        attentions = {index: layer.self_attn for index, layer in deep.items()}
        if wanted.latent_rank is not None:
            self.latent = Latent(attentions, text.hidden_size, wanted.latent_rank)
        else:
            self.projections = nn.ModuleDict(
                {str(index): KeyValueProjection(each, text.hidden_size) for index, each in attentions.items()}
            )

    @property
    def decoder(self) -> nn.Module:
        return self.language_model.model

    @property
    def side_layers(self) -> list[nn.Module]:
        return list(self.decoder.layers)[self.depth :]

    # -- weights ------------------------------------------------------------------------------------------------------

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Called by vLLM's loader: the stock names, with a side branch's among them."""
        loaded = super().load_weights(self._renamed(weights))
        if self.projections is not None:
            for index, projection in self.projections.items():
                projection.take_rows(self.decoder.layers[int(index)].self_attn)
            loaded |= {f"projections.{name}" for name, _ in self.projections.named_parameters()}
        return loaded

    def _renamed(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Side layers behind the decoder's, the latent beside it; parts that the plan does not use are left out."""
        for name, weight in weights:
            _, found, part = name.partition("side_branch.")
            if not found:
                yield self._tower_name(name), weight
            elif part.startswith("latent.layers."):
                if self.latent is not None:
                    yield self._side_name(part.removeprefix("latent.layers.")), weight
            elif part.startswith("latent."):
                if self.latent is not None:
                    yield part, weight
            elif self.latent is None and self.side_layers:
                yield self._side_name(part), weight

    def _tower_name(self, name: str) -> str:
        """The published name of a weight: transformers 5 leaves `vision_model` out where it saves a tower."""
        before, found, part = name.partition("vision_tower.")
        tower = self._modules.get("vision_tower")
        missing = found and tower is not None and "vision_model" in tower._modules and part[:13] != "vision_model."
        return f"{before}vision_tower.vision_model.{part}" if missing else name

    def _side_name(self, part: str) -> str:
        number, _, rest = part.partition(".")
        return f"model.language_model.layers.{self.depth + int(number)}.{rest}"

    # -- a batch ------------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **arguments: Any,
    ) -> torch.Tensor:
        """The final states (N, D) of a batch; zeros at image tokens if there are any."""
        runs, batch = self._sorted(input_ids)
        if runs is None or len(runs.image) == 0:
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **arguments)
        routed_pass, count = RoutedPass(self, runs, batch), batch.num_tokens
        twin = _twin(self, routed_pass.layers())
        states = self.stock.forward(
            twin, input_ids[:count], positions[..., :count], None, inputs_embeds[:count], **arguments
        )
        _hand_on(twin, self)
        return states.new_zeros(len(input_ids), states.shape[-1]).index_copy(0, routed_pass.text, states)

    def _sorted(self, input_ids: torch.Tensor | None) -> tuple[Runs | None, Batch | None]:
        """The batch's tokens in two streams; None for vanilla, and when vLLM only measures memory."""
        metadata = get_forward_context().attn_metadata
        if self.served.plan.is_vanilla or not metadata:
            return None, None
        batch = metadata[self.decoder.layers[0].self_attn.attn.layer_name].batch
        ids = input_ids[: batch.num_tokens]
        is_image = torch.isin(ids, torch.tensor(self.marks, device=ids.device))
        for layer in self.side_layers:
            layer.self_attn.attn.pass_over(batch.common.slot_mapping[: len(ids)][~is_image])
        starts, lengths = batch.common.query_start_loc_cpu.numpy(), batch.common.seq_lens.cpu().numpy()
        return sort_tokens(is_image.cpu().numpy(), starts, lengths), batch

    def image_keys(self, layer: nn.Module, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A deep layer's keys and values (V, G E) before k-norm and rotary embedding, from latent or image states."""
        index = next(at for at, each in enumerate(self.decoder.layers) if each is layer)
        if self.latent is not None:
            return self.latent.keys[str(index)](source), self.latent.values[str(index)](source)
        return self.projections[str(index)](layer.input_layernorm(source)).chunk(2, dim=-1)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits of the next token, which is never an image's: a sampled one would be taken for a picture."""
        logits = super().compute_logits(hidden_states)
        if logits is not None and not self.served.plan.is_vanilla:
            logits[..., self.marks] = -torch.inf
        return logits


@contextmanager
def _more_layers(config: Any, count: int) -> Iterator[int]:
    """Within this, a decoder's config asks for `count` more layers; its depth without them is given."""
    depth = config.num_hidden_layers
    config.num_hidden_layers = depth + count
    try:
        yield depth
    finally:
        config.num_hidden_layers = depth


def _check_attention(attention: nn.Module) -> None:
    """Raise ValueError for attention that the plugin cannot split into runs of text."""
    backend = attention.attn_backend
    if attention.sliding_window is not None:
        raise ValueError("A decoder with a sliding window is not supported under a DPVR routing: serve it as vanilla.")
    if backend.forward_includes_kv_cache_update:
        raise ValueError(
            f"The attention backend {backend.get_name()} writes keys within its kernel, and image keys are written "
            "without queries: choose another with --attention-backend."
        )


def _twin(model: RoutedModel, layers: nn.ModuleList) -> nn.Module:
    """A copy of a model with the same weights and other decoder layers, which is not compiled."""
    decoder = _with_modules(model.decoder, layers=layers)
    decoder.do_not_compile = True
    return _with_modules(model, language_model=_with_modules(model.language_model, model=decoder))


def _with_modules(module: nn.Module, **modules: nn.Module) -> nn.Module:
    twin = copy.copy(module)
    twin._modules = {**module._modules, **modules}
    return twin


def _hand_on(twin: nn.Module, model: nn.Module) -> None:
    """Set what the stock forward has set on a twin on the model, such as how many DeepStack features wait."""
    for name, value in vars(twin).items():
        if not name.startswith("_") and vars(model).get(name) is not value:
            vars(model)[name] = value


def routed(stock: type) -> type:
    """A subclass of a stock model of vLLM that runs a DPVR plan."""
    return type(f"Dpvr{stock.__name__}", (RoutedModel, stock), {"stock": stock, "__module__": __name__})


DpvrLlavaForConditionalGeneration = routed(LlavaForConditionalGeneration)
DpvrQwen2_5_VLForConditionalGeneration = routed(Qwen2_5_VLForConditionalGeneration)
DpvrQwen3VLForConditionalGeneration = routed(Qwen3VLForConditionalGeneration)
