"""fit_progress.py: a fit that was killed goes on where it stopped, to the same latent."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpvr.training import fit, fit_progress, fit_run
from dpvr.training.fit_progress import NAME

WORDS = ["--num_samples", "12", "--eval_samples", "4", "--split_layer", "1", "--latent_rank", "8", "--batch_size", "4"]


class Killed(Exception):
    pass


@pytest.fixture
def words(random_mini, monkeypatch):
    monkeypatch.setattr(fit_progress, "SAVE_SECONDS", 0.0)
    return ["--model", random_mini, *WORDS]


def run(words: list[str], folder) -> dict:
    return fit.main(fit.parse_args([*words, "--output_dir", str(folder)]))


def killed(words: list[str], folder, monkeypatch, after: int) -> None:
    """A run that ends after so many batches to fit on."""
    collect, done = fit_progress.collect, []

    def counted(*args):
        if len(done) == after:
            raise Killed
        done.append(None)
        return collect(*args)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(fit_progress, "collect", counted)
        run(words, folder)


@pytest.mark.parametrize("after", [1, 2])
def test_a_killed_fit_goes_on_to_the_same_latent_and_reads_no_row_twice(words, tmp_path, monkeypatch, after):
    undisturbed = run(words, tmp_path / "one")
    killed(words, tmp_path / "two", monkeypatch, after)
    assert (tmp_path / "two" / NAME).exists()
    read, batches = [], fit_run.batches

    def watched(args, processor, first, count, description):
        read.append((description, first, count))
        return batches(args, processor, first, count, description)

    monkeypatch.setattr(fit_run, "batches", watched)
    resumed = run(words, tmp_path / "two")
    assert read[0] == ("Fitting", 4 * after, 12 - 4 * after)
    same = ("explained", "explained_by_rank", "image_tokens_fitted", "kl_to_base")
    assert [resumed[name] for name in same] == [undisturbed[name] for name in same]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert not (tmp_path / "two" / NAME).exists()


def test_more_rows_and_another_rank_go_on_from_the_same_moments(words, tmp_path, monkeypatch):
    killed(words, tmp_path / "one", monkeypatch, after=2)
    more = [*words, "--num_samples", "16", "--latent_rank", "4"]
    resumed, fresh = run(more, tmp_path / "one"), run(more, tmp_path / "two")
    assert resumed["latent_rank"] == 4 and resumed["explained"] == fresh["explained"]


def test_moments_of_another_fit_and_what_is_none_are_refused(words, tmp_path, monkeypatch):
    killed(words, tmp_path, monkeypatch, after=2)
    with pytest.raises(ValueError, match=r"is of another fit \(split_layer 1 there and 0 here\): choose a new"):
        run([*words, "--split_layer", "0"], tmp_path)
    with pytest.raises(ValueError, match="holds 8 rows already, and --num_samples is 4"):
        run([*words, "--num_samples", "4"], tmp_path)
    for content in (b"no moments", None):
        if content is None:
            save_file({"x": torch.ones(1)}, tmp_path / NAME, {"settings": json.dumps([])})
        else:
            (tmp_path / NAME).write_bytes(content)
        with pytest.raises(ValueError, match="is no record of a fit"):
            run(words, tmp_path)
