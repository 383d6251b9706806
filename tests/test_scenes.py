"""minibench/scenes.py: what is drawn, the habits of its world, and that the splits share nothing."""

import random
from collections import Counter, defaultdict

import numpy as np
import pytest
from lines import ONCE

from minibench.scenes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    POPULAR,
    SHAPES,
    SIDE,
    Scene,
    Shape,
    companion,
    digit_indices,
    digit_mask,
    draw_scene_with_repeats,
    make_scene,
    shape_mask,
    warped,
)

pytestmark = ONCE
SPLITS = ("train", "validation", "test")
PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_scene("train", 0, index) for index in range(20_000)]


def owners(scene: Scene) -> tuple[np.ndarray, list[int]]:
    """Which object is on top at each pixel (-1: none), and how many pixels each would cover by itself."""
    canvas, areas = np.full((SIDE, SIDE), -1), [0] * len(scene.objects)
    for index in scene.drawing_order:
        thing = scene.objects[index]
        is_shape = isinstance(thing, Shape)
        draw = (shape_mask, thing.shape) if is_shape else (digit_mask, thing.index)
        ink = np.asarray(draw[0](draw[1], thing.size, thing.tilt)) > 127
        x, y = (centre - thing.size // 2 for centre in thing.centre)
        canvas[y : y + thing.size, x : x + thing.size][ink] = index
        areas[index] = int(ink.sum())
    return canvas, areas


# Seeds and splits


def test_a_scene_and_its_picture_are_the_same_for_the_same_seed():
    first, again = make_scene("train", 3, 5), make_scene("train", 3, 5)
    assert first == again
    assert np.array_equal(first.draw(), again.draw())
    assert first.draw().size == (SIDE, SIDE) and first.draw().mode == "RGB"


def test_seeds_indices_and_splits_give_other_scenes():
    scenes = [make_scene(split, seed, index) for split in SPLITS for seed in range(3) for index in range(50)]
    assert len(set(scenes)) == len(scenes)


def test_splits_share_no_handwritten_digit():
    used = {split: {scan for scans in digit_indices(split) for scan in scans} for split in SPLITS}
    assert not used["train"] & used["test"] and not used["train"] & used["validation"]
    assert not used["validation"] & used["test"]
    assert sum(map(len, used.values())) == 1797


@pytest.mark.parametrize("split", SPLITS)
def test_drawn_digits_come_from_their_own_split_and_show_their_number(split):
    scans = digit_indices(split)
    for index in range(300):
        assert all(thing.index in scans[thing.digit] for thing in make_scene(split, 0, index).digits)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="no split 'dev': choose one of train, validation, test"):
        make_scene("dev", 0, 0)


# Contents


def test_three_to_six_objects_of_which_one_to_four_are_digits_and_one_a_shape_at_least(scenes):
    for scene in scenes:
        assert len(scene.objects) == len(scene.shapes) + len(scene.digits)
        assert 3 <= len(scene.objects) <= 6 and 1 <= len(scene.digits) <= 4 and scene.shapes
    assert {len(scene.objects) for scene in scenes} == {3, 4, 5, 6}
    assert {len(scene.digits) for scene in scenes} == {1, 2, 3, 4}


def test_objects_stand_in_reading_order_at_different_places_inside_the_picture(scenes):
    for scene in scenes[:1000]:
        order = [PLACES.index(thing.place) for thing in scene.objects]
        assert order == sorted(set(order))
        for place, thing in zip(order, scene.objects, strict=True):
            x, y = thing.centre
            assert (y // (SIDE // 3), x // (SIDE // 3)) == divmod(place, 3)
            assert all(thing.size // 2 <= centre <= SIDE - (thing.size - thing.size // 2) for centre in thing.centre)


def test_some_objects_overlap_and_each_is_still_mostly_visible(scenes):
    least_visible = []
    for scene in scenes[:1500]:
        canvas, areas = owners(scene)
        least_visible.append(min((canvas == index).sum() / area for index, area in enumerate(areas)))
    assert min(least_visible) > 0.6
    assert np.quantile(least_visible, 0.01) > 0.75
    assert 0.2 < np.mean(np.array(least_visible) < 1) < 0.6


def test_shapes_show_their_colour_and_digits_stand_out_from_the_background(scenes):
    for scene in scenes[:300]:
        pixels, (canvas, _) = np.asarray(scene.draw(), dtype=int), owners(scene)
        for index, thing in enumerate(scene.objects):
            seen = np.median(pixels[canvas == index], axis=0)
            if isinstance(thing, Shape):
                assert abs(seen - COLOURS[thing.colour]).max() < 12
            else:
                assert min(abs(seen - np.median(pixels[canvas == -1], axis=0))) > 100


def test_backgrounds_are_plain_and_textured_light_and_dark(scenes):
    kinds = Counter()
    for scene in scenes[:500]:
        pixels = scene.background.draw()
        assert not 90 < np.median(pixels) < 140
        texture = "plain" if pixels.min() == pixels.max() else scene.background.texture
        assert texture == "plain" or scene.background.texture != "plain"
        kinds[texture, "light" if np.median(pixels) > 127 else "dark"] += 1
    assert set(kinds) == {(texture, tone) for texture in BACKGROUNDS for tone in ("light", "dark")}
    assert min(kinds.values()) > 20


# Habits


def test_a_popular_pair_is_two_to_three_times_as_frequent_as_another_one(scenes):
    counts = Counter((thing.colour, thing.shape) for scene in scenes for thing in scene.shapes)
    assert len(counts) == len(PAIRS) and len(POPULAR) == 6
    others = [counts[pair] for pair in PAIRS if pair not in POPULAR]
    assert min(counts[pair] for pair in POPULAR) > 1.5 * max(others)
    assert 2 < np.mean([counts[pair] for pair in POPULAR]) / np.mean(others) < 3


def test_a_shapes_companion_is_the_pair_that_most_often_goes_with_it(scenes):
    """Apart from the pair whose companion it is itself: keeping company is mutual."""
    together = defaultdict(Counter)
    for scene in scenes:
        pairs = {(thing.colour, thing.shape) for thing in scene.shapes}
        for pair in pairs:
            together[pair].update(pairs - {pair})
    for pair in PAIRS:
        rivals = [other for other in PAIRS if other != pair and companion(*other) != pair]
        assert max(rivals, key=lambda other, pair=pair: together[pair][other]) == companion(*pair)


def test_scenes_with_repeats_have_something_to_count():
    most = []
    for seed in range(60):
        scene = draw_scene_with_repeats("train", random.Random(seed))
        words = [word for thing in scene.shapes for word in (thing.colour, thing.shape)]
        most.append(max(map(words.count, words)))
    assert min(most) == 2 and 20 < sum(number > 2 for number in most) < 50


def test_other_handwriting_changes_the_digits_and_nothing_else():
    for index in range(20):
        scene = make_scene("train", 1, index)
        other = warped(scene, random.Random(index))
        assert [thing.name for thing in other.objects] == [thing.name for thing in scene.objects]
        assert other.shapes == scene.shapes and other.background == scene.background
        difference = np.abs(np.asarray(scene.draw(), dtype=int) - np.asarray(other.draw(), dtype=int)).max(axis=-1)
        elsewhere = difference.copy()
        for thing in scene.digits:
            x, y, half = *thing.centre, thing.size // 2 + 1
            box = difference[max(0, y - half) : y + half, max(0, x - half) : x + half]
            assert box.max() > 0
            elsewhere[max(0, y - half) : y + half, max(0, x - half) : x + half] = 0
        assert elsewhere.max() == 0
