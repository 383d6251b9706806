"""Where image tokens saturate in a LLaVA: four statistics per layer of prompts with their answers.

    one batch of prompts, answers, pictures
        |
    first pass     all layers, image and text together          -> final states (B, T, D)
        |
    second pass    before and after each layer:
        cosine         cos(h_l, h_l+1)                          image and text tokens apart
        attention      text-to-image mass from q and k          per head; the forward pass keeps its fast kernels
        lens           KL(final || norm, lm_head of h_l+1)      image and text tokens apart, in chunks of tokens
        image removal  layers l+1 ... on text tokens only       KL and changes of the answer; and with late fusion
        |
    Sample         one per row, a few numbers per layer; no tensor is kept per layer

Paper section 3.1, Figure 2. The image removal curve is an intervention and not in the paper: a layer that gives the
image little attention may still need it. "text_only" is the graph without the image from a split on, "late_fusion" the
paper's graph with a side branch that is the identity.

Axes: B batch, T tokens, V image and X text tokens of a row, D width, H heads, L layers.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from configuration_dpvr import JOINT, LayerPlan
from decoders_dpvr import decoder_of
from dpvr.analysis.attention import attention_inputs, text_to_image_attention
from dpvr.data.prompts import IGNORED_LABEL
from forward_dpvr import SUPPORTED_DECODERS, stock_class
from modeling_dpvr import DpvrLlavaForConditionalGeneration
from twins_dpvr import RoutedLayer, routed_twin
from two_stream_dpvr import TwoStreamPass

GRAPHS = ("text_only", "late_fusion")
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
    model: LlavaForConditionalGeneration,
    inputs: dict[str, torch.Tensor],
    labels: torch.Tensor,
    *,
    lens: Lens | None = None,
    chunk: int = 128,
) -> list[Sample]:
    """Measure a batch.

    Args:
        model: a LLaVA, or a DPVR model, of which the base is measured.
        inputs: its processor's input_ids (B, T), attention_mask and pixel_values; every row has a picture.
        labels: int64 (B, T), the answers' tokens, -100 elsewhere; no answer follows directly on an image token.
        lens: a tuned lens (tuned_lens.py) to measure with as well: called with a layer's index and states (B, T, D).
        chunk: tokens whose attention maps (B, H, chunk, T) or logits (chunk, vocabulary) are held at a time.

    Returns:
        One `Sample` per row.

    Raises:
        ValueError: for a decoder of another kind, rows without a picture and rows without an answer.
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


class ProbeBatch:
    """Prompts with their answers, run through the decoder layer by layer.

    Attributes:
        decoder, lm_head: the model's.
        image, valid: bool (B, T), image tokens, and tokens that are not padding.
        answers: bool (B, T - 1), at the tokens that predict the answers.
        embeds: float (B, T, D), the input of the first layer.
    """

    def __init__(
        self, model: LlavaForConditionalGeneration, inputs: dict[str, torch.Tensor], labels: torch.Tensor
    ) -> None:
        """Take a batch as `measure` does, and raise the same errors."""
        owner, self.lm_head = model.model, model.lm_head
        self.decoder = decoder_of(owner)[1]
        if self.decoder.config.model_type not in SUPPORTED_DECODERS:
            raise ValueError(
                f"The decoder is of type {self.decoder.config.model_type!r}: measure a LLaVA whose decoder is one of "
                f"{', '.join(SUPPORTED_DECODERS)}."
            )
        self.valid = inputs["attention_mask"].bool()
        self.image = (inputs["input_ids"] == model.config.image_token_id) & self.valid
        self.answers = labels[:, 1:] != IGNORED_LABEL  # (B, T - 1), at the tokens that predict them
        for what, found in (("picture", self.image), ("answer", self.answers)):
            if not found.any(1).all():
                rows = (~found.any(1)).nonzero().flatten().tolist()
                raise ValueError(f"These rows of the batch have no {what}: {rows}. Leave them out.")
        self._calls: list[tuple[RoutedLayer, dict]] = []  # layers, and the arguments that the stock decoder gives them
        places = (self.valid.long().cumsum(1) - 1).clamp(min=0)
        stock_class(owner).forward(
            routed_twin(owner, self._record_call), **inputs, position_ids=places, use_cache=False, return_dict=True
        )
        for layer, _ in self._calls:
            layer.run = None  # it refers back to this object: the cycle would keep the batch in memory
        depth = len(self._calls)
        plan = LayerPlan(depth, (JOINT,) * depth)
        self.two_stream = TwoStreamPass(nn.ModuleList(), plan, self.image, padded=(~self.valid).any())
        self.two_stream.start(None)

    def _record_call(self, layer: RoutedLayer, hidden: torch.Tensor, arguments: dict, cache: None) -> torch.Tensor:
        if not self._calls:
            self.embeds = hidden
        self._calls.append((layer, arguments))
        return hidden

    def joint(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """States (B, T, D) after a layer of the vanilla graph, from those before it."""
        layer, arguments = self._calls[index]
        return _states(layer.call(hidden, arguments, None))

    def vanilla(self) -> torch.Tensor:
        """States (B, T, D) after the last layer of the vanilla graph."""
        hidden = self.embeds
        for index in range(len(self._calls)):
            hidden = self.joint(index, hidden)
        return hidden

    def attention_mass(self, index: int, hidden: torch.Tensor, chunk: int) -> list[torch.Tensor]:
        """Per row, the share (H,) of attention that the text after an image gives to images, from states (B, T, D)."""
        layer, arguments = self._calls[index]
        found, mass = attention_inputs(layer.stock, hidden, arguments), []
        at = torch.arange(hidden.shape[1], device=hidden.device)
        for part in at.split(chunk):
            causal = (at <= part[:, None]) & self.valid[:, None, :] | (at == part[:, None])  # (B, chunk, T)
            weights = found.weights(causal[:, None], slice(int(part[0]), int(part[-1]) + 1))
            mass.append((weights * self.image[:, None, None, :]).sum(-1))
        queries = self.valid & ~self.image & (self.image.cumsum(1) > 0)
        return [row[:, tokens].mean(1) for row, tokens in zip(torch.cat(mass, dim=2), queries, strict=True)]

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
            layer, arguments = self._calls[split]
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
    return batch.lm_head(batch.decoder.norm(states)).float().log_softmax(-1)


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
    graphs = {(): "text_only", (len(batch.decoder.layers) - 1,): "late_fusion"}
    for readers, states in batch.remove_image(hidden, split, graphs):
        distance, changed = batch.compare(answered, batch.answers_in(states))
        for row, sample in enumerate(samples):
            sample.removal_kl[graphs[readers]].append(distance[row])
            sample.removal_changed[graphs[readers]].append(changed[row])
