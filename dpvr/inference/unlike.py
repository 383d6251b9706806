"""Whether a picture is unlike those that dpvr-mini was trained on, by what its vision tower makes of it.

    picture --vision tower--> V states --mean--> feature (D,) --Mahalanobis--> distance to the training pictures
                                                                 |
                                             above the threshold of one validation picture in a hundred: unlike

Mean, precision and threshold lie in results/dpvr_mini/pictures.safetensors, for one vision tower alone, whose weights
they name; `python -m dpvr.benchmarks.unlike` makes them and measures the errors (docs/chat.md).

After Lee et al. (2018), arXiv:1807.03888, with one class.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel, ProcessorMixin

CRITERION = Path(__file__).parents[2] / "results" / "dpvr_mini" / "pictures.safetensors"
BATCH = 64
UNLIKE = (
    "{which} unlike those that this model was trained on, small pictures of coloured shapes and handwritten digits: "
    "do not trust this answer."
)


class Criterion:
    """The distance of pictures to the training pictures.

    Args:
        mean: float64 (D,) of the training pictures' features.
        precision: float64 (D, D), the inverse of their covariance.
        threshold: the distance above which a picture is unlike them.
        tower: `fingerprint` of the vision tower that made the features.
    """

    def __init__(self, mean: torch.Tensor, precision: torch.Tensor, threshold: float, tower: str) -> None:
        self.mean, self.precision = mean.double(), precision.double()
        self.threshold, self.tower = threshold, tower

    @classmethod
    def load(cls, path: Path = CRITERION) -> "Criterion":
        with safe_open(path, framework="pt") as file:
            said = file.metadata()
            return cls(
                file.get_tensor("mean"), file.get_tensor("precision"), float(said["threshold"]), said["vision_tower"]
            )

    def save(self, path: Path = CRITERION) -> None:
        said = {"format": "pt", "threshold": repr(self.threshold), "vision_tower": self.tower}
        save_file({"mean": self.mean.float(), "precision": self.precision.float()}, path, said)

    def distances(self, features: torch.Tensor) -> torch.Tensor:
        """Mahalanobis distances (N,) of features (N, D)."""
        apart = features.double().cpu() - self.mean
        return ((apart @ self.precision) * apart).sum(-1).clamp(min=0).sqrt()

    def are_unlike(self, features: torch.Tensor) -> list[bool]:
        return (self.distances(features) > self.threshold).tolist()


@torch.no_grad()
def features_of(model: PreTrainedModel, processor: ProcessorMixin, pictures: Sequence[Image.Image]) -> torch.Tensor:
    """The mean state (N, D) of each picture at the vision tower's last layer; `model` is a LLaVA."""
    found, tower = [], model.model.vision_tower
    for start in range(0, len(pictures), BATCH):
        made = processor.image_processor([*pictures[start : start + BATCH]], return_tensors="pt")
        pixels = made["pixel_values"].to(tower.device, tower.dtype)
        found.append(tower(pixels).last_hidden_state.mean(1).float())  # (B, V, D) -> (B, D)
    return torch.cat(found)


def fingerprint(model: PreTrainedModel) -> str:
    """The SHA-256 of a LLaVA's vision tower."""
    made = hashlib.sha256()
    for weight in model.model.vision_tower.parameters():
        made.update(weight.detach().float().cpu().numpy().tobytes())
    return made.hexdigest()


def criterion_for(model: PreTrainedModel) -> Criterion | None:
    """The criterion for a model's pictures; None where there is none for its vision tower."""
    if model.config.model_type not in ("llava", "dpvr_llava") or not CRITERION.exists():
        return None
    criterion = Criterion.load()
    return criterion if criterion.tower == fingerprint(model) else None


def warning(unlike: Sequence[bool]) -> str | None:
    """The sentence about an answer's pictures; None if all are like the training pictures."""
    if not any(unlike):
        return None
    if len(unlike) == 1:
        return UNLIKE.format(which="This picture is")
    numbers = [str(number) for number, is_unlike in enumerate(unlike, 1) if is_unlike]
    plural = f"Pictures {', '.join(numbers)} are" if len(numbers) > 1 else f"Picture {numbers[0]} is"
    return UNLIKE.format(which=plural)
