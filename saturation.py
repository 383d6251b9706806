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
from transformers import DynamicCache, LlavaForConditionalGeneration
from transformers.modeling_outputs import ModelOutput
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from answered_prompts import IGNORED_LABEL
from configuration_dpvr import JOINT, LayerPlan
from modeling_dpvr import DpvrLlavaForConditionalGeneration
from text_to_image import text_to_image_attention
from two_stream_dpvr import SUPPORTED_DECODERS, TwoStreamPass, visible_keys

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
    this = Rows(model, inputs, labels)
    final, hidden = this.vanilla(), this.embeds
    answered = this.answers_in(final)  # (answer tokens of all rows, vocabulary)
    samples = [Sample() for _ in labels]
    for index, layer in enumerate(this.decoder.layers):
        _add_attention(samples, this, layer, hidden, chunk)
        before, hidden = hidden, this.run(layer, hidden, "joint")
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


class Rows(TwoStreamPass):
    """Prompts with their answers on their way through the decoder, layer by layer.

    Attributes:
        image, valid: bool (B, T), image tokens and tokens that are no padding.
        embeds: float (B, T, D), what the first layer takes.
    """

    def __init__(
        self, model: LlavaForConditionalGeneration, inputs: dict[str, torch.Tensor], labels: torch.Tensor
    ) -> None:
        """Take a batch as `measure` does, and refuse what it refuses."""
        llava, self.decoder, self.lm_head = model.model, model.model.language_model, model.lm_head
        if self.decoder.config.model_type not in SUPPORTED_DECODERS:
            raise ValueError(
                f"Expected a LLaVA on a decoder of type {SUPPORTED_DECODERS}; got {self.decoder.config.model_type!r}. "
                "Remedy: measure another one."
            )
        valid = inputs["attention_mask"].bool()
        self.image = (inputs["input_ids"] == model.config.image_token_id) & valid
        self.answers = labels[:, 1:] != IGNORED_LABEL  # (B, T - 1), at the tokens that predict them
        for what, found in (("a picture", self.image), ("an answer", self.answers)):
            if not found.any(1).all():
                rows = (~found.any(1)).nonzero().flatten().tolist()
                raise ValueError(
                    f"Expected {what} in every row; got none in rows {rows}. Remedy: leave these rows out."
                )
        features = llava.get_image_features(pixel_values=inputs["pixel_values"])
        features = features.pooler_output if isinstance(features, ModelOutput) else features  # transformers 5, 4
        features = torch.cat(list(features))
        embeds = llava.get_input_embeddings()(inputs["input_ids"])
        self.embeds = embeds.masked_scatter(self.image[..., None], features.to(embeds.dtype))
        places = (valid.long().cumsum(1) - 1).clamp(min=0)
        plan = LayerPlan(len(self.decoder.layers), (JOINT,) * len(self.decoder.layers))
        super().__init__(self.decoder, plan, self.embeds, self.image, valid, places, cache=None)

    def vanilla(self) -> torch.Tensor:
        """States (B, T, D) after the last layer of the vanilla graph."""
        hidden = self.embeds
        for layer in self.decoder.layers:
            hidden = self.run(layer, hidden, "joint")
        return hidden

    def withdraw(
        self, hidden: torch.Tensor, split: int, readings: Iterable[Reading], *, side_layer: nn.Module | None = None
    ) -> Iterator[tuple[Reading, torch.Tensor]]:
        """Each reading, and states (B, T, D) after the last layer, of which those from `split` on run on text alone.

        Args:
            hidden: (B, T, D), after `split` layers.
            readings: each the deep layers, in order, that read the image even so; what they begin with in common is
                computed once.
            side_layer: what the image passes through before it is read; None hands it on as it is.
        """
        readings, image = list(readings), self.streams.pick(hidden, self.streams.image)
        if side_layer is not None and any(readings):
            image = self.run(side_layer, image, "image")
        states: dict[Reading, torch.Tensor] = {(): self.streams.pick(hidden, self.streams.text)}
        for index, layer in list(enumerate(self.decoder.layers))[split:]:
            so_far = dict.fromkeys(tuple(at for at in reading if at <= index) for reading in readings)
            states = {key: self._deep_layer(index, layer, states, key, image) for key in so_far}
        for reading in readings:
            yield reading, self.streams.merge(states[reading], image)

    def _deep_layer(
        self, index: int, layer: nn.Module, states: dict[Reading, torch.Tensor], key: Reading, image: torch.Tensor
    ) -> torch.Tensor:
        """Text (B, X, D) after a layer; `key` is what has read the image by now, this layer too if it is the last."""
        if not key or key[-1] != index:
            return self.run(layer, states[key], "text")
        self.scratch = DynamicCache()
        self.write_keys(layer, image, self.rotary("image"))
        return self.run(layer, states[key[:-1]], "context")

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


