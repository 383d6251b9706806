"""The work of `dpvr.benchmarks.unlike`: features, criterion, and the share of each kind of picture that it flags."""

import random
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from sklearn.covariance import LedoitWolf
from tqdm import tqdm

from dpvr.data.pictures import open_picture
from dpvr.inference.loading import load
from dpvr.inference.unlike import Criterion, features_of, fingerprint
from minibench.scenes import SIDE, draw_scene

SEED = 7
FALSE_ALARMS = 0.01  # of the validation pictures, which sets the threshold
PACKAGES = {  # folders of photographs and drawings
    "sklearn": "datasets/images",
    "matplotlib": "mpl-data/sample_data",
    "gradio": "media_assets/images",
    "skimage": "data",
}
Drawing = Callable[[random.Random], Image.Image]


def measure(model_name: str, pictures: int, drawn: int, criterion_path: Path) -> dict[str, Any]:
    """Make and save the criterion; return its error rates."""
    model, processor = load(model_name)

    def features(found: list[Image.Image]) -> torch.Tensor:
        return features_of(model, processor, found)

    train, validation, test = (
        features(_scenes(split, pictures)) for split in tqdm(("train", "validation", "test"), desc="MiniBench")
    )
    estimate = LedoitWolf().fit(train.numpy().astype(np.float64))
    criterion = Criterion(
        torch.from_numpy(estimate.location_), torch.from_numpy(estimate.precision_), 0.0, fingerprint(model)
    )
    criterion.threshold = torch.quantile(criterion.distances(validation), 1 - FALSE_ALARMS).item()
    criterion.save(criterion_path)
    return {
        "pictures_of_each_split": pictures,
        "seed": SEED,
        "features": "mean of the vision tower's last states",
        "threshold": criterion.threshold,
        "false_alarms": {"validation": _share(criterion, validation), "test": _share(criterion, test)},
        **_others(lambda found: criterion.are_unlike(features(found)), drawn),
    }


def _others(are_unlike: Callable[[list[Image.Image]], list[bool]], drawn: int) -> dict[str, Any]:
    """The share of each kind of other pictures that is told apart, and the packages' pictures that are missed."""
    packaged = {f"package {name}/{file}": picture for name in PACKAGES for file, picture in _of_package(name).items()}
    flagged = dict(zip(packaged, are_unlike([*packaged.values()]), strict=True))
    rng = random.Random(SEED)
    made = {name: are_unlike([draw(rng) for _ in range(drawn)]) for name, draw in DRAWINGS.items()}
    quarters = are_unlike([part for picture in packaged.values() for part in _quarters(picture)])
    kinds = {"photographs and drawings of packages": [*flagged.values()], **made, "quarters of photographs": quarters}
    return {
        "told_apart": {name: {"share": float(np.mean(each)), "pictures": len(each)} for name, each in kinds.items()},
        "missed": sorted(name for name, is_unlike in flagged.items() if not is_unlike),
    }


def _share(criterion: Criterion, features: torch.Tensor) -> float:
    return float(np.mean(criterion.are_unlike(features)))


def _scenes(split: str, number: int) -> list[Image.Image]:
    return [draw_scene(split, random.Random(f"unlike/{split}/{index}")).draw() for index in range(number)]


def _of_package(name: str) -> dict[str, Image.Image]:
    """The pictures that lie in a package, by their files' names; none if it is not installed."""
    spec = find_spec(name)
    found = {}
    if spec is not None and spec.submodule_search_locations:
        for path in sorted(Path(spec.submodule_search_locations[0], PACKAGES[name]).iterdir()):
            try:
                found[path.name] = open_picture(path)
            except ValueError:  # data of another kind
                continue
    return found


def _quarters(picture: Image.Image) -> list[Image.Image]:
    """The four corners of a picture, each half as wide and high."""
    width, height = picture.width // 2, picture.height // 2
    corners = [(x, y) for x in (0, picture.width - width) for y in (0, picture.height - height)]
    return [picture.crop((x, y, x + width, y + height)) for x, y in corners]


def _noise(rng: random.Random) -> Image.Image:
    return Image.frombytes("RGB", (SIDE, SIDE), rng.randbytes(3 * SIDE * SIDE))


def _colour(rng: random.Random) -> Image.Image:
    return Image.new("RGB", (SIDE, SIDE), _random_colour(rng))


def _text(rng: random.Random) -> Image.Image:
    page = Image.new("RGB", (SIDE, SIDE), "white")
    lines = ("".join(rng.choice("abcdefghij klmnop qrstu vwxyz") for _ in range(16)) for _ in range(7))
    ImageDraw.Draw(page).multiline_text((3, 3), "\n".join(lines), fill="black", spacing=2)
    return page


def _chart(rng: random.Random) -> Image.Image:
    page = Image.new("RGB", (SIDE, SIDE), "white")
    pen = ImageDraw.Draw(page)
    for index in range(6):
        pen.rectangle((8 + 14 * index, rng.randint(10, 80), 17 + 14 * index, 90), fill=_random_colour(rng))
    pen.line((4, 90, 92, 90), fill="black")
    return page


def _random_colour(rng: random.Random) -> tuple[int, int, int]:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def _swapped(rng: random.Random) -> Image.Image:
    return Image.merge("RGB", draw_scene("test", rng).draw().split()[::-1])


DRAWINGS: dict[str, Drawing] = {
    "noise": _noise,
    "one colour": _colour,
    "lines of text": _text,
    "bar charts": _chart,
    "MiniBench with red and blue exchanged": _swapped,
}
