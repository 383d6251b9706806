"""Muon for the matrices inside the layers, AdamW for the rest, in one optimizer.

Muon (https://kellerjordan.github.io/posts/muon/) orthogonalises the update of a matrix. Embeddings, the output head,
biases and norms are not matrices between hidden states, so AdamW updates them. `Trainer` schedules, saves and resumes
one optimizer with one list of parameter groups, so the two are one object.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

MUON_LR, ADAMW_LR = 0.02, 2e-3  # peak learning rates
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


class Muon(Optimizer):
    """`torch.optim.Muon` in float32, with matrices of one shape orthogonalised together.

    PyTorch's own computes in bfloat16, which a CPU without bfloat16 emulates, hundreds of times slower.
    """

    def __init__(
        self, weights: list[torch.Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(weights, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            updates: dict[torch.Size, list[tuple[torch.Tensor, torch.Tensor]]] = {}
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                average = state["momentum_buffer"].lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(average, group["momentum"])  # Nesterov's
                updates.setdefault(weight.shape, []).append((weight, update))
            for (rows, columns), same in updates.items():
                weights, steps = zip(*same, strict=True)
                scale = group["lr"] * max(1, rows / columns) ** 0.5
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, orthogonalised(torch.stack(steps)).unbind(), alpha=-scale)
        return loss


def orthogonalised(matrices: torch.Tensor, eps: float = 1e-7) -> torch.Tensor:
    """Return for `float[N, R, C]` the nearest semi-orthogonal matrices, roughly: singular values of about 1.

    Newton-Schulz iteration with the coefficients of https://kellerjordan.github.io/posts/muon/.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class MuonWithAdamW(Optimizer):
    """Steps `Muon` and `torch.optim.AdamW` together.

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
