"""Pretraining of the vision tower, in place of CLIP's: every patch names the object that covers it.

    picture -> CLIP ViT -> hidden state of the layer LLaVA reads --+-- per patch: colour, shape, digit, place (or none)
                                                                   +-- projector -> the sum of these words' embeddings

LLaVA starts from a pretrained tower, and so does this model. The heads are discarded afterwards. Then the projector is
aligned with the word embeddings, as in LLaVA's first stage.
"""

import random

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionModel, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.llava.modeling_llava import LlavaModel

from minibench.scenes import COLOURS, PLACES, SHAPES, SIDE, Scene, Shape, Split, make_scene, warped

NAMES = (
    ("none", *COLOURS),
    ("none", *SHAPES),
    ("none", *(str(digit) for digit in range(10))),
    ("none", *PLACES),
    ("none", "thing"),  # one patch per object: to count objects, count these tokens
)
BACKGROUND_WEIGHT = 0.1


class PatchNamer(nn.Module):
    """A vision tower with one linear head per row of `NAMES` on the layer that LLaVA reads."""

    def __init__(self, tower: CLIPVisionModel, layer: int) -> None:
        super().__init__()
        self.tower = tower
        self.layer = layer
        self.heads = nn.Linear(tower.config.hidden_size, sum(len(names) for names in NAMES))

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the loss and the logits for pixels `float[B, 3, H, W]` and labels `int[B, patches, len(NAMES)]`."""
        hidden = patch_states(self.tower, self.layer, pixel_values)
        logits = self.heads(hidden).float().split([len(names) for names in NAMES], dim=-1)
        losses = []
        for head, target in zip(logits, labels.unbind(-1), strict=True):
            weight = torch.ones(head.shape[-1], device=head.device)
            weight[0] = BACKGROUND_WEIGHT
            losses.append(F.cross_entropy(head.flatten(0, 1), target.flatten(), weight))
        return {"loss": torch.stack(losses).sum(), "logits": torch.cat([head.argmax(-1, True) for head in logits], -1)}


def patch_states(tower: CLIPVisionModel, layer: int, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return `float[B, patches, D]`, what LLaVA reads: a layer's hidden states without the class token."""
    return tower(pixel_values, output_hidden_states=True).hidden_states[layer][:, 1:]


class Aligner(nn.Module):
    """A LLaVA's projector, trained to turn each patch into the sum of the embeddings of its names, less their mean.

    Args:
        llava: whose tower, embeddings and projector these are; the projector alone is trained.
        word_ids: int64[names, tokens], the tokens of every name of `NAMES` in order, padded with -1; none for "none".
    """

    def __init__(self, llava: LlavaModel, word_ids: torch.Tensor) -> None:
        super().__init__()
        llava.requires_grad_(False)
        self.projector = llava.multi_modal_projector.requires_grad_(True)
        self.tower, self.layer = llava.vision_tower, llava.config.vision_feature_layer
        embeddings = llava.get_input_embeddings().weight.detach()
        word_ids = word_ids.to(embeddings.device)
        used = word_ids >= 0
        centred = embeddings - embeddings[word_ids[used].unique()].mean(0)
        names = (centred[word_ids.clamp(min=0)] * used[..., None]).sum(1)
        self.register_buffer("names", names, persistent=False)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the mean squared error, and the projected patches."""
        projected = self.projector(patch_states(self.tower, self.layer, pixel_values))
        tables = self.names.split([len(names) for names in NAMES])
        target = sum(table[names] for table, names in zip(tables, labels.unbind(-1), strict=True))
        error = (projected - target).pow(2).sum(-1)
        weight = torch.where(labels.any(-1), 1.0, BACKGROUND_WEIGHT)
        return {"loss": (weight * error).sum() / weight.sum(), "logits": projected}


class PatchNames:
    """A map-style data set of scenes whose digits are warped at random; `PatchCollator` makes batches of it."""

    def __init__(self, split: Split, size: int, seed: int = 0) -> None:
        self.split = split
        self.size = size
        self.seed = seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Scene:
        scene = make_scene(self.split, self.seed, index)
        return warped(scene, random.Random(f"warps/{self.seed}/{index}"))


class PatchCollator:
    """Turns scenes into batches for `PatchNamer` and `Aligner`."""

    def __init__(self, image_processor: BaseImageProcessor, patch: int) -> None:
        self.image_processor = image_processor
        self.patch = patch

    def __call__(self, scenes: list[Scene]) -> dict[str, torch.Tensor]:
        pixels = self.image_processor([scene.draw() for scene in scenes], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.stack([patch_labels(scene, self.patch) for scene in scenes])}


def word_ids(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Return the tokens of every name, as `Aligner` takes them."""
    words = [word for names in NAMES for word in names]
    tokens = [[] if word == "none" else tokenizer.encode(f" {word}", add_special_tokens=False) for word in words]
    longest = max(map(len, tokens))
    return torch.tensor([ids + [-1] * (longest - len(ids)) for ids in tokens])


def patch_labels(scene: Scene, patch: int) -> torch.Tensor:
    """Return `int[patches, len(NAMES)]`, in raster order: the topmost object at the centre of each patch, 0 for none.

    One patch of every object is a "thing": the one at the centre of the object's place.
    """
    centres = torch.arange(SIDE // patch) * patch + patch / 2
    labels = torch.zeros(len(centres), len(centres), len(NAMES), dtype=torch.long)
    for thing in scene.from_back_to_front:
        (x, y), half = thing.centre, thing.size / 2
        covered = ((centres - y).abs() <= half)[:, None] & ((centres - x).abs() <= half)[None, :]
        if isinstance(thing, Shape):
            words = (thing.colour, thing.shape, "none", thing.place, "none")
        else:
            words = ("none", "none", str(thing.digit), thing.place, "none")
        labels[covered] = torch.tensor([names.index(word) for names, word in zip(NAMES, words, strict=True)])
    for thing in scene.objects:
        row, column = (
            (SIDE // 3 * position + SIDE // 6) // patch for position in divmod(PLACES.index(thing.place), 3)
        )
        labels[row, column, -1] = NAMES[-1].index("thing")
    return labels.flatten(0, 1)
