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

from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import DynamicCache, LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from configuration_dpvr import JOINT, LayerPlan
from two_stream_dpvr import SUPPORTED_DECODERS, TwoStreamPass, visible_keys

GRAPHS = ("text_only", "late_fusion")
IGNORED_LABEL = -100


@dataclass
class Sample:
    """The statistics of one prompt with its answer, each a list with an entry per layer.

    Attributes:
        cosine: {"image", "text"}: L means over tokens of the cosine of the states before and after a layer.
        attention_mass: L lists of H shares of attention on image tokens; means over the text tokens after an image.
        logit_lens_kl: {"image", "text"}: L means over tokens, in nats; the last entry is 0.
        withdrawal_kl: {graph}: for the splits 1 ... L - 1, the mean over the answer's tokens, in nats.
        withdrawal_changed: {graph}: for the same splits, whether any of the answer's most likely tokens changes.
    """

    cosine: dict[str, list[float]] = field(default_factory=lambda: {"image": [], "text": []})
    attention_mass: list[list[float]] = field(default_factory=list)
    logit_lens_kl: dict[str, list[float]] = field(default_factory=lambda: {"image": [], "text": []})
    withdrawal_kl: dict[str, list[float]] = field(default_factory=lambda: {graph: [] for graph in GRAPHS})
    withdrawal_changed: dict[str, list[bool]] = field(default_factory=lambda: {graph: [] for graph in GRAPHS})


@torch.no_grad()
def measure(
    model: LlavaForConditionalGeneration, inputs: dict[str, torch.Tensor], labels: torch.Tensor, *, chunk: int = 128
) -> list[Sample]:
    """Measure a batch.

    Args:
        model: a LLaVA, or a DPVR model, whose base is measured.
        inputs: its processor's input_ids (B, T), attention_mask and pixel_values; every row has a picture.
        labels: int64 (B, T), the token at the answers' places, -100 elsewhere; an answer does not follow an image.
        chunk: tokens whose attention maps (B, H, chunk, T) or logits (chunk, vocabulary) are held at a time.

    Returns:
        One `Sample` per row.

    Raises:
        ValueError: for a decoder of another kind, rows without a picture and rows without an answer.
    """
    decoder = model.model.language_model
    if decoder.config.model_type not in SUPPORTED_DECODERS:
        raise ValueError(
            f"Expected a LLaVA on a decoder of type {SUPPORTED_DECODERS}; got {decoder.config.model_type!r}. Remedy: "
            "measure another one."
        )
    ids, valid = inputs["input_ids"], inputs["attention_mask"].bool()
    image = ids == model.config.image_token_id
    text = valid & ~image
    answers = labels[:, 1:] != IGNORED_LABEL  # (B, T - 1), at the tokens that predict them
    for what, found in (("a picture", image), ("an answer", answers)):
        if not found.any(1).all():
            rows = (~found.any(1)).nonzero().flatten().tolist()
            raise ValueError(f"Expected {what} in every row; got none in rows {rows}. Remedy: leave these rows out.")
    this = _Rows(model, inputs, image, valid)
    after_image = text & (image.cumsum(1) > 0)

    final = this.embeds
    for layer in decoder.layers:
        final = this.run(layer, final, "joint")
    answered = _log_probabilities(model, final[:, :-1][answers])  # (answer tokens of all rows, vocabulary)

    samples = [Sample() for _ in ids]
    hidden = this.embeds
    for index, layer in enumerate(decoder.layers):
        for sample, mass in zip(samples, _attention_mass(this, layer, hidden, image, after_image, chunk), strict=True):
            sample.attention_mass.append(mass)
        before, hidden = hidden, this.run(layer, hidden, "joint")
        cosine = nn.functional.cosine_similarity(before.float(), hidden.float(), dim=-1)  # (B, T)
        for kind, tokens in (("image", image), ("text", text)):
            distance = torch.zeros_like(cosine)
            distance[tokens] = _lens_kl(model, final[tokens], hidden[tokens], chunk)
            for row, sample in enumerate(samples):
                sample.cosine[kind].append(cosine[row][tokens[row]].mean().item())
                sample.logit_lens_kl[kind].append(distance[row][tokens[row]].mean().item())
        if index < len(decoder.layers) - 1:
            for graph in GRAPHS:
                states = this.withdraw(hidden, index + 1, graph)[:, :-1][answers]
                _compare(samples, graph, answered, _log_probabilities(model, states), answers)
    return samples


