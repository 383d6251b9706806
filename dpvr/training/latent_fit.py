"""Fit a latent in closed form, without labels: least squares from the image's states to the keys and values of a base.

    batches of pictures and questions --> one forward of the base a batch
        z (N, D)   image states at the split, or after the side layers          n = z / rms(z)
        T_l (N, W) what k_proj and v_proj of each reading layer give for them   before k-norm and rotary embedding
            |
    moments    means, n'n and n'T_l in float64: their size grows with width and depth, not with the number of pictures
            |
    solve      S_l = ridge regression of T_l on n, each scaled by the deviation of T_l
               U s V' = the first r components of cov(n)^(1/2) [S_1 ... S_L]     reduced-rank regression
               A = U' cov(n)^(-1/2),  W_l = cov(T_l, n) A',  b_l = mean(T_l) - W_l A mean(n)

Reduced-rank regression: Izenman 1975. Axes: N image tokens of all pictures, D width, W that of keys or values, r rank.
"""

from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from configuration_dpvr import CONTEXT, RESET, LayerPlan
from decoders_dpvr import DECODER_NAMES, RECURRENT, decoder_of
from dpvr.data.prompts import split_teacher
from forward_dpvr import routed_forward, stock_class
from latent_dpvr import Latent, normalised, projections_of
from side_branch_dpvr import SideBranch
from twins_dpvr import RoutedLayer
from two_stream_dpvr import TwoStreamPass

RIDGE = 1e-4  # of the mean variance of n, with as many image tokens as the width; more with fewer
KINDS = ("keys", "values")


class BasePass(TwoStreamPass):
    """The base's own forward, in which image states at the split also run through the side layers."""

    def __call__(self, layer: RoutedLayer, hidden: torch.Tensor, arguments: dict[str, Any], cache: Any) -> Any:
        if layer.index == 0:
            self.start(cache)
        if layer.kind != RECURRENT:
            self.causal = getattr(layer.stock.self_attn, "is_causal", True)
            if layer.index >= self.plan.split_layer and not self.branch_has_run:
                with torch.set_grad_enabled(self.with_gradient):
                    self.leave(hidden.detach())
                    self._run_side_branch(self.arguments(arguments, "image"), layer.cache_name)
                self.branch_has_run = True
                if self.ends_here:
                    raise ImageStatesMade
        with torch.no_grad():
            return layer.call(hidden, arguments, cache)

    branch_has_run = with_gradient = ends_here = False

    def image_states(self) -> torch.Tensor:
        """The states (N, D) of the image tokens of all rows, in the order of the rows."""
        return self.image[self.streams.image >= 0]


class ImageStatesMade(Exception):
    """Ends a forward once the image states that are read are made."""


