"""A tuned lens: the prediction that a layer's states give after an affine map into the last layer's space.

    states after layer l (N, D)  -->  h + W_l h + b_l  -->  norm, head  -->  KL to the final distribution

The logit lens (saturation.py) applies the last layer's norm and head to a middle layer. If the basis of the residual
stream changes with depth, its KL is large even where the prediction is made already. A map per layer, trained to lower
that KL, corrects for the basis. Belrose et al., Eliciting Latent Predictions from Transformers with the Tuned Lens,
https://arxiv.org/abs/2303.08112.

Axes: B batch, T tokens, N tokens of a chunk, D width, L layers.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from dpvr.analysis.saturation import ProbeBatch, kl_divergence, log_probabilities
from dpvr.data.prompts import Batch

LEARNING_RATE = 1e-3
CHUNK = 128  # tokens whose logits are in memory at a time


class TunedLens(nn.Module):
    """A map for every layer but the last, whose prediction is the final one; each is the identity before training."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, layer: int, states: torch.Tensor) -> torch.Tensor:
        """Map states (..., D) after a layer to the last layer's space; computed in float32."""
        if layer == len(self.maps):
            return states
        held = states.to(self.maps[layer].weight.dtype)
        return (held + self.maps[layer](held)).to(states.dtype)

    @classmethod
    def fit(cls, model: PreTrainedModel, batches: Iterable[Batch], num_batches: int) -> "TunedLens":
        """Train the maps by Adam, a step per batch, on all tokens of its prompts; the model is not changed.

        Args:
            batches: as `saturation.measure` takes them, `num_batches` of them.

        Raises:
            ValueError: if there are fewer.
        """
        text = model.config.get_text_config()
        lens = cls(text.num_hidden_layers, text.hidden_size).to(model.device)
        optimizer = torch.optim.Adam(lens.parameters(), lr=LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=num_batches)
        for inputs, labels in tqdm(batches, total=num_batches, desc="Tuned lens", unit="batch"):
            with torch.no_grad():
                batch = ProbeBatch(model, inputs, labels)
                final, hidden = batch.vanilla()[batch.valid], batch.embeds
            for index in range(len(lens.maps)):
                with torch.no_grad():
                    hidden = batch.joint(index, hidden)
                lens._add_gradient(batch, index, hidden[batch.valid], final)
            torch.nn.utils.clip_grad_norm_(lens.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if schedule.last_epoch < num_batches:
            raise ValueError(
                f"There are {schedule.last_epoch} batches to train the tuned lens on, and {num_batches} are needed: "
                "lower --tuned_lens, or give more rows."
            )
        return lens.requires_grad_(False)

    def _add_gradient(self, batch: ProbeBatch, layer: int, states: torch.Tensor, final: torch.Tensor) -> None:
        """Add to the gradient of a layer's map, chunk by chunk; the model's weights get none."""
        for part, goal in zip(states.split(CHUNK), final.split(CHUNK), strict=True):
            with torch.no_grad():
                expected = log_probabilities(batch, goal)
            loss = kl_divergence(expected, log_probabilities(batch, self(layer, part))).sum() / len(states)
            parameters = list(self.maps[layer].parameters())
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def save(self, path: Path, settings: dict[str, str]) -> None:
        """Write the maps, and what they were trained with."""
        save_file({name: tensor.cpu() for name, tensor in self.state_dict().items()}, path, metadata=settings)

    @classmethod
    def load(cls, path: Path, settings: dict[str, str], device: str | torch.device) -> "TunedLens | None":
        """The maps in a file, or None if there is none, or they were trained with other settings."""
        if not path.exists():
            return None
        with safe_open(path, "pt") as file:
            if file.metadata() != settings:
                return None
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        lens = cls(len(weights) // 2 + 1, weights["maps.0.bias"].shape[0])
        lens.load_state_dict(weights)
        return lens.requires_grad_(False).to(device)
