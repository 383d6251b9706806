"""The side branch: decoder layers for image tokens that have left the decoder, made of the decoder's own class.

Late-Layer Fusion is Enough, https://arxiv.org/abs/2606.09131, sections 3.2 (phase 2) and 3.4.

    decoder layers   0 ... s-1 | s  s+1 ... L-1
                                 |   |
                    side branch  0   1  ...         copies to start with, numbered L, L+1, ... in a cache
"""

import copy
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from transformers import PretrainedConfig

try:
    from .decoders_dpvr import side_sources
except ImportError:
    from decoders_dpvr import side_sources

try:  # a model that was loaded without a device_map needs no accelerate
    from accelerate.hooks import remove_hook_from_module
    from accelerate.utils import align_module_device, has_offloaded_params
except ImportError:
    has_offloaded_params = None

OUTPUTS = ("o_proj", "out_proj", "down_proj", "w2")  # what a layer adds to its input comes out of these


class SideBranch(nn.ModuleList):
    """The layers of a side branch, and beside them a latent with layers of its own (latent_dpvr.py) if there is one.

    0.<weight>, 1.<weight>, ...        latent.<weight>
    """

    def __init__(self, layers: Iterable[nn.Module] = (), latent: nn.Module | None = None) -> None:
        super().__init__(layers)
        if latent is not None:
            self.add_module("latent", latent)

    @property
    def has_latent(self) -> bool:
        return "latent" in self._modules

    def __len__(self) -> int:
        return len(self._modules) - self.has_latent

    def __iter__(self) -> Iterator[nn.Module]:
        return (self._modules[str(index)] for index in range(len(self)))


def make_side_branch(
    decoder: nn.Module, split_layer: int, num_side_layers: int, *, dense_mlp: bool = False
) -> SideBranch:
    """New decoder layers of the same class and size as the decoder's, not yet initialised.

    Args:
        decoder: with `layers` and a `config`.
        split_layer, num_side_layers: s, and the number of layers to make.
        dense_mlp: give a mixture-of-experts layer one MLP in place of its experts.

    Raises:
        ValueError: for `dense_mlp` with a decoder that has no such layers.
    """
    depth, side_branch = len(decoder.layers), SideBranch()
    for number, source in enumerate(side_sources(decoder.config, split_layer, num_side_layers)):
        config = _dense(decoder.config, source) if dense_mlp else decoder.config
        side_branch.append(type(decoder.layers[source])(config, source))
        for module in side_branch[-1].modules():
            if "layer_idx" in vars(module):
                module.layer_idx = depth + number
    return side_branch


@torch.no_grad()
def reset_side_branch(side_branch: nn.ModuleList, decoder: nn.Module, split_layer: int, how: str) -> None:
    """Initialise a side branch.

    Args:
        how: "split_layer", a copy of the decoder's layers from the split on; "identity", the same with its output
            projections at zero; or "random", as the library initialises this decoder. A dense MLP in place of experts
            starts at random with its output projection at zero.
    """
    sources = side_sources(decoder.config, split_layer, len(side_branch))
    for side_layer, source in zip(side_branch, sources, strict=True):
        with present(decoder.layers[source]):
            copied = {} if how == "random" else _plain_weights(decoder.layers[source], side_layer)
        if new := [name for name in side_layer.state_dict() if name not in copied]:
            fresh = type(side_layer)(side_layer.self_attn.config, source).state_dict()
            std = decoder.config.initializer_range
            copied |= {name: _random(name, side_layer.state_dict()[name], fresh, std) for name in new}
        for name in copied if how == "identity" else () if how == "random" else new:
            if any(part in OUTPUTS for part in name.split(".")):
                copied[name] = torch.zeros_like(copied[name])
        side_layer.load_state_dict(copied)


def _random(name: str, like: torch.Tensor, fresh: dict[str, torch.Tensor], std: float) -> torch.Tensor:
    """A matrix at random, a bias of zeros, or what the layer's own class starts with, as the scale of a norm."""
    if like.ndim > 1:
        return torch.empty_like(like).normal_(0.0, std)
    return torch.zeros_like(like) if name.endswith("bias") else fresh[name].to(like)