@dataclass
class Target:
    """What layers read of an image, to be fitted: the model without its head, the plan, and the side branch."""

    owner: nn.Module
    plan: LayerPlan
    branch: SideBranch

    @classmethod
    def of(cls, model: nn.Module) -> "Target":
        """What is read in a DPVR model, or in a stock model with its active adapter: the latent if there is one.

        Raises:
            ValueError: if no layer reads anything.
        """
        owner = next(module for module in model.modules() if hasattr(type(module), "plan") and _has_decoder(module))
        branch, plan = owner.branch, owner.plan
        if branch.has_latent and not plan.latent_stride and hasattr(owner.config, "layer_plan"):
            plan = owner.config.layer_plan("latent")
        if not plan.reads_side_branch or plan.is_vanilla:
            raise ValueError(
                f"Under the plan {plan} no layer reads an image past the split, so there is nothing to fit: choose a "
                "routing such as latent or late_fusion."
            )
        return cls(owner, plan, branch)

    @property
    def latent(self) -> Latent:
        """
        Raises:
            ValueError: if the model has no latent.
        """
        if not self.plan.latent_stride:
            raise ValueError(
                "This model has no latent to fit: load it with latent_rank=64 or another rank, or give it an adapter "
                "with DpvrConfig(routing='latent', latent_rank=64)."
            )
        return self.branch.latent

    @property
    def readers(self) -> list[int]:
        return [index for index, mode in enumerate(self.plan.modes) if mode in (CONTEXT, RESET)]

    def read(self, image_states: torch.Tensor) -> dict[tuple[int, str], torch.Tensor]:
        """The keys and values (N, W) that layers read of image states (N, D), before k-norm and rotary embedding."""
        if self.plan.latent_stride:
            states, maps = self.latent(image_states), zip(KINDS, (self.latent.keys, self.latent.values), strict=True)
            return {(index, kind): of[str(index)](states) for kind, of in maps for index in self.readers}
        layers, made = decoder_of(self.owner)[1].layers, {}
        for index in self.readers:
            states = layers[index].input_layernorm(image_states)
            for kind, module in zip(KINDS, projections_of(layers[index], index), strict=True):
                made[index, kind] = module(states)
        return made

    def run(
        self,
        inputs: dict[str, torch.Tensor],
        teacher: dict[str, torch.Tensor] | None = None,
        *,
        with_gradient: bool = False,
    ) -> tuple[torch.Tensor, dict]:
        """Image states (N, D) before the latent, and (layer, "keys" or "values") -> what the base has (N, W).

        Args:
            inputs: of the model, with images.
            teacher: those of the base, with other pictures of the same sizes; None: the same.
            with_gradient: for the side layers; the base runs without.
        """
        taken: dict[tuple[int, str], torch.Tensor] = {}
        layers = decoder_of(self.owner)[1].layers
        with ExitStack() as stack:
            for index in self.readers:
                for kind, module in zip(KINDS, projections_of(layers[index], index), strict=True):
                    hook = module.register_forward_hook(_take(taken, (index, kind)))
                    stack.callback(hook.remove)
            shown = self._run(inputs if teacher is None else teacher, with_gradient)
        if teacher is not None:
            shown = self._run(inputs, with_gradient, ends_here=True)
        mask = shown.image_mask
        return shown.image_states(), {key: value[mask.to(value.device)] for key, value in taken.items()}

    def _run(self, inputs: dict[str, torch.Tensor], with_gradient: bool, *, ends_here: bool = False) -> BasePass:
        made: list[BasePass] = []

        def make_pass(*args: Any, **kwargs: Any) -> BasePass:
            made.append(BasePass(*args, **kwargs))
            made[-1].with_gradient, made[-1].ends_here = with_gradient, ends_here
            return made[-1]

        arguments = {name: value for name, value in inputs.items() if name != "labels"} | {"use_cache": False}
        stock = stock_class(self.owner).forward
        with suppress(ImageStatesMade):
            routed_forward(self.owner, stock, self.branch, self.plan, arguments, make_pass=make_pass)
        if not made:
            raise ValueError("A batch to fit on has no images: give it rows with pictures.")
        return made[0]


def _has_decoder(module: nn.Module) -> bool:
    return any(name in module._modules for name in DECODER_NAMES)


def _take(taken: dict, key: tuple[int, str]):
    def hook(module: nn.Module, args: tuple, out: torch.Tensor) -> None:
        taken[key] = out.detach()

    return hook


@dataclass
class Moments:
    """Sums over image tokens of n (D,), T_l (W,) and their products, in float64 and in the host's memory.

    They take 8 D (D + sum of all W) bytes, whatever the number of pictures. The device of the model holds one product
    (D, W) at a time beside a batch's n and T_l.

    Attributes:
        count: N.
        state, states: sums of n (D,) and n'n (D, D).
        target, square, cross: of every T_l, sums (W,), of squares (W,), and of n'T_l (D, W).
    """

    count: int = 0
    state: torch.Tensor | None = None
    states: torch.Tensor | None = None
    target: dict = field(default_factory=dict)
    square: dict = field(default_factory=dict)
    cross: dict = field(default_factory=dict)

    def add(self, image_states: torch.Tensor, targets: dict[tuple[int, str], torch.Tensor]) -> None:
        n = normalised(image_states).double()
        self.count += len(n)
        self.state = n.sum(0).cpu() + (0 if self.state is None else self.state)
        self.states = (n.T @ n).cpu() + (0 if self.states is None else self.states)
        for key, value in targets.items():
            value = value.to(n.device, torch.float64)
            self.target[key] = value.sum(0).cpu() + self.target.get(key, 0)
            self.square[key] = value.pow(2).sum(0).cpu() + self.square.get(key, 0)
            self.cross[key] = (n.T @ value).cpu() + self.cross.get(key, 0)

    @property
    def mean(self) -> torch.Tensor:
        return self.state / self.count

    @property
    def covariance(self) -> torch.Tensor:
        return self.states / self.count - torch.outer(self.mean, self.mean)

    def cross_covariance(self, key: tuple[int, str]) -> torch.Tensor:
        """cov(n, T) (D, W)."""
        return self.cross[key] / self.count - torch.outer(self.mean, self.target[key] / self.count)

    @property
    def deviations(self) -> dict[tuple[int, str], float]:
        """The square root of every `variance`."""
        return {key: max(self.variance(key).item(), 1e-24) ** 0.5 for key in self.cross}

    def variance(self, key: tuple[int, str]) -> torch.Tensor:
        """The sum of the variances of T's entries."""
        return (self.square[key] / self.count - (self.target[key] / self.count).pow(2)).sum()


