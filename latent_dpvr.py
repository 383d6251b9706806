"""A low-rank latent of the image: what all deep layers read of it, in place of a side branch's states.

    image states z (B, V, D)        of the split, or of side layers run on them
        n = z / rms(z)
        c = A n  (B, V, r)                        one latent, shared by all layers
            |------------------.
        K_l = W_l c + b_l      K_m = W_m c + b_m  for each reading layer, before its k-norm and rotary embedding,
        V_l = ...              V_m = ...          which stay the layer's own

`A`, `W` and `b` are fitted in closed form, without labels (dpvr/training/fit.py). Latents shared by keys and values:
multi-head latent attention, https://arxiv.org/abs/2405.04434; across layers, https://arxiv.org/abs/2405.12981.

Axes: B batch, V image tokens, D width, r rank, W width of a layer's keys or values.
"""

import copy
from typing import Any

import torch
from torch import nn

try:
    from .configuration_dpvr import CONTEXT, LATENT_FIELDS, DpvrLlavaConfig, LayerPlan
    from .side_branch_dpvr import device_of, make_side_branch, reset_side_branch
    from .streams_dpvr import Runs
except ImportError:
    from configuration_dpvr import CONTEXT, LATENT_FIELDS, DpvrLlavaConfig, LayerPlan
    from side_branch_dpvr import device_of, make_side_branch, reset_side_branch
    from streams_dpvr import Runs


class Projection(nn.Linear):
    """A linear layer that computes in its own dtype and gives that of its input, as PEFT trains in float32."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return super().forward(states.to(self.weight.dtype)).to(states.dtype)


class Latent(nn.Module):
    """The side layers, the map to the latent, and that to the keys and values of each reading layer.

    Args:
        decoder: with `layers` and a `config`.
        plan: its context layers are those that read.
        rank: r.
        num_side_layers: decoder layers that image states run through before.

    Raises:
        ValueError: for a reading layer without projections of its own to keys and values, and for a rank above D.
    """

    def __init__(self, decoder: nn.Module, plan: LayerPlan, rank: int, num_side_layers: int) -> None:
        super().__init__()
        width = decoder.config.hidden_size
        if rank > width:
            raise ValueError(f"latent_rank is {rank}, but the decoder is {width} wide: choose 1 to {width}.")
        self.layers = make_side_branch(decoder, plan.split_layer, num_side_layers)
        self.reduce = Projection(width, rank, bias=False)
        self.keys, self.values = nn.ModuleDict(), nn.ModuleDict()
        for index, mode in enumerate(plan.modes):
            if mode == CONTEXT:
                keys, values = projections_of(decoder.layers[index], index)
                self.keys[str(index)] = Projection(rank, keys.out_features)
                self.values[str(index)] = Projection(rank, values.out_features)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """The latent (B, V, r) of image states (B, V, D)."""
        return self.reduce(normalised(states))

    def projections(self, layer: int) -> dict[str, nn.Module]:
        """What replaces a reading layer's projections to keys and values, for a call with the latent as its states."""
        return {"k_proj": self.keys[str(layer)], "v_proj": self.values[str(layer)]}


def projections_of(layer: nn.Module, index: int) -> tuple[nn.Module, nn.Module]:
    """A decoder layer's own projections to keys and values.

    Raises:
        ValueError: if it has none, or another norm before them.
    """
    attention = layer._modules.get("self_attn")
    parts = {} if attention is None else attention._modules
    if "k_proj" not in parts or "v_proj" not in parts or "input_layernorm" not in layer._modules:
        raise ValueError(
            f"Layer {index} is a {type(layer).__name__} without projections k_proj and v_proj behind an "
            "input_layernorm, so a latent cannot take their place: use another routing, such as kv_substitution."
        )
    return parts["k_proj"], parts["v_proj"]


def normalised(states: torch.Tensor) -> torch.Tensor:
    """States divided by their root mean square, in float32 at least; 1e-12 is added to the mean of squares."""
    exact = states.to(torch.promote_types(states.dtype, torch.float32))
    return (exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + 1e-12)).to(states.dtype)