def _plain_weights(source: nn.Module, like: nn.Module) -> dict[str, torch.Tensor]:
    """The weights with which a plain layer `like` would compute what the decoder layer `source` does.

    A linear layer in 4 bits, or with LoRA in it, is applied to the unit vectors: its outputs are the weights. Modules
    that `source` does not have, as one MLP in place of experts, are left out.
    """
    weights: dict[str, torch.Tensor] = {}
    dtype = next(weight.dtype for weight in source.parameters() if weight.is_floating_point())  # a norm's, or LoRA's
    found = dict(source.named_modules())
    for name, plain in like.named_modules():
        if name not in found:
            continue
        module = found[name]
        if type(plain) is nn.Linear and (type(module) is not nn.Linear or not module.weight.is_floating_point()):
            device, training = next(module.parameters()).device, module.training
            units = torch.eye(plain.in_features, dtype=dtype, device=device)
            module.eval()  # without LoRA's dropout
            bias = module(torch.zeros_like(units[:1]))  # (1, out_features)
            weights[f"{name}.weight"] = (module(units) - bias).T
            if plain.bias is not None:
                weights[f"{name}.bias"] = bias[0]
            module.train(training)
        elif type(plain) is type(module):
            weights |= {f"{name}.{key}".lstrip("."): weight for key, weight in module.named_parameters(recurse=False)}
            weights |= {f"{name}.{key}".lstrip("."): buffer for key, buffer in module.named_buffers(recurse=False)}
    return {name: weight for name, weight in weights.items() if name in like.state_dict()}


def _dense(config: PretrainedConfig, layer: int) -> PretrainedConfig:
    """A decoder's config in which this layer has one MLP in place of experts."""
    if getattr(config, "mlp_only_layers", None) is None:
        raise ValueError(
            f"side_branch_mlp is 'dense', but a decoder of type {config.model_type!r} cannot build a layer with one "
            "MLP in place of experts: leave it at 'copy'."
        )
    dense = copy.copy(config)
    dense.mlp_only_layers = [*config.mlp_only_layers, layer]
    return dense


# ---------------------------------------------------------------------------------------------------------------------
# Layers that a device_map has put on the disk, or on the CPU beside a GPU: accelerate lends them their weights


@contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """With the weights of a module, which may be offloaded, on the device where it runs."""
    with ExitStack() as stack:
        for part in _offloaded(module).values():
            stack.enter_context(align_module_device(part))
        yield


def device_of(module: nn.Module) -> torch.device:
    """Where a module runs, which may be offloaded."""
    for part in _offloaded(module).values():
        return torch.device(part._hf_hook.execution_device)
    return next(module.parameters()).device


def keep_present(side_branch: nn.Module, new: Collection[str]) -> torch.device | None:
    """Bring an offloaded side branch to where it runs, for good: it is small, and is to be trained and saved.

    Args:
        new: names of its weights that were in no file, and so lie nowhere; their values are undefined afterwards.

    Returns:
        Where it is now, or None if it was not offloaded.
    """
    parts = _offloaded(side_branch)
    if not parts:
        return None
    device = device_of(side_branch)
    for path, part in parts.items():
        names = [name for name, _ in part.named_parameters(recurse=False)]
        if known := not any(f"{path}.{name}".lstrip(".") in new for name in names):
            with present(part):
                weights = {name: weight.detach().clone() for name, weight in part.named_parameters(recurse=False)}
        part._hf_hook.offload = False  # so that removing it moves nothing
        remove_hook_from_module(part)
        part.to_empty(device=device, recurse=False)
        if known:
            part.load_state_dict(weights, strict=False)
    return device


def _offloaded(module: nn.Module) -> dict[str, nn.Module]:
    """The parts of a module whose own weights are offloaded, by their paths."""
    if has_offloaded_params is None:
        return {}
    return {path: part for path, part in module.named_modules() if has_offloaded_params(part)}