def log_probabilities(this: Rows, states: torch.Tensor) -> torch.Tensor:
    """Log-probabilities float32 (N, vocabulary) of the next token after states (N, D) of any layer."""
    return this.lm_head(this.decoder.norm(states)).float().log_softmax(-1)


def kl_divergence(expected: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    """KL(expected || got) of log-probabilities (N, vocabulary), (N,) in nats."""
    return (expected.exp() * (expected - got)).sum(-1)


def _add_states(
    samples: list[Sample], this: Rows, before: torch.Tensor, after: torch.Tensor, final: torch.Tensor, chunk: int
) -> None:
    """What states (B, T, D) before and after a layer say by themselves: their cosine, and the logit lens."""
    cosine = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)  # (B, T)
    this.add_means([sample.cosine for sample in samples], cosine)
    _add_lens([sample.logit_lens_kl for sample in samples], this, after, final, chunk)


def _add_lens(
    curves: list[dict[str, list[float]]], this: Rows, states: torch.Tensor, final: torch.Tensor, chunk: int
) -> None:
    """KL from the final distribution to a lens's at the same tokens, of states (B, T, D)."""
    parts = zip(final[this.valid].split(chunk), states[this.valid].split(chunk), strict=True)
    distances = [kl_divergence(log_probabilities(this, goal), log_probabilities(this, part)) for goal, part in parts]
    distance = distances[0].new_zeros(this.valid.shape)
    distance[this.valid] = torch.cat(distances)
    this.add_means(curves, distance)


def _add_attention(samples: list[Sample], this: Rows, layer: nn.Module, hidden: torch.Tensor, chunk: int) -> None:
    """Per row and head, the mean share of attention that text after an image gives to images, before a layer."""
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    shape = (*normed.shape[:-1], -1, attention.head_dim)
    query, key = (
        projection(normed).view(shape).transpose(1, 2) for projection in (attention.q_proj, attention.k_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *this.rotary("joint"))
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)  # (B, H, T, head width)
    slots = this.query_slots("joint")
    mass = []
    for rows, at in zip(query.split(chunk, dim=2), slots.split(chunk, dim=1), strict=True):
        scores = (rows @ key.transpose(-1, -2)).float() * attention.scaling  # (B, H, chunk, T)
        scores = scores.masked_fill(~visible_keys(at, slots, this.valid), float("-inf"))
        mass.append((scores.softmax(-1) * this.image[:, None, None, :]).sum(-1))
    queries = this.valid & ~this.image & (this.image.cumsum(1) > 0)
    for sample, row, tokens in zip(samples, torch.cat(mass, dim=2), queries, strict=True):
        sample.attention_mass.append(row[:, tokens].mean(1).tolist())


def _add_withdrawal(
    samples: list[Sample], this: Rows, hidden: torch.Tensor, split: int, answered: torch.Tensor
) -> None:
    """What becomes of the answers when images go no further than states (B, T, D) after `split` layers."""
    readings = {(): "text_only", (len(this.decoder.layers) - 1,): "late_fusion"}
    for reading, states in this.withdraw(hidden, split, readings):
        distance, changed = this.compare(answered, this.answers_in(states))
        graph = readings[reading]
        for row, sample in enumerate(samples):
            sample.withdrawal_kl[graph].append(distance[row])
            sample.withdrawal_changed[graph].append(changed[row])
