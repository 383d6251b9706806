"""Where image tokens saturate in a vision-language model: four statistics per layer of prompts with their answers.

    one batch of prompts, answers, pictures
        |
    first pass     all layers, image and text together          -> final states (B, T, D)
        |
    second pass    before and after each layer:
        cosine         cos(h_l, h_l+1)                          image and text tokens apart
        attention      text-to-image mass from q and k          per head; the forward pass keeps its fast kernels
        lens           KL(final || norm, head of h_l+1)         image and text tokens apart, in chunks of tokens
        image removal  layers l+1 ... on text tokens only       KL and changes of the answer; and with late fusion
        |
    Sample         one per row, a few numbers per layer; no tensor is kept per layer

Paper section 3.1, Figure 2. The image removal curve is an intervention and not in the paper: a layer that gives the
image little attention may still need it. "text_only" is the graph without the image from a split on, "late_fusion"
the paper's graph with a side branch that is the identity. A recurrent layer has no keys and gives images attention 0.

Axes: B batch, T tokens, V image and X text tokens of a row, D width, H heads, L layers.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from configuration_dpvr import LayerPlan, vanilla_plan
from decoders_dpvr import RECURRENT, check_decoder, decoder_of, lowest_split, owner_of, recurrent_layers, side_sources
from dpvr.analysis.attention import attention_inputs, text_to_image_attention
from dpvr.data.prompts import IGNORED_LABEL
from forward_dpvr import stock_class
from images_dpvr import image_marks
from modeling_dpvr import DpvrLlavaForConditionalGeneration
from twins_dpvr import MASK, RoutedLayer, routed_twin, twin
from two_stream_dpvr import TwoStreamPass
from versions_dpvr import LINE_4

GRAPHS = ("text_only", "late_fusion")
NORMS = ("norm", "embedding_norm")  # what decoders call the norm after their last layer
Lens = Callable[[int, torch.Tensor], torch.Tensor]
FusionLayers = tuple[int, ...]  # deep layers that read the image, in order


@dataclass
class Sample:
    """The statistics of one prompt with its answer, each a list with an entry per layer or per split.

    Attributes:
        cosine: {"image", "text"}: L means over tokens of the cosine of the states before and after a layer.
        attention_mass: L lists of H shares of attention on image tokens; means over the text tokens after an image.
        logit_lens_kl: {"image", "text"}: L means over tokens, in nats; the last entry is 0.
        tuned_lens_kl: the same through `lens`, empty without one.
        removal_kl: {graph}: for the splits 1 ... L - 1, the mean over the answer's tokens, in nats.
        removal_changed: {graph}: for the same splits, whether any of the answer's most likely tokens changes.
    """

    cosine: dict[str, list[float]] = field(default_factory=lambda: {"image": [], "text": []})
    attention_mass: list[list[float]] = field(default_factory=list)
    logit_lens_kl: dict[str, list[float]] = field(default_factory=lambda: {"image": [], "text": []})
    tuned_lens_kl: dict[str, list[float]] = field(default_factory=lambda: {"image": [], "text": []})
    removal_kl: dict[str, list[float]] = field(default_factory=lambda: {graph: [] for graph in GRAPHS})
    removal_changed: dict[str, list[bool]] = field(default_factory=lambda: {graph: [] for graph in GRAPHS})


@dataclass
class RoutedSample:
    """One prompt in a trained DPVR model's own graph, compared with its base's.

    Attributes:
        shared_cosine: {"image", "text"}: per shared layer, the smallest cosine of a token's states in both graphs.
        identical: whether these states are the same to the bit.
        attention_mass: L shares of attention that the text after an image gives to image tokens, mean over heads; 0
            in a layer that does not read them.
        vanilla_mass: the same in the base's graph.
    """

    shared_cosine: dict[str, list[float]]
    identical: bool
    attention_mass: list[float]
    vanilla_mass: list[float]


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    labels: torch.Tensor,
    *,
    lens: Lens | None = None,
    chunk: int = 128,
) -> list[Sample]:
    """Measure a batch.

    Args:
        model: a vision-language model, or a DPVR model, of which the base is measured; with sdpa attention.
        inputs: what its processor made: input_ids (B, T), attention_mask, ...; every row has a picture.
        labels: int64 (B, T), the answers' tokens, -100 elsewhere; no answer follows directly on an image token.
        lens: a tuned lens (tuned_lens.py) to measure with as well: called with a layer's index and states (B, T, D).
        chunk: tokens whose attention maps (B, H, chunk, T) or logits (chunk, vocabulary) are held at a time.

    Returns:
        One `Sample` per row.

    Raises:
        ValueError: for a decoder that no layer plan runs on, rows without a picture and rows without an answer.
    """
    batch = ProbeBatch(model, inputs, labels)
    final, hidden = batch.vanilla(), batch.embeds
    answered = batch.answers_in(final)  # (answer tokens of all rows, vocabulary)
    samples = [Sample() for _ in labels]
    for index in range(len(batch.decoder.layers)):
        for sample, mass in zip(samples, batch.attention_mass(index, hidden, chunk), strict=True):
            sample.attention_mass.append(mass.tolist())
        before, hidden = hidden, batch.joint(index, hidden)
        _add_states(samples, batch, before, hidden, final, chunk)
        if lens is not None:
            tuned = lens(index, hidden)
            _add_lens([sample.tuned_lens_kl for sample in samples], batch, tuned, final, chunk)
        if index < len(batch.decoder.layers) - 1:
            _add_removal(samples, batch, hidden, index + 1, answered)
    return samples


@torch.no_grad()
def measure_routed(model: DpvrLlavaForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> RoutedSample:
    """Measure one unpadded prompt with a picture under the model's routing and under "none".

    Keeps the states of the shared layers in memory.

    Args:
        model: a DPVR model whose routing splits the graph.
        inputs: its processor's input_ids (1, T), attention_mask and pixel_values.
    """
    routing, split = model.config.routing, model.config.split_layer
    states, mass = {}, {}
    try:
        for graph in (routing, "none"):
            model.set_routing(graph)
            output = model(**inputs, output_hidden_states=True, logits_to_keep=1, use_cache=False)
            states[graph] = torch.cat(output.hidden_states[1 : split + 1])  # (s, T, D)
            mass[graph] = text_to_image_attention(model, inputs).mass
    finally:
        model.set_routing(routing)
    cosine = nn.functional.cosine_similarity(states[routing].double(), states["none"].double(), dim=-1)  # (s, T)
    image = inputs["input_ids"][0] == model.config.image_token_id
    smallest = {kind: cosine[:, at].amin(1).tolist() for kind, at in (("image", image), ("text", ~image))}
    return RoutedSample(smallest, torch.equal(states[routing], states["none"]), mass[routing], mass["none"])


class GivenStates(nn.Module):
    """In place of a model without its head: gives its output with other states, whatever it is called with."""

    def __init__(self, output: ModelOutput, plan: LayerPlan) -> None:
        super().__init__()
        self.output, self.plan = output, plan

    def forward(self, *_: Any, **__: Any) -> ModelOutput:
        return self.output


class ProbeBatch:
    """Prompts with their answers, run through the decoder layer by layer.

    Attributes:
        decoder: the model's.
        image, valid: bool (B, T), image tokens, and tokens that are not padding.
        answers: bool (B, T - 1), at the tokens that predict the answers.
        embeds: float (B, T, D), the input of the first layer.
        readers: the layers that can read the image: those of attention.
    """

    def __init__(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> None:
        """Take a batch as `measure` does, and raise the same errors."""
        self._model, owner = model, owner_of(model)
        check_decoder(model.config, lowest_split(model.config))
        self.decoder = decoder_of(owner)[1]
        text = self.decoder.config
        self.readers = tuple(sorted(set(range(len(self.decoder.layers))) - recurrent_layers(text)))
        self.valid = inputs["attention_mask"].bool()
        self.image = image_marks(owner, inputs["input_ids"], None) & self.valid
        self.answers = labels[:, 1:] != IGNORED_LABEL  # (B, T - 1), at the tokens that predict them
        for what, found in (("picture", self.image), ("answer", self.answers)):
            if not found.any(1).all():
                rows = (~found.any(1)).nonzero().flatten().tolist()
                raise ValueError(f"These rows of the batch have no {what}: {rows}. Leave them out.")
        self._calls: list[tuple[RoutedLayer, dict]] = []  # layers, and the arguments that the stock decoder gives them
        self._added: list[torch.Tensor | None] = []  # what the decoder adds to states after a layer, as DeepStack
        twin_of_owner = routed_twin(owner, self._record_call)
        self._output = stock_class(owner).forward(twin_of_owner, **inputs, use_cache=False, return_dict=True)
        self._check_norm()
        for layer, _ in self._calls:
            layer.run = None  # it refers back to this object: the cycle would keep the batch in memory
        plan = vanilla_plan(len(self._calls))
        self.two_stream = TwoStreamPass(nn.ModuleList(), plan, self.image, padded=(~self.valid).any())
        self.two_stream.start(None)

    def _record_call(
        self, layer: RoutedLayer, hidden: torch.Tensor, arguments: dict, cache: None
    ) -> torch.Tensor | tuple[torch.Tensor]:
        """Note a layer's arguments; its states are zeros, so that what the decoder adds to them comes to light."""
        if not self._calls:
            self.embeds = hidden
            self._in_tuples = LINE_4 and isinstance(layer.call(hidden, arguments, None), tuple)
        else:
            self._added.append(hidden if bool(hidden.any()) else None)
        self._calls.append((layer, arguments))
        is_last = layer.index == len(self.decoder.layers) - 1
        if is_last:
            self._added.append(None)
        states = self.embeds if is_last else torch.zeros_like(hidden)
        return (states,) if self._in_tuples else states

    def _check_norm(self) -> None:
        name = next((name for name in NORMS if name in self.decoder._modules), None)
        self.norm = self.decoder._modules.get(name)
        if self.norm is None or not torch.equal(self.norm(self.embeds), self._output.last_hidden_state):
            raise ValueError(
                f"The states after the last layer of {type(self.decoder).__name__} do not go through a norm alone to "
                "the head, so that middle layers cannot be read: measure a model such as LLaVA or Qwen3-VL."
            )

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits (N, vocabulary) of states (N, D) after any layer, by the model's own norm and head."""
        output = copy.copy(self._output)
        output.last_hidden_state = self.norm(states)[None]
        headed = twin(self._model, model=GivenStates(output, self.two_stream.plan))
        ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
        return type(self._model).forward(headed, input_ids=ids, return_dict=True).logits[0]

    def joint(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """States (B, T, D) after a layer of the vanilla graph, from those before it."""
        layer, arguments = self._calls[index]
        states, added = _states(layer.call(hidden, arguments, None)), self._added[index]
        return states if added is None else states + added

    def vanilla(self) -> torch.Tensor:
        """States (B, T, D) after the last layer of the vanilla graph."""
        hidden = self.embeds
        for index in range(len(self._calls)):
            hidden = self.joint(index, hidden)
        return hidden

    def attention_mass(self, index: int, hidden: torch.Tensor, chunk: int) -> list[torch.Tensor]:
        """Per row, the share (H,) of attention that the text after an image gives to images, from states (B, T, D)."""
        layer, arguments = self._calls[index]
        if layer.kind == RECURRENT:
            return list(hidden.new_zeros(len(hidden), self.decoder.config.num_attention_heads))
        found, mass = attention_inputs(layer.stock, hidden, arguments), []
        at = torch.arange(hidden.shape[1], device=hidden.device)
        for part in at.split(chunk):
            seen = self._seen(arguments.get(MASK), at, part)
            weights = found.weights(seen[:, None], slice(int(part[0]), int(part[-1]) + 1))
            mass.append((weights * self.image[:, None, None, :]).sum(-1))
        queries = self.valid & ~self.image & (self.image.cumsum(1) > 0)
        return [row[:, tokens].mean(1) for row, tokens in zip(torch.cat(mass, dim=2), queries, strict=True)]

    def _seen(self, mask: torch.Tensor | None, at: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """bool (B, Q, T): the keys that the tokens `part` attend to, by a layer's mask; padding attends to itself."""
        itself = at == part[:, None]
        if mask is not None:
            return mask[:, 0, part] | itself
        return (at <= part[:, None]) & self.valid[:, None, :] | itself

    def remove_image(
        self, hidden: torch.Tensor, split: int, choices: Iterable[FusionLayers], *, with_side_layer: bool = False
    ) -> Iterator[tuple[FusionLayers, torch.Tensor]]:
        """Take the image out of the stack at a split; the states (B, T, D) after the last layer for each choice.

        Args:
            hidden: (B, T, D), after `split` layers.
            choices: of deep layers that read the image all the same; a common beginning is computed once.
            with_side_layer: whether the image passes through the layer at the split before it is read.
        """
        choices, streams = list(choices), self.two_stream.streams
        image = streams.pick(hidden, streams.image)
        if with_side_layer and any(choices):
            layer, arguments = self._calls[side_sources(self.decoder.config, split, 1)[0]]
            image = _states(layer.call(image, self.two_stream.arguments(arguments, "image"), None))
        states: dict[FusionLayers, torch.Tensor] = {(): streams.pick(hidden, streams.text)}
        for index in range(split, len(self._calls)):
            so_far = dict.fromkeys(tuple(at for at in choice if at <= index) for choice in choices)
            states = {readers: self._deep_layer(index, states, readers, image) for readers in so_far}
        for choice in choices:
            yield choice, streams.merge(states[choice], image)

    def _deep_layer(
        self, index: int, states: dict[FusionLayers, torch.Tensor], readers: FusionLayers, image: torch.Tensor
    ) -> torch.Tensor:
        """Text states (B, X, D) after a layer, which reads the image if it is the last of the `readers` so far."""
        layer, arguments = self._calls[index]
        if layer.kind == RECURRENT:
            own = self.two_stream.arguments(arguments, "text", recurrent=True)
            return _states(layer.call(states[readers], own, None))
        self.two_stream.causal = getattr(layer.stock.self_attn, "is_causal", True)
        if not readers or readers[-1] != index:
            return _states(self.two_stream.read(layer, states[readers], arguments, None))
        return _states(self.two_stream.read(layer, states[readers[:-1]], arguments, None, image=image))

    def add_means(self, curves: list[dict[str, list[float]]], values: torch.Tensor) -> None:
        """Append to each row's curves the mean of values (B, T) over its image and over its text tokens."""
        for kind, tokens in (("image", self.image), ("text", self.valid & ~self.image)):
            for curve, row, at in zip(curves, values, tokens, strict=True):
                curve[kind].append(row[at].mean().item())

    def answers_in(self, states: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (answer tokens of all rows, vocabulary) in states (B, T, D) after the last layer."""
        return log_probabilities(self, states[:, :-1][self.answers])

    def compare(self, expected: torch.Tensor, got: torch.Tensor) -> tuple[list[float], list[bool]]:
        """Per row, the mean KL of the answer's tokens in nats, and whether any of its most likely tokens changes.

        Both arguments are as `answers_in` gives them.
        """
        counts = self.answers.sum(1).tolist()
        distance, changed = kl_divergence(expected, got), expected.argmax(-1) != got.argmax(-1)
        return [kl.mean().item() for kl in distance.split(counts)], [bool(c.any()) for c in changed.split(counts)]


def log_probabilities(batch: ProbeBatch, states: torch.Tensor) -> torch.Tensor:
    """Log-probabilities float32 (N, vocabulary) of the next token after states (N, D) of any layer."""
    return batch.logits(states).float().log_softmax(-1)


def kl_divergence(expected: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    """KL(expected || got) of log-probabilities (N, vocabulary), (N,) in nats."""
    return (expected.exp() * (expected - got)).sum(-1)


def _add_states(
    samples: list[Sample],
    batch: ProbeBatch,
    before: torch.Tensor,
    after: torch.Tensor,
    final: torch.Tensor,
    chunk: int,
) -> None:
    """Add what follows from states (B, T, D) before and after a layer alone: their cosine, and the logit lens."""
    cosine = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)  # (B, T)
    batch.add_means([sample.cosine for sample in samples], cosine)
    _add_lens([sample.logit_lens_kl for sample in samples], batch, after, final, chunk)


def _add_lens(
    curves: list[dict[str, list[float]]], batch: ProbeBatch, states: torch.Tensor, final: torch.Tensor, chunk: int
) -> None:
    """Add the KL from the final distribution to that of states (B, T, D) read through a lens, at the same tokens."""
    parts = zip(final[batch.valid].split(chunk), states[batch.valid].split(chunk), strict=True)
    distances = [kl_divergence(log_probabilities(batch, goal), log_probabilities(batch, part)) for goal, part in parts]
    distance = distances[0].new_zeros(batch.valid.shape)
    distance[batch.valid] = torch.cat(distances)
    batch.add_means(curves, distance)


def _states(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _add_removal(
    samples: list[Sample], batch: ProbeBatch, hidden: torch.Tensor, split: int, answered: torch.Tensor
) -> None:
    """Add how the answers change when the image is removed from states (B, T, D) after `split` layers."""
    graphs = {(): "text_only", batch.readers[-1:]: "late_fusion"}
    if split > batch.readers[-1]:
        graphs = {(): "text_only"}
    for readers, states in batch.remove_image(hidden, split, graphs):
        distance, changed = batch.compare(answered, batch.answers_in(states))
        for row, sample in enumerate(samples):
            sample.removal_kl[graphs[readers]].append(distance[row])
            sample.removal_changed[graphs[readers]].append(changed[row])
