"""Three attention heads initialised by hand: two that look back in the text, one that looks at the picture.

    layer 0, head 0    previous-token head: attends to the token before, and writes its identity to the residual stream
    layer 1, head 0    induction head: attends to tokens whose previous token was the current one, and copies them:
                       "red A  blue B  ...  red" -> "A"
    layer 1, head 1    attends to image tokens that match the current word, and copies their other attributes:
                       "star" -> "red"

Large language models and LLaVA have such heads. The first two together form an induction head, with which transformers
continue a pattern (Olsson et al. 2022, "In-context Learning and Induction Heads"). They form late and suddenly in
training: in a run of the small LLaVA from random weights, accuracy on option letters was at chance after a thousand
steps. So they are written into the random weights before the first step, and trained like every other weight.

Axes: D width, S head width, P components of a word that heads compare.
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers import LlamaModel

SHARPNESS = 6.6  # difference of scores in nats between the token before and the one before that
MATCH = 2.0  # scale of queries and keys that compare words
ASIDE = 30.0  # nats by which the picture head ranks words below image tokens
NOTE = 0.15  # scale at which a head adds to the residual stream


class Subspaces(NamedTuple):
    """Orthonormal directions of the residual stream.

    Attributes:
        shared: (D,), a component that all words have and image tokens lack.
        identity: (P, D), the components of a word by which heads recognise it.
        previous: (P, D), where the previous-token head writes the identity of the token before.
        content: (S, D), what the heads of layer 1 copy.
    """

    shared: torch.Tensor
    identity: torch.Tensor
    previous: torch.Tensor
    content: torch.Tensor


@torch.no_grad()
def initialise_heads(decoder: LlamaModel) -> None:
    """Write the heads into a randomly initialised decoder, and embeddings that they can read.

    Raises:
        ValueError: the decoder has fewer than two layers or shares keys among heads.
    """
    config = decoder.config
    if config.num_hidden_layers < 2:
        raise ValueError(f"The decoder has {config.num_hidden_layers} layers, and the heads need two: add layers.")
    if config.num_key_value_heads != config.num_attention_heads:
        raise ValueError(
            f"The decoder has {config.num_attention_heads} heads and {config.num_key_value_heads} heads of keys: give "
            "every head its own keys."
        )
    width = config.hidden_size
    first, second = (layer.self_attn for layer in decoder.layers[:2])
    size = first.head_dim
    part = min(3 * size // 4 - 2, (width - 1) // 2)
    directions = torch.linalg.qr(torch.randn(width, width))[0].T
    shared, basis = directions[0], directions[1:]
    spaces = Subspaces(shared, basis[:part], basis[part : 2 * part], basis[-size:])
    initialise_embeddings(decoder.embed_tokens.weight, shared)
    initialise_previous_token_head(first, spaces, decoder.rotary_emb.inv_freq)
    for head, key in enumerate((spaces.previous, spaces.identity)[: width // size]):
        initialise_matching_head(second, head, spaces, key)
    if width > size:
        rank_words_last(second, spaces.shared)


def initialise_embeddings(words: torch.Tensor, shared: torch.Tensor) -> None:
    """Make word embeddings (words, D) random directions of length 1 plus the direction that all words share."""
    words.normal_(std=words.shape[1] ** -0.5)
    words.sub_(torch.outer(words @ shared, shared)).add_(shared)


def strength(width: int) -> float:
    """The component of a word along the shared direction, after the norm."""
    return (width / 2) ** 0.5


def initialise_previous_token_head(attention: nn.Module, spaces: Subspaces, frequencies: torch.Tensor) -> None:
    """Head 0: queries and keys are the same for all words but for their position, so it attends by distance alone."""
    size, part = attention.head_dim, len(spaces.identity)
    here = torch.ones(size)
    # The score of a token d before is sum(cos((d - 1) f)) over the frequencies f, times the square of this scale.
    gap = 2 * (1 - frequencies.cos()).sum() * strength(len(spaces.shared)) ** 2 / size**0.5
    scale = (SHARPNESS / gap) ** 0.5
    attention.q_proj.weight[:size] = scale * torch.outer(here, spaces.shared)
    attention.k_proj.weight[:size] = scale * torch.outer(turned(here, frequencies), spaces.shared)
    attention.v_proj.weight[:part] = spaces.identity
    attention.o_proj.weight[:, :part] = NOTE * spaces.previous.T


def initialise_matching_head(attention: nn.Module, head: int, spaces: Subspaces, key: torch.Tensor) -> None:
    """A head that attends to tokens whose components `key` (P, D) match the current word's identity.

    They are compared in those components of the head that rotary embeddings turn slowly, so distance hardly matters.
    """
    size, part = attention.head_dim, len(key)
    rows = slice(head * size, (head + 1) * size)
    compared = by_speed(size)[-part - 2 : -2]
    for projection, compares in ((attention.q_proj, spaces.identity), (attention.k_proj, key)):
        projection.weight[rows] = 0
        projection.weight[head * size + compared] = MATCH * compares
    values = slice(head * size, head * size + len(spaces.content))
    attention.v_proj.weight[values] = spaces.content
    attention.o_proj.weight[:, values] = NOTE * spaces.content.T


def rank_words_last(attention: nn.Module, shared: torch.Tensor) -> None:
    """In head 1 words, which have the shared component, score `ASIDE` nats below image tokens, which lack it."""
    size = attention.head_dim
    slowest = by_speed(size)[-2]
    aside = (ASIDE * size**0.5) ** 0.5 / strength(len(shared))
    attention.q_proj.weight[size + slowest] = aside * shared
    attention.k_proj.weight[size + slowest] = -aside * shared


def by_speed(size: int) -> torch.Tensor:
    """Components (S,) of a head in pairs that rotary embeddings turn together, fastest first."""
    return torch.arange(size).view(2, -1).T.flatten()


def turned(vector: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Return `float[D]` turned by `angles: float[D / 2]` as rotary embeddings turn it by one position."""
    first, second = vector.chunk(2)
    return torch.cat((first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()))