def token_scores(score: str, states: torch.Tensor, runs: Runs) -> torch.Tensor:
    """How much the image states (B, V, D) that a latent is made of stand out, (B, V).

    "norm" is their length; "distance" one minus the cosine to the mean of their picture.
    """
    exact = states.to(torch.promote_types(states.dtype, torch.float32))
    if score == "norm":
        return exact.norm(dim=-1)
    return 1 - torch.cosine_similarity(exact, runs.mean(exact), dim=-1)


@torch.no_grad()
def reset_latent(latent: Latent, decoder: nn.Module, plan: LayerPlan, how: str) -> None:
    """Start a latent that is to be fitted: its side layers as `how` says, its maps at zero."""
    reset_side_branch(latent.layers, decoder, plan.split_layer, how)
    for module in (latent.reduce, *latent.keys.values(), *latent.values.values()):
        for weight in module.parameters():
            weight.zero_()


class WithLatent:
    """A mixin of a DPVR model: its latent, which may be replaced."""

    def new_latent(self, *, latent_rank: int, **fields: Any) -> None:
        """Give the model a new latent, to be fitted, in place of the one it has.

        Args:
            latent_rank, **fields: fields of `DpvrLlavaConfig`.

        Raises:
            ValueError: for a contradiction among the fields; the model then stays as it was.
        """
        config, base = copy.deepcopy(self.config), self.model.language_model
        for name, value in {"latent_rank": latent_rank, **fields}.items():
            setattr(config, name, value)
        config.check_dpvr_fields()
        latent = Latent(base, config.layer_plan("latent"), latent_rank, config.latent_side_layers)
        like = next(weight for weight in base.layers[-1].parameters() if weight.is_floating_point())
        self.side_branch.latent = latent.to(device_of(base.layers[-1]), like.dtype)
        for name in ("latent_rank", *fields):
            setattr(self.config, name, getattr(config, name))
        self.reset_latent()

    def reset_latent(self) -> None:
        """Start the latent anew, if there is one: it is to be fitted."""
        if self.side_branch.has_latent:
            plan, init = self.config.layer_plan("latent"), self.config.side_branch_init
            reset_latent(self.side_branch.latent, self.model.language_model, plan, init)

    def replace_latent(self, *, routing: str, latent_rank: int | None, **fields: Any) -> None:
        """Give the model a new latent of these fields, or none with rank None, and a routing."""
        if latent_rank is not None:
            self.new_latent(latent_rank=latent_rank, **fields)
        else:
            del self.side_branch.latent
            self.config.latent_rank = None
        self.config.routing = routing
        self.config.check_dpvr_fields()


def with_saved_latent(
    config: DpvrLlavaConfig, values: dict[str, Any]
) -> tuple[DpvrLlavaConfig, dict[str, Any] | None]:
    """A config to load a repository's weights with, and what `replace_latent` takes afterwards.

    That is None if the wanted latent is the saved one, or none was saved: weights of another latent do not fit.

    Args:
        config: what is wanted.
        values: of the repository's config.
    """
    if values.get("latent_rank") is None or values.get("model_type") != DpvrLlavaConfig.model_type:
        return config, None
    saved = DpvrLlavaConfig.from_dict(dict(values))
    if _shape(config) == _shape(saved):
        return config, None
    wanted = {name: getattr(config, name) for name in ("routing", *LATENT_FIELDS)}
    for name in LATENT_FIELDS:
        setattr(config, name, getattr(saved, name))
    config.latent_split_layer, config.routing = saved.layer_plan("latent").split_layer, "none"
    return config, wanted


def _shape(config: DpvrLlavaConfig) -> tuple | None:
    """What the weights of a config's latent are for; None without one."""
    if config.latent_rank is None:
        return None
    plan = config.layer_plan("latent")
    return plan.split_layer, plan.modes, config.latent_rank, config.latent_side_layers
