"""minibench/data.py, files.py and export.py: rows, and the same rows as files."""

import json
import subprocess
import sys

import numpy as np
import pytest
import transformers
from datasets import load_dataset
from packaging.version import Version
from PIL import Image

from minibench import export
from minibench.data import MiniBench, Row, to_hf_dataset
from minibench.scenes import SIDE
from minibench.tasks import LETTERS

NUM_ROWS, PER_ROW, SEED = 12, 4, 2


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Some of one picture, some of two."""
    rows = list(MiniBench("validation", NUM_ROWS, PER_ROW, SEED))
    assert {len(row["images"]) for row in rows} == {1, 2}
    return rows


@pytest.fixture
def write(tmp_path):
    """Exports the rows in a form and returns the folder."""

    def run(form: str):
        args = f"--output_dir {tmp_path / form} --format {form} --split validation --size {NUM_ROWS}"
        export.main(export.parse_args(f"{args} --questions_per_row {PER_ROW} --seed {SEED}".split()))
        return tmp_path / form

    return run


def texts(row: Row) -> list[str]:
    return [message["content"][-1]["text"] for message in row["messages"]]


def is_same(picture: Image.Image, other: Image.Image) -> bool:
    return np.array_equal(np.asarray(picture), np.asarray(other))


# Rows


def test_rows_are_in_the_vision_format_of_trl(rows):
    for row in rows:
        assert {image.size for image in row["images"]} == {(SIDE, SIDE)}
        turns = len(row["messages"]) // 2
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * turns
        types = [[part["type"] for part in message["content"]] for message in row["messages"]]
        assert types == [["image"] * len(row["images"]) + ["text"], *[["text"]] * (2 * turns - 1)]


def test_every_row_has_a_question_even_where_its_first_scenes_allow_none():
    row = MiniBench("train", 1200, questions_per_row=1, seed=2)[971]
    assert len(row["messages"]) >= 2


def test_rows_are_the_same_when_read_again_and_end_with_the_data_set(rows):
    again = MiniBench("validation", NUM_ROWS, PER_ROW, SEED)
    assert len(list(again)) == len(again) == NUM_ROWS
    for row, index in zip(rows, range(NUM_ROWS), strict=True):
        assert again[index]["messages"] == row["messages"]
        assert all(map(is_same, again[index]["images"], row["images"]))
    for other in (MiniBench("validation", NUM_ROWS, PER_ROW, SEED + 1), MiniBench("train", NUM_ROWS, PER_ROW, SEED)):
        assert texts(other[0]) != texts(rows[0])


def test_the_questions_of_a_row_are_all_different_and_as_many_as_asked_for():
    counts = {1: [], 2: []}
    for row in MiniBench("train", 200, 7):
        questions = texts(row)[::2]
        assert len(set(questions)) == len(questions)
        counts[len(row["images"])].append(len(questions))
    assert 7.5 < np.mean(counts[1]) < 9.5  # seven, and the free ones before some of them
    assert 5.5 < np.mean(counts[2]) <= max(counts[2]) == 7


def test_a_row_of_few_questions_draws_from_all_tasks():
    asked = [texts(row)[-2] for row in MiniBench("train", 100, 1)]
    assert any(text.startswith("Is there") for text in asked) and any("Rules" in text for text in asked)
    assert any(not text.isascii() for text in asked)


def test_rows_ask_with_letters_words_and_in_chinese_but_compare_only_two_pictures():
    for row in MiniBench("train", 60, 7):
        questions, answers = texts(row)[::2], texts(row)[1::2]
        compares = [question.startswith(("Same or different", "Which picture")) for question in questions]
        assert all(compares) if len(row["images"]) == 2 else not any(compares)
        if len(row["images"]) == 1:
            assert {"yes", "no"} & set(answers) and set(LETTERS) & {answer.split()[-1] for answer in answers}
            assert not all(question.isascii() for question in questions)


# Files


def test_the_hub_data_set_holds_the_same_rows(rows):
    table = to_hf_dataset("validation", NUM_ROWS, PER_ROW, SEED)
    assert table.column_names == ["images", "messages"]
    for row, record in zip(rows, table, strict=True):
        assert all(map(is_same, row["images"], record["images"])) and texts(record) == texts(row)


def test_the_exported_folder_loads_as_a_data_set_of_the_same_rows(rows, write, tmp_path):
    folder = write("datasets")
    assert [path.name for path in folder.rglob("*.*")] == ["validation-00000-of-00001.parquet"]
    folder = folder.rename(tmp_path / "moved")
    loaded = load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == ["validation"]
    assert loaded["validation"].features == to_hf_dataset("validation", 1).features
    for row, record in zip(rows, loaded["validation"], strict=True):
        assert len(row["images"]) == len(record["images"]) and all(map(is_same, row["images"], record["images"]))
        assert texts(record) == texts(row)
        assert [[part["type"] for part in message["content"]] for message in record["messages"]] == [
            [part["type"] for part in message["content"]] for message in row["messages"]
        ]


def test_the_llava_json_holds_the_same_rows(rows, write):
    folder = write("llava")
    records = json.loads((folder / "validation.json").read_text(encoding="utf-8"))
    assert len({record["id"] for record in records}) == NUM_ROWS
    written = []
    for row, record in zip(rows, records, strict=True):
        names = record["image"] if len(row["images"]) > 1 else [record["image"]]
        pictures = [Image.open(folder / name) for name in names]
        assert len(names) == len(row["images"]) and all(map(is_same, pictures, row["images"]))
        assert {picture.format for picture in pictures} == {"PNG"}
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        first, *others = texts(row)
        assert [turn["value"] for turn in turns] == ["<image>\n" * len(names) + first, *others]
        written += names
    assert sorted(written) == sorted(f"images/{path.name}" for path in (folder / "images").iterdir())


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"), reason="TRL's loss on replies needs transformers 5.18"
)
def test_trls_trainer_takes_the_exported_folder_as_it_is(write, minibench_processor, tmp_path):
    from trl import SFTConfig, SFTTrainer

    from dpvr.pretraining.model import make_model
    from dpvr.pretraining.train import parse_args

    size = "--output_dir x --text_layers 2 --text_width 64 --vision_layers 2 --vision_width 32"
    model = make_model(minibench_processor, parse_args(size.split()))
    model.set_attn_implementation("sdpa")
    rows = load_dataset(str(write("datasets")), cache_dir=str(tmp_path / "cache"))["validation"]
    settings = {"max_steps": 2, "per_device_train_batch_size": 6, "learning_rate": 1e-2, "logging_steps": 1}
    settings |= {"assistant_only_loss": True, "max_length": None, "bf16": False, "use_cpu": True, "report_to": []}
    config = SFTConfig(str(tmp_path / "out"), **settings, save_strategy="no")
    trainer = SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=minibench_processor)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(np.isfinite(losses))


@pytest.mark.parametrize("form", ["datasets", "llava"])
def test_a_folder_that_holds_something_is_refused_and_left_alone(form, write, tmp_path):
    (tmp_path / form).mkdir()
    (tmp_path / form / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=f"--output_dir .*{form} is not empty: name another folder"):
        write(form)
    assert [path.name for path in (tmp_path / form).iterdir()] == ["mine.txt"]


def test_an_empty_folder_is_taken_and_the_closing_line_says_what_is_where(write, tmp_path, capsys):
    (tmp_path / "llava").mkdir()
    folder = write("llava")
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"12 rows of the validation split, seed 2, written to {folder / 'validation.json'}"


def test_an_export_of_no_rows_is_refused(tmp_path):
    args = export.parse_args(f"--output_dir {tmp_path} --format llava --split test --size 0".split())
    with pytest.raises(ValueError, match="--size is 0: ask for at least 1"):
        export.main(args)


def python(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True)


def test_a_users_error_is_one_line_and_exit_status_2(tmp_path):
    command = ["-m", "minibench.export", "--output_dir", str(tmp_path / "out"), "--format", "llava", "--split", "test"]
    for options, message in ((["--size", "0"], "ask for at least 1"), (["--sise", "3"], "--size")):
        found = python(*command, *options)
        (line,) = found.stderr.splitlines()
        assert found.returncode == 2 and message in line
    assert not (tmp_path / "out").exists()
