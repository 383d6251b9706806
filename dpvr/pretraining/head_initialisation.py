"""Heads that look back in the text and at the picture from the first step on: what an LLM and LLaVA bring along.

    layer 0, head 0    every word looks at the token before it and notes which that was
    layer 1, head 0    every word looks for tokens that note it as the one before, and reads what they are:
                       "red A  blue B  ...  red" -> "A"
    layer 1, head 1    every word looks for image tokens that stand for it, and reads what else they stand for:
                       "star" -> "red"

The first two are an induction head, by which transformers go on with a text as it went before (Olsson et al. 2022,
"In-context Learning and Induction Heads"). Such heads form late and all of a sudden: in a run of the small LLaVA from
random weights, letters of options stood at chance after a thousand steps. Here they are written into the random
weights before the first step; all of them are trained like every other weight.
"""

import torch
from transformers import LlamaModel

SHARPNESS = 6.6  # nats between the token before and the one before that
MATCH = 2.0  # scale of queries and keys that compare words
ASIDE = 30.0  # nats by which the head for pictures puts words behind image tokens
NOTE = 0.15  # scale at which a head adds to the residual stream


@torch.no_grad()
def initialise_heads(decoder: LlamaModel) -> None:
    """Write the heads into a randomly initialised decoder, and embeddings that they can read.

    Embeddings become random directions of length 1 plus one direction that all words share and image tokens lack: by
    it the first head asks for positions alone, and the last one tells words from image tokens. Words are compared in
    those components that rotary embeddings turn slowly, and so wherever they stand.

    Raises:
        ValueError: the decoder has fewer than two layers or shares keys among heads.
    """
    config = decoder.config
    if config.num_hidden_layers < 2 or config.num_key_value_heads != config.num_attention_heads:
        raise ValueError(
            "Expected a decoder of two or more layers with keys for every head; got "
            f"{config.num_hidden_layers} layers, {config.num_attention_heads} heads and "
            f"{config.num_key_value_heads} heads of keys."
        )
    words = decoder.embed_tokens.weight
    width = words.shape[1]
    first, second = (layer.self_attn for layer in decoder.layers[:2])
    size = first.head_dim
    part = min(3 * size // 4 - 2, (width - 1) // 2)  # how much of a word the heads compare
    directions = torch.linalg.qr(torch.randn(width, width))[0].T  # orthonormal, of the residual stream
    shared, basis = directions[0], directions[1:]
    who, before, heard = basis[:part], basis[part : 2 * part], basis[-size:]

    words.normal_(std=width**-0.5)
    words.sub_(torch.outer(words @ shared, shared)).add_(shared)
    strength = (width / 2) ** 0.5  # of the shared direction in a word, after the norm

    frequencies = decoder.rotary_emb.inv_freq
    here = torch.ones(size)
    # The score of a token d before is sum(cos((d - 1) f)) over the frequencies f, times the square of this scale.
    gap = 2 * (1 - frequencies.cos()).sum() * strength**2 / size**0.5
    scale = (SHARPNESS / gap) ** 0.5
    first.q_proj.weight[:size] = scale * torch.outer(here, shared)
    first.k_proj.weight[:size] = scale * torch.outer(turned(here, frequencies), shared)
    first.v_proj.weight[:part] = who
    first.o_proj.weight[:, :part] = NOTE * before.T

    by_speed = torch.arange(size).view(2, -1).T.flatten()  # pairs of components that turn together, fastest first
    compared, slowest = by_speed[-part - 2 : -2], by_speed[-2]
    for head, key in enumerate((before, who)[: width // size]):
        rows = slice(head * size, (head + 1) * size)
        for projection, compares in ((second.q_proj, who), (second.k_proj, key)):
            projection.weight[rows] = 0
            projection.weight[head * size + compared] = MATCH * compares
        values = slice(head * size, head * size + len(heard))
        second.v_proj.weight[values] = heard
        second.o_proj.weight[:, values] = NOTE * heard.T
    if width > size:
        aside = (ASIDE * size**0.5) ** 0.5 / strength
        second.q_proj.weight[size + slowest] = aside * shared
        second.k_proj.weight[size + slowest] = -aside * shared


def turned(vector: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Return `float[D]` turned by `angles: float[D / 2]` as rotary embeddings turn it by one position."""
    first, second = vector.chunk(2)
    return torch.cat((first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()))
