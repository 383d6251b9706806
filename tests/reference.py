"""An independent, naive derivation of the method to measure the product against, and random prompts to do it with.

Late-Layer Fusion is Enough: Dual-Path Vision Token Routing, https://arxiv.org/abs/2606.09131, sections 3.2 and 3.3.

    one unpadded row of ids + its images -> embeddings h (T, D), positions 0 ... T-1
        phase 1   h <- full layer 0 ... s-1
        phase 2   out_image <- side branch over h[image], image tokens only
        phase 3   h[text] <- text-only layers
        phase 4   h[image] <- out_image; h <- full layer(s); logits <- lm_head(norm(h[text]))

It has no cache, no batch, no padding and no Hugging Face layer: it reads the weights of the stock layers and writes
the algebra out. A key is visible if its position is not above the query's. All is differentiable torch in float64.

Axes: T tokens of the row, Q queries, C keys, V image tokens, X text tokens, D width, H heads, d width of a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from conftest import IMAGE_TOKEN_ID, TOKENS_PER_IMAGE, VOCAB_SIZE, make_llava
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from naive_families import naive_read
from torch import Tensor, nn
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2

from configuration_dpvr import ROUTINGS
from loading_dpvr import LATENT
from modeling_dpvr import DpvrLlavaForConditionalGeneration

SIDE_ROUTINGS = tuple(routing for routing in ROUTINGS if routing != "latent")  # those of the paper


def naive_logits(
    model: DpvrLlavaForConditionalGeneration,
    input_ids: Tensor,
    pixel_values: Tensor | None = None,
    worth: Tensor | None = None,
    **custom: Tensor,
) -> tuple[Tensor, Tensor]:
    """Places int64 (X,) of the text tokens of one unpadded row of ids (T,), and their logits (X, vocabulary).

    `custom`: `seen` bool (T, T), the keys that a token sees in place of those before it, and `positions` (T,), its
    rotary position in place of its place in the row. `worth` (V,): scores by which a latent's image tokens are chosen.
    """
    text = (input_ids != model.config.image_token_id).nonzero().flatten()
    final = naive_states(model, input_ids, pixel_values, worth, **custom)[-1]
    return text, _linear(model.lm_head, _rms_norm(model.model.language_model.norm, final[text]))


def naive_states(
    model: DpvrLlavaForConditionalGeneration,
    input_ids: Tensor,
    pixel_values: Tensor | None = None,
    worth: Tensor | None = None,
    **custom: Tensor,
) -> list[Tensor]:
    """The L + 1 residual streams (T, D), before the first layer and after each; the rest as in `naive_logits`."""
    dpvr, layers = model.config, list(model.model.language_model.layers)
    is_image = input_ids == dpvr.image_token_id
    image, text = is_image.nonzero().flatten(), (~is_image).nonzero().flatten()
    place = torch.arange(len(input_ids))
    block = _Block(model, **custom)

    h = model.model.language_model.embed_tokens.weight[input_ids]  # (T, D)
    if len(image):
        h = h.index_copy(0, image, _image_features(model, pixel_values))
    states = [h]

    if dpvr.routing == "none" or len(image) == 0:
        for layer in layers:
            states.append(h := block(layer, h, place, h, place))
        return states

    depth, latent = len(layers), model.side_branch.latent if dpvr.routing == "latent" else None
    split = dpvr.split_layer
    if latent is not None and dpvr.latent_split_layer is not None:
        split = dpvr.latent_split_layer
    for layer in layers[:split]:  # phase 1
        states.append(h := block(layer, h, place, h, place))

    out_image = h[image]  # phase 2
    for layer in model.side_branch if latent is None else latent.layers:
        out_image = block(layer, out_image, place[image], out_image, place[image])

    def full(layer: nn.Module, h: Tensor) -> Tensor:
        return block(layer, h, place, h, place)

    def text_alone(layer: nn.Module, h: Tensor) -> Tensor:
        return h.index_copy(0, text, block(layer, h[text], place[text], h[text], place[text]))

    def text_reading_image(layer: nn.Module, h: Tensor) -> Tensor:
        """Keys and values of the image come from `out_image`; its query, output projection and MLP are skipped."""
        seen = h.index_copy(0, image, out_image)
        return h.index_copy(0, text, block(layer, h[text], place[text], seen, place))

    def text_reading_latent(layer: nn.Module, h: Tensor, index: int) -> Tensor:
        """Keys and values of the image tokens that are read come from the latent."""
        chosen = list(range(len(image)))
        if index > 0:
            chosen = naive_read(image.tolist(), out_image.detach(), dpvr.latent_stride, dpvr.latent_score, worth)
        read = image[chosen]
        latents = _linear(latent.reduce, out_image / (out_image.pow(2).mean(-1, keepdim=True) + 1e-12) ** 0.5)
        latents = latents[chosen]
        maps = latent.keys[str(index)], latent.values[str(index)]
        context = torch.cat([read, text]).sort().values
        at = torch.searchsorted(context, read)
        made = at, *(_linear(each, latents) for each in maps)
        new = block(layer, h[text], place[text], h[context], place[context], made)
        return h.index_copy(0, text, new)

    last_fused = depth - dpvr.num_fusion_layers
    for index in range(split, depth):
        layer = layers[index]
        if dpvr.routing == "text_only":
            h = text_alone(layer, h)
        elif dpvr.routing == "kv_substitution":
            h = text_reading_image(layer, h)
        elif dpvr.routing == "latent":
            h = text_reading_latent(layer, h, index) if str(index) in latent.keys else text_alone(layer, h)
        elif dpvr.routing == "persistent_context":
            h = full(layer, h.index_copy(0, image, out_image))
        elif dpvr.fusion_layers is not None:
            h = text_reading_image(layer, h) if index in dpvr.fusion_layers else text_alone(layer, h)
        elif index < last_fused:  # phase 3
            h = text_alone(layer, h)
        else:  # phase 4
            h = full(layer, h.index_copy(0, image, out_image) if index == last_fused else h)
        states.append(h)
    return states


class _Block:
    """A decoder layer written out: norm, attention by position, residual, norm, SwiGLU, residual."""

    def __init__(
        self, model: DpvrLlavaForConditionalGeneration, seen: Tensor | None = None, positions: Tensor | None = None
    ):
        self.seen, self.positions = seen, positions
        fields = model.config.text_config.to_dict()
        self.heads, self.kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
        self.head_width = fields.get("head_dim") or fields["hidden_size"] // self.heads
        self.theta = fields.get("rope_theta") or fields["rope_parameters"]["rope_theta"]

    def __call__(
        self,
        layer: nn.Module,
        x: Tensor,
        x_place: Tensor,
        context: Tensor,
        context_place: Tensor,
        made: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The new states (Q, D) of `x` after its queries read keys and values made from `context` (C, D).

        `made`: places in it, and the keys and values that take the place of those made there.
        """
        attention, mlp = layer.self_attn, layer.mlp
        q_in, kv_in = _rms_norm(layer.input_layernorm, x), _rms_norm(layer.input_layernorm, context)
        queries = self._rotate(self._split(_linear(attention.q_proj, q_in)), x_place)  # (Q, H, d)
        keys, values = _linear(attention.k_proj, kv_in), _linear(attention.v_proj, kv_in)
        if made is not None:
            keys, values = keys.index_copy(0, made[0], made[1]), values.index_copy(0, made[0], made[2])
        keys = self._rotate(self._split(keys), context_place)  # (C, kv heads, d)
        values = self._split(values)
        hidden_from = context_place[None, :] > x_place[:, None]  # (Q, C)
        if self.seen is not None:
            hidden_from = ~self.seen[x_place][:, context_place]
        read = []
        for head in range(self.heads):
            shared = head * self.kv_heads // self.heads
            scores = queries[:, head] @ keys[:, shared].T / self.head_width**0.5
            weights = torch.softmax(scores.masked_fill(hidden_from, -torch.inf), dim=-1)
            read.append(weights @ values[:, shared])
        x = x + _linear(attention.o_proj, torch.cat(read, dim=-1))
        normed = _rms_norm(layer.post_attention_layernorm, x)
        gate = _linear(mlp.gate_proj, normed)
        return x + _linear(mlp.down_proj, gate / (1 + torch.exp(-gate)) * _linear(mlp.up_proj, normed))

    def _split(self, flat: Tensor) -> Tensor:
        return flat.reshape(len(flat), flat.shape[-1] // self.head_width, self.head_width)

    def _rotate(self, heads: Tensor, place: Tensor) -> Tensor:
        """Rotary embedding as complex numbers: pair (i, i + d/2) turns by place * theta^(-2i/d)."""
        half = self.head_width // 2
        place = place if self.positions is None else self.positions[place]
        angle = place[:, None].double() * self.theta ** (-torch.arange(half).double() / half)  # (T, d/2)
        turned = (
            torch.complex(heads[..., :half], heads[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
        )
        return torch.cat([turned.real, turned.imag], dim=-1)


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    product = x @ module.weight.T
    return product if module.bias is None else product + module.bias


def _rms_norm(module: nn.Module, x: Tensor) -> Tensor:
    return module.weight * x / (x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon) ** 0.5


def _image_features(model: DpvrLlavaForConditionalGeneration, pixel_values: Tensor) -> Tensor:
    """Features (V, D) of the images, one after the other; transformers 5 wraps what 4 returns as a list."""
    features = model.model.get_image_features(pixel_values)
    return torch.cat(list(features if isinstance(features, list | tuple) else features.pooler_output))


@contextmanager
def real_float64() -> Iterator[None]:
    """Make stock layers exact: whatever the dtype, they round to float32 in norms, angles, eager softmax and loss."""
    softmax, to_float = nn.functional.softmax, Tensor.float

    def norm(self: nn.Module, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))

    def angles(self: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        fields = self.config.to_dict()
        theta = fields.get("rope_theta") or fields["rope_parameters"]["rope_theta"]
        width = 2 * len(self.inv_freq)
        inverse = theta ** -(torch.arange(0, width, 2, dtype=torch.float64, device=x.device) / width)
        angle = (position_ids.double()[..., None] * inverse).repeat(1, 1, 2)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)

    def exact_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None, **kwargs: object) -> Tensor:
        return softmax(x, dim=dim, dtype=x.dtype if x.dtype == torch.float64 else dtype, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "softmax", exact_softmax)
        patch.setattr(Tensor, "float", lambda x, *args: x if x.dtype == torch.float64 else to_float(x, *args))
        for name, module in (("Llama", modeling_llama), ("Mistral", modeling_mistral), ("Qwen2", modeling_qwen2)):
            patch.setattr(getattr(module, f"{name}RMSNorm"), "forward", norm)
            patch.setattr(getattr(module, f"{name}RotaryEmbedding"), "forward", angles)
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Random models and prompts


def make_dpvr(
    depth: int = 4, attention: str = "sdpa", dtype: torch.dtype = torch.float64, **dpvr_fields
) -> DpvrLlavaForConditionalGeneration:
    """A DPVR model on the tiny LLaVA with nothing left at a special value: a random side branch, norms unlike 1."""
    llava = make_llava(depth, dtype=dtype)
    llava.generation_config.eos_token_id = None
    fields = {"routing": "late_fusion", "split_layer": 2, "side_branch_init": "random", **dpvr_fields}
    model = DpvrLlavaForConditionalGeneration.from_llava(llava, **fields)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for name, weight in model.named_parameters():  # a new latent is at zero
            if LATENT in name:
                weight.normal_(0, 0.3)
    return randomise_vectors(model)


@torch.no_grad()
def randomise_vectors(model: nn.Module) -> nn.Module:
    """Move the norm weights and the biases of the decoder off 1 and 0, where an error in their use would not show."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "vision_tower" not in name:
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def examples(count: int) -> settings:
    """`count` random examples, the same on every run, however slow the machine."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=slow)


@dataclass
class Prompts:
    """A ragged batch. A row is told by its text lengths, with one image between each two: [0, 3, 2] has two images."""

    layout: list[list[int]]
    padding_side: str = "right"
    seed: int = 0
    rows: list[Tensor] = field(init=False, repr=False)  # ids without padding
    images: list[Tensor] = field(init=False, repr=False)  # float (images of the row, 3, 8, 8)
    inputs: dict[str, Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.rows, self.images = map(list, zip(*(make_row(row, generator) for row in self.layout), strict=True))
        ids, mask = torch.zeros(2, len(self.rows), max(map(len, self.rows)), dtype=torch.long)
        for padded, valid, row in zip(self.unpad(ids), self.unpad(mask), self.rows, strict=True):
            padded[:], valid[:] = row, 1
        self.inputs = {"input_ids": ids, "attention_mask": mask}
        if any(map(len, self.images)):
            self.inputs["pixel_values"] = torch.cat(self.images)

    def unpad(self, tensor: Tensor) -> list[Tensor]:
        """Views of the rows of a padded (B, T, ...) tensor without their padding."""
        length = tensor.shape[1]
        starts = [length - len(row) if self.padding_side == "left" else 0 for row in self.rows]
        return [tensor[i, start : start + len(self.rows[i])] for i, start in enumerate(starts)]


def make_row(text_lengths: list[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids (T,) and images (N, 3, 8, 8) of one row, see `Prompts`."""
    parts = []
    for index, length in enumerate(text_lengths):
        if index:
            parts.append(torch.full((TOKENS_PER_IMAGE,), IMAGE_TOKEN_ID))
        parts.append(torch.randint(IMAGE_TOKEN_ID + 1, VOCAB_SIZE, (length,), generator=generator))
    images = torch.randn(len(text_lengths) - 1, 3, 8, 8, generator=generator, dtype=torch.float64)
    return torch.cat(parts), images


def layouts(row: st.SearchStrategy[list[int]], num_rows: st.SearchStrategy[int]) -> st.SearchStrategy[list[list[int]]]:
    """Half of them are the same row several times: where nothing is padded, other code runs."""
    even = st.builds(lambda one, count: [one] * count, row, num_rows)
    ragged = num_rows.flatmap(lambda count: st.lists(row, min_size=count, max_size=count))
    return even | ragged


@st.composite
def prompts(draw: st.DrawFn, ends_with_text: bool = False) -> Prompts:
    """1 to 4 rows of 0 to 3 images anywhere (first, last, side by side), padded left or right; every row has text."""
    row = st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(
        lambda lengths: lengths[-1] > 0 if ends_with_text else sum(lengths) > 0
    )
    layout = draw(layouts(row, st.integers(1, 4)))
    return Prompts(layout, draw(st.sampled_from(["left", "right"])), draw(st.integers(0, 2**16)))


@st.composite
def plans(draw: st.DrawFn) -> dict[str, object]:
    """Fields of a valid `DpvrLlavaConfig`, and the `depth` they are for."""
    depth = draw(st.integers(3, 6))
    split = draw(st.integers(1, depth - 1))
    kind = draw(
        st.sampled_from(["late", "sparse", "persistent_context", "kv_substitution", "text_only", "latent", "none"])
    )
    fields = {"depth": depth, "split_layer": split, "num_side_layers": draw(st.integers(1, 2)), "routing": kind}
    if kind == "late":
        fields |= {"routing": "late_fusion", "num_fusion_layers": draw(st.integers(1, depth - split))}
    elif kind == "sparse":
        deep = st.sets(st.integers(split, depth - 1), min_size=1)
        fields |= {"routing": "late_fusion", "fusion_layers": sorted(draw(deep))}
    elif kind == "latent":
        start = draw(st.sampled_from([0, split]))
        some = draw(st.none() | st.sets(st.integers(split, depth - 1), min_size=1))
        fields |= {
            "latent_rank": draw(st.integers(1, 9)),
            "latent_split_layer": start,
            "latent_layers": None if some is None else sorted(some | ({0} if start == 0 else set())),
            "latent_side_layers": draw(st.integers(0, 2)),
            "latent_stride": draw(st.integers(1, 3)),
        }
        if fields["latent_stride"] > 1:
            fields["latent_score"] = draw(st.sampled_from([None, "norm", "distance"]))
    return fields
