"""unlike.py and dpvr.benchmarks.unlike: pictures that dpvr-mini was not trained on are told apart."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from dpvr.benchmarks.unlike import main, parse_args
from dpvr.inference.chat import Answerer
from dpvr.inference.loading import load
from dpvr.inference.unlike import CRITERION, Criterion, warning
from minibench.scenes import make_scene

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def mini() -> Answerer:
    return Answerer(*load(str(ROOT)))


def test_photographs_are_told_from_pictures_of_the_benchmark(mini):
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    scenes = [make_scene("test", 0, index).draw() for index in range(20)]
    found = mini.unlike([*photographs, *scenes])
    assert found[:2] == [True, True] and sum(found[2:]) <= 1
    assert mini.unlike([]) == []


def test_a_model_with_another_tower_has_no_criterion(random_mini):
    answerer = Answerer(*load(random_mini))
    assert answerer.criterion is None and answerer.unlike([make_scene("test", 0, 0).draw()]) == []


def test_the_warning_names_the_pictures():
    assert warning([]) is None and warning([False, False]) is None
    assert warning([True]).startswith("This picture is unlike")
    assert warning([False, True]).startswith("Picture 2 is unlike")
    assert warning([True, False, True]).startswith("Pictures 1, 3 are unlike")


def test_the_distance_is_that_of_mahalanobis():
    mean, precision = torch.tensor([1.0, 2.0]), torch.tensor([[4.0, 0.0], [0.0, 1.0]])
    criterion = Criterion(mean, precision, threshold=2.5, tower="")
    points = torch.tensor([[1.0, 2.0], [2.0, 2.0], [1.0, 5.0]])
    assert criterion.distances(points).tolist() == [0, 2, 3] and criterion.are_unlike(points) == [False, False, True]


def test_the_command_makes_a_criterion_and_measures_its_errors(tmp_path):
    main(parse_args(["--pictures", "200", "--drawn", "5", "--output", str(tmp_path)]))
    found = json.loads((tmp_path / "pictures.json").read_text())
    made, kept = Criterion.load(tmp_path / "pictures.safetensors"), Criterion.load(CRITERION)
    assert made.tower == kept.tower and made.threshold == found["threshold"]
    assert 0 < found["false_alarms"]["validation"] <= 0.02 and found["false_alarms"]["test"] < 0.2
    assert found["told_apart"]["noise"] == {"share": 1.0, "pictures": 5}
    assert found["told_apart"]["photographs and drawings of packages"]["pictures"] > 5


def test_the_record_is_of_the_criterion_that_the_chat_reads():
    record = json.loads((CRITERION.with_suffix(".json")).read_text())
    assert record["threshold"] == pytest.approx(Criterion.load().threshold)
