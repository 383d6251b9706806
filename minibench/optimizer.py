"""Muon for the matrices inside the layers, AdamW for the rest, behind the face of one optimizer.

Muon (https://kellerjordan.github.io/posts/muon/) orthogonalises the step of a matrix; embeddings, the output head,
biases and norms are no such matrices and keep AdamW. One object with one list of parameter groups is what `Trainer`
schedules, saves and resumes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer


class MuonWithAdamW(Optimizer):
    """Steps `torch.optim.Muon` and `torch.optim.AdamW` together.

    Args:
        model: whose trainable parameters are optimised; `is_hidden_matrix` says which of them Muon takes.
        muon_lr: peak learning rate of the hidden matrices.
        adamw_lr: peak learning rate of everything else.
        weight_decay: of the hidden matrices.
    """

    def __init__(self, model: nn.Module, muon_lr: float, adamw_lr: float, weight_decay: float = 0.01) -> None:
        named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
        super().__init__([weight for _, weight in named], {})
        matrices = [weight for name, weight in named if is_hidden_matrix(name, weight)]
        others = [weight for name, weight in named if not is_hidden_matrix(name, weight)]
        self.parts = [
            Muon(matrices, lr=muon_lr, weight_decay=weight_decay),
            AdamW(others, lr=adamw_lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self._share_groups()

    def _share_groups(self) -> None:
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = closure() if closure is not None else None
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()


def is_hidden_matrix(name: str, weight: torch.Tensor) -> bool:
    """Whether a parameter is a matrix between hidden states: neither an embedding, nor a head, nor a vector."""
    return weight.ndim == 2 and "embed" not in name and "head" not in name