class _Rows(TwoStreamPass):
    """A batch on its way through the decoder, layer by layer."""

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        inputs: dict[str, torch.Tensor],
        image: torch.Tensor,
        valid: torch.Tensor,
    ) -> None:
        llava, self.decoder = model.model, model.model.language_model
        features = llava.get_image_features(pixel_values=inputs["pixel_values"])
        features = torch.cat(list(getattr(features, "pooler_output", features)))  # transformers 5, 4
        embeds = llava.get_input_embeddings()(inputs["input_ids"])
        self.embeds = embeds.masked_scatter(image[..., None], features.to(embeds.dtype))
        places = (valid.long().cumsum(1) - 1).clamp(min=0)
        plan = LayerPlan(len(self.decoder.layers), (JOINT,) * len(self.decoder.layers))
        super().__init__(self.decoder, plan, self.embeds, image, valid, places, cache=None)

    def withdraw(self, hidden: torch.Tensor, split: int, graph: str) -> torch.Tensor:
        """States (B, T, D) after the last layer; from `split` on the image waits, and late fusion reads it last."""
        layers, self.scratch = self.decoder.layers, DynamicCache()
        text = self.streams.pick(hidden, self.streams.text)
        image = self.streams.pick(hidden, self.streams.image)
        for layer in layers[split:-1]:
            text = self.run(layer, text, "text")
        if graph == "late_fusion":
            self.write_keys(layers[-1], image, self.rotary("image"))
        text = self.run(layers[-1], text, "context" if graph == "late_fusion" else "text")
        return self.streams.merge(text, image)


def _log_probabilities(model: LlavaForConditionalGeneration, states: torch.Tensor) -> torch.Tensor:
    """Log-probabilities float32 (N, vocabulary) of the next token after states (N, D) of any layer."""
    return model.lm_head(model.model.language_model.norm(states)).float().log_softmax(-1)


def _kl(expected: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    """KL(expected || got) of log-probabilities (N, vocabulary), (N,) in nats."""
    return (expected.exp() * (expected - got)).sum(-1)


def _lens_kl(
    model: LlavaForConditionalGeneration, final: torch.Tensor, states: torch.Tensor, chunk: int
) -> torch.Tensor:
    """KL from the final distribution to the logit lens's at the same tokens, (N,) for states (N, D)."""
    parts = zip(final.split(chunk), states.split(chunk), strict=True)
    return torch.cat([_kl(*(_log_probabilities(model, part) for part in pair)) for pair in parts])


def _attention_mass(
    this: _Rows, layer: nn.Module, hidden: torch.Tensor, image: torch.Tensor, queries: torch.Tensor, chunk: int
) -> list[list[float]]:
    """Per row and head, the mean share of attention that tokens (B, T) give to image tokens (B, T)."""
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
        mass.append((scores.softmax(-1) * image[:, None, None, :]).sum(-1))
    mass = torch.cat(mass, dim=2)  # (B, H, T)
    return [row[:, tokens].mean(1).tolist() for row, tokens in zip(mass, queries, strict=True)]


def _compare(
    samples: list[Sample], graph: str, expected: torch.Tensor, got: torch.Tensor, answers: torch.Tensor
) -> None:
    """Add what a withdrawal does to each row's answer, log-probabilities (answer tokens of all rows, vocabulary)."""
    counts = answers.sum(1).tolist()
    distance, changed = _kl(expected, got), expected.argmax(-1) != got.argmax(-1)
    for sample, kl, differs in zip(samples, distance.split(counts), changed.split(counts), strict=True):
        sample.withdrawal_kl[graph].append(kl.mean().item())
        sample.withdrawal_changed[graph].append(bool(differs.any()))
