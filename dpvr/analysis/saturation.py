"""Where image tokens saturate in a LLaVA: four statistics per layer of prompts with their answers.

    one batch of prompts, answers, pictures
        |
    first pass     joint layers alone                           -> final states (B, T, D)
        |
    second pass    before and after each layer:
        cosine         cos(h_l, h_l+1)                          image and text tokens apart
        attention      text-to-image mass from q and k          per head; the kernels stay the fast ones
        lens           KL(final || norm, lm_head of h_l+1)      image and text tokens apart, in chunks of tokens
        withdrawal     layers l+1 ... on text alone             KL and changes of the answer; and with late fusion
        |
    Sample         one per row, a number or two per layer: nothing grows with depth but these

Paper section 3.1, Figure 2. The withdrawal curve is causal and not in the paper: attention that is small on the
vanilla graph need not be needless once the tokens are gone. "text_only" is the graph without the image from a split
on, "late_fusion" the paper's with a side branch that hands the image states on as they are.

Axes: B batch, T tokens, V image and X text tokens of a row, D width, H heads, L layers.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from configuration_dpvr import JOINT, LayerPlan
from dpvr.analysis.attention import attention_inputs, text_to_image_attention
from dpvr.data.prompts import IGNORED_LABEL
from forward_dpvr import SUPPORTED_DECODERS, stock_class
from modeling_dpvr import DpvrLlavaForConditionalGeneration
from twins_dpvr import RoutedLayer, decoder_of, routed_twin
from two_stream_dpvr import TwoStreamPass

GRAPHS = ("text_only", "late_fusion")
Lens = Callable[[int, torch.Tensor], torch.Tensor]
Reading = tuple[int, ...]  # deep layers that read the image, in order


@dataclass
class Sample:
    """The statistics of one prompt with its answer, each a list with an entry per layer.

    Attributes:
        cosine: {"image", "text"}: L means over tokens of the cosine of the states before and after a layer.
        attention_mass: L lists of H shares of attention on image tokens; means over the text tokens after an image.
        logit_lens_kl: {"image", "text"}: L means over tokens, in nats; the last entry is 0.
        tuned_lens_kl: the same through `lens`, empty without one.
        withdrawal_kl: {graph}: for the splits 1 ... L - 1, the mean over the answer's tokens, in nats.
        withdrawal_changed: {graph}: for the same splits, whether any of the answer's most likely tokens changes.
    """

    cosine: dict[str, list[float]] = field(default_factory=lambda: {"image": [], "text": []})
    attention_mass: list[list[float]] = field(default_factory=list)
    logit_lens_kl: dict[str, list[float]] = field(default_factory=lambda: {"image": [], "text": []})
    tuned_lens_kl: dict[str, list[float]] = field(default_factory=lambda: {"image": [], "text": []})
    withdrawal_kl: dict[str, list[float]] = field(default_factory=lambda: {graph: [] for graph in GRAPHS})
    withdrawal_changed: dict[str, list[bool]] = field(default_factory=lambda: {graph: [] for graph in GRAPHS})


@dataclass
class RoutedSample:
    """What a trained DPVR model's own graph does with one prompt, beside its base's.

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
        model: a LLaVA, or a DPVR model, whose base is measured.
        inputs: its processor's input_ids (B, T), attention_mask and pixel_values; every row has a picture.
        labels: int64 (B, T), the token at the answers' places, -100 elsewhere; an answer does not follow an image.
        lens: a tuned one (tuned_lens.py), to measure through it as well: states (B, T, D) of a layer by its index.
        chunk: tokens whose attention maps (B, H, chunk, T) or logits (chunk, vocabulary) are held at a time.

    Returns:
        One `Sample` per row.

    Raises:
        ValueError: for a decoder of another kind, rows without a picture and rows without an answer.
    """
    this = ProbeBatch(model, inputs, labels)
    final, hidden = this.vanilla(), this.embeds
    answered = this.answers_in(final)  # (answer tokens of all rows, vocabulary)
    samples = [Sample() for _ in labels]
    for index in range(len(this.decoder.layers)):
        for sample, mass in zip(samples, this.attention_mass(index, hidden, chunk), strict=True):
            sample.attention_mass.append(mass.tolist())
        before, hidden = hidden, this.joint(index, hidden)
        _add_states(samples, this, before, hidden, final, chunk)
        if lens is not None:
            tuned = lens(index, hidden)
            _add_lens([sample.tuned_lens_kl for sample in samples], this, tuned, final, chunk)
        if index < len(this.decoder.layers) - 1:
            _add_withdrawal(samples, this, hidden, index + 1, answered)
    return samples


@torch.no_grad()
def measure_routed(model: DpvrLlavaForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> RoutedSample:
    """Measure one unpadded prompt with a picture under the model's routing and under "none"; holds its shared states.

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
    """Prompts with their answers on their way through the decoder, layer by layer.

    Attributes:
        decoder, lm_head: the model's.
        image, valid: bool (B, T), image tokens and tokens that are no padding.
        answers: bool (B, T - 1), at the tokens that predict the answers.
        embeds: float (B, T, D), what the first layer takes.
    """

    def __init__(
        self, model: LlavaForConditionalGeneration, inputs: dict[str, torch.Tensor], labels: torch.Tensor
    ) -> None:
        """Take a batch as `measure` does, and refuse what it refuses."""
        owner, self.lm_head = model.model, model.lm_head
        self.decoder = decoder_of(owner)[1]
        if self.decoder.config.model_type not in SUPPORTED_DECODERS:
            raise ValueError(
                f"Expected a LLaVA on a decoder of type {SUPPORTED_DECODERS}; got {self.decoder.config.model_type!r}. "
                "Remedy: measure another one."
            )
        self.valid = inputs["attention_mask"].bool()
        self.image = (inputs["input_ids"] == model.config.image_token_id) & self.valid
        self.answers = labels[:, 1:] != IGNORED_LABEL  # (B, T - 1), at the tokens that predict them
        for what, found in (("a picture", self.image), ("an answer", self.answers)):
            if not found.any(1).all():
                rows = (~found.any(1)).nonzero().flatten().tolist()
                raise ValueError(
                    f"Expected {what} in every row; got none in rows {rows}. Remedy: leave these rows out."
                )
        self._calls: list[tuple[RoutedLayer, dict]] = []  # the layers, and what the stock decoder would give them
        places = (self.valid.long().cumsum(1) - 1).clamp(min=0)
        stock_class(owner).forward(
            routed_twin(owner, self._note), **inputs, position_ids=places, use_cache=False, return_dict=True
        )
        for layer, _ in self._calls:
            layer.run = None  # which leads back here: a circle would keep what was measured in memory
        depth = len(self._calls)
        plan = LayerPlan(depth, (JOINT,) * depth)
        self.streams = TwoStreamPass(nn.ModuleList(), plan, self.image, padded=(~self.valid).any())
        self.streams.start(None)

    def _note(self, layer: RoutedLayer, hidden: torch.Tensor, arguments: dict, cache: None) -> torch.Tensor:
        if not self._calls:
            self.embeds = hidden
        self._calls.append((layer, arguments))
        return hidden

    def joint(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """States (B, T, D) after a layer of the vanilla graph, of those before it."""
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

    def withdraw(
        self, hidden: torch.Tensor, split: int, readings: Iterable[Reading], *, with_side_layer: bool = False
    ) -> Iterator[tuple[Reading, torch.Tensor]]:
        """Each reading, and states (B, T, D) after the last layer, of which those from `split` on run on text alone.

        Args:
            hidden: (B, T, D), after `split` layers.
            readings: each the deep layers, in order, that read the image even so; what they begin with in common is
                computed once.
            with_side_layer: whether the image passes through the layer at the split before it is read.
        """
        readings, streams = list(readings), self.streams.streams
        image = streams.pick(hidden, streams.image)
        if with_side_layer and any(readings):
            layer, arguments = self._calls[split]
            image = _states(layer.call(image, self.streams.arguments(arguments, "image"), None))
        states: dict[Reading, torch.Tensor] = {(): streams.pick(hidden, streams.text)}
        for index in range(split, len(self._calls)):
            so_far = dict.fromkeys(tuple(at for at in reading if at <= index) for reading in readings)
            states = {key: self._deep_layer(index, states, key, image) for key in so_far}
        for reading in readings:
            yield reading, streams.merge(states[reading], image)

    def _deep_layer(
        self, index: int, states: dict[Reading, torch.Tensor], key: Reading, image: torch.Tensor
    ) -> torch.Tensor:
        """Text (B, X, D) after a layer; `key` is what has read the image by now, this layer too if it is the last."""
        layer, arguments = self._calls[index]
        if not key or key[-1] != index:
            return _states(self.streams.read(layer, states[key], arguments, None))
        return _states(self.streams.read(layer, states[key[:-1]], arguments, None, image=image))

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


def log_probabilities(this: ProbeBatch, states: torch.Tensor) -> torch.Tensor:
    """Log-probabilities float32 (N, vocabulary) of the next token after states (N, D) of any layer."""
    return this.lm_head(this.decoder.norm(states)).float().log_softmax(-1)


def kl_divergence(expected: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    """KL(expected || got) of log-probabilities (N, vocabulary), (N,) in nats."""
    return (expected.exp() * (expected - got)).sum(-1)


def _add_states(
    samples: list[Sample], this: ProbeBatch, before: torch.Tensor, after: torch.Tensor, final: torch.Tensor, chunk: int
) -> None:
    """What states (B, T, D) before and after a layer say by themselves: their cosine, and the logit lens."""
    cosine = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)  # (B, T)
    this.add_means([sample.cosine for sample in samples], cosine)
    _add_lens([sample.logit_lens_kl for sample in samples], this, after, final, chunk)


def _add_lens(
    curves: list[dict[str, list[float]]], this: ProbeBatch, states: torch.Tensor, final: torch.Tensor, chunk: int
) -> None:
    """KL from the final distribution to a lens's at the same tokens, of states (B, T, D)."""
    parts = zip(final[this.valid].split(chunk), states[this.valid].split(chunk), strict=True)
    distances = [kl_divergence(log_probabilities(this, goal), log_probabilities(this, part)) for goal, part in parts]
    distance = distances[0].new_zeros(this.valid.shape)
    distance[this.valid] = torch.cat(distances)
    this.add_means(curves, distance)


def _states(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _add_withdrawal(
    samples: list[Sample], this: ProbeBatch, hidden: torch.Tensor, split: int, answered: torch.Tensor
) -> None:
    """What becomes of the answers when images go no further than states (B, T, D) after `split` layers."""
    readings = {(): "text_only", (len(this.decoder.layers) - 1,): "late_fusion"}
    for reading, states in this.withdraw(hidden, split, readings):
        distance, changed = this.compare(answered, this.answers_in(states))
        graph = readings[reading]
        for row, sample in enumerate(samples):
            sample.withdrawal_kl[graph].append(distance[row])
            sample.withdrawal_changed[graph].append(changed[row])