@dataclass
class Solution:
    """The maps of a fitted latent: `reduce` A (R, D), ordered by what they explain, so that any r <= R first rows are
    the fit of rank r; `maps` W_l (W, R) and `biases` b_l (W,) at rank R; `means` of n.
    """

    reduce: torch.Tensor
    maps: dict[tuple[int, str], torch.Tensor]
    targets: dict[tuple[int, str], torch.Tensor]
    mean: torch.Tensor

    def explained(self, moments: Moments, rank: int) -> dict[tuple[int, str], float]:
        """R² of every T_l at a rank, on the data of these moments."""
        reduce = self.reduce[:rank]
        within = reduce @ moments.covariance @ reduce.T
        found = {}
        for key, full in self.maps.items():
            weight = full[:, :rank]
            offset = self.targets[key] + weight @ reduce @ (moments.mean - self.mean)
            bias = (moments.target[key] / moments.count - offset).pow(2).sum()
            fitted = ((weight @ within) * weight).sum()
            shared = (weight.T * (reduce @ moments.cross_covariance(key))).sum()
            residual = moments.variance(key) - 2 * shared + fitted + bias
            found[key] = 1 - (residual / moments.variance(key)).item()
        return found

    @torch.no_grad()
    def put_into(self, latent: Latent) -> None:
        """Write the maps into a latent, at its rank."""
        rank = latent.reduce.out_features
        reduce = self.reduce[:rank]
        latent.reduce.weight.zero_()
        latent.reduce.weight[: len(reduce)].copy_(reduce)
        for (index, kind), full in self.maps.items():
            linear = (latent.keys if kind == "keys" else latent.values)[str(index)]
            weight = full[:, :rank]
            linear.weight.zero_()
            linear.weight[:, : weight.shape[1]].copy_(weight)
            linear.bias.copy_(self.targets[(index, kind)] - weight @ (reduce @ self.mean))


def solve(moments: Moments, ridge: float = RIDGE) -> Solution:
    """The best maps of every rank, by reduced-rank ridge regression."""
    width = len(moments.mean)
    strength = ridge * max(1.0, width / moments.count) * moments.covariance.diagonal().mean()
    values, vectors = torch.linalg.eigh(moments.covariance + strength * torch.eye(width).to(moments.mean))
    root = vectors @ torch.diag(values.clamp(min=strength).rsqrt()) @ vectors.T  # cov(n)^(-1/2)
    scale = {key: moments.variance(key).sqrt().clamp(min=1e-12) for key in moments.cross}
    gram = torch.zeros_like(moments.states)
    for key in moments.cross:
        scaled = root @ moments.cross_covariance(key) / scale[key]
        gram += scaled @ scaled.T
    components = torch.linalg.eigh(gram).eigenvectors.flip(1)  # the most explaining first
    reduce = components.T @ root
    maps = {key: moments.cross_covariance(key).T @ reduce.T for key in moments.cross}
    targets = {key: total / moments.count for key, total in moments.target.items()}
    return Solution(reduce, maps, targets, moments.mean)


@torch.no_grad()
def collect(target: Target, batches: Iterable[dict[str, torch.Tensor]], moments: Moments | None = None) -> Moments:
    """The moments of batches of inputs with images; those with `teacher_<name>` have the base see other pictures."""
    moments = moments or Moments()
    for inputs in batches:
        moments.add(*target.run(*split_teacher(inputs)))
    return moments


def fit_latent(model: nn.Module, batches: Iterable[dict[str, torch.Tensor]], *, ridge: float = RIDGE) -> Solution:
    """Fit the latent of a model on batches of its inputs with images, in closed form, and write it into the model.

    Args:
        model: a DPVR model with a latent, or a model with an adapter of routing "latent".
        batches: inputs as the model's processor makes them; the text matters as far as images see it. With inputs
            `teacher_<name>` the latent of a picture is fitted to the base's keys and values of another one.
        ridge: strength of the regularisation, a share of the mean variance of the image's states.

    Raises:
        ValueError: if the model has no latent, or a batch no images.
    """
    target, was_training = Target.of(model), model.training
    model.eval()
    solution = solve(collect(target, batches), ridge)
    model.train(was_training)
    solution.put_into(target.latent)
    return solution
