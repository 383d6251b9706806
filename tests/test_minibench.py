"""MiniBench: the pictures, the questions, the rows, the processor, the evaluation and the training script."""

import json
import random
import shutil
from collections import Counter, defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from minibench import evaluate as evaluation
from minibench.data import MiniBench, evaluation_items, to_hf_dataset, to_messages
from minibench.processor import make_processor, save_processor
from minibench.questions import CAPTION_REQUEST, KINDS, ask, ask_many, caption
from minibench.scenes import COLOURS, PLACES, SHAPES, SIDE, digit_indices, make_scene

SPLITS = ("train", "validation", "test")
IMAGE_TOKENS = 64


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def scenes():
    return [make_scene("test", 0, index) for index in range(3000)]


# Pictures


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


def test_drawn_digits_come_from_their_own_split():
    for split in SPLITS:
        drawn = {thing.index for index in range(300) for thing in make_scene(split, 0, index).digits}
        assert drawn <= {scan for scans in digit_indices(split) for scan in scans}


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'validation'.*got 'dev'"):
        make_scene("dev", 0, 0)


def test_objects_stand_in_reading_order_at_different_places_inside_the_picture(scenes):
    for scene in scenes[:500]:
        order = [PLACES.index(thing.place) for thing in scene.objects]
        assert order == sorted(set(order)) and 2 <= len(order) <= 4
        assert scene.shapes and scene.digits
        for thing in scene.objects:
            cell = [PLACES.index(thing.place) % 3, PLACES.index(thing.place) // 3]
            assert [int(centre // (SIDE / 3)) for centre in thing.centre] == cell
            assert all(thing.size // 2 <= centre <= SIDE - thing.size // 2 for centre in thing.centre)


def test_a_shape_is_drawn_in_its_colour_at_its_place(scenes):
    for scene in scenes[:300]:
        for thing in scene.shapes:
            if thing.shape != "ring":
                assert scene.draw().getpixel(thing.centre) == COLOURS[thing.colour]


# Questions


def test_answers_agree_with_the_scene(scenes):
    rng = random.Random(0)
    for scene in scenes[:1000]:
        things = {thing.place: thing for thing in scene.objects}
        for kind in KINDS:
            question = ask(scene, kind, rng)
            if kind == "existence":
                colour, shape = question.text.rstrip("?").removesuffix(" in the picture").split()[-2:]
                present = any((thing.colour, thing.shape) == (colour, shape) for thing in scene.shapes)
                assert question.answer == ("yes" if present else "no")
            else:
                thing = things[question.text.rstrip("?.").removesuffix(" have").partition(" at the ")[2]]
                truth = thing.digit if kind == "digit" else getattr(thing, question.topic.split()[0])
                assert question.answer == str(truth)


def test_the_caption_names_every_object_at_its_place(scenes):
    for scene in scenes[:200]:
        parts = dict(part.split(": ") for part in caption(scene).split("; "))
        assert parts == {thing.place: thing.name for thing in scene.objects}


def test_answers_are_even_within_each_kind_of_question(scenes):
    answers = defaultdict(Counter)
    for scene in scenes:
        for kind in KINDS:
            question = ask(scene, kind, random.Random(repr((scene, kind))))
            answers[question.topic.split()[0] if kind == "attribute" else kind][question.answer] += 1
    for name, options in {"colour": 7, "shape": 6, "existence": 2, "digit": 10}.items():
        counts = answers[name]
        mean = counts.total() / options
        assert len(counts) == options
        assert max(abs(count - mean) for count in counts.values()) < 4.5 * mean**0.5, (name, counts)


def test_every_pair_is_as_often_present_as_absent_when_asked_for(scenes):
    answers = defaultdict(Counter)
    for number in range(5):
        for index, scene in enumerate(scenes):
            question = ask(scene, "existence", random.Random(f"{number}/{index}"))
            pair = tuple(question.text.rstrip("?").removesuffix(" in the picture").split()[-2:])
            answers[pair][question.answer] += 1
    assert len(answers) == len(COLOURS) * len(SHAPES)
    for pair, counts in answers.items():
        assert abs(counts["yes"] - counts["no"]) < 4.5 * counts.total() ** 0.5, (pair, counts)


def test_the_wording_does_not_tell_the_answer():
    """The best guess from the whole question text does no better than chance does on a sample of this size."""
    votes = defaultdict(Counter)
    for item in evaluation_items("train", 4000, seed=1):
        votes[item.kind, item.question][item.answer] += 1
    hits = defaultdict(list)
    for item in evaluation_items("train", 4000, seed=2):
        guesses = votes[item.kind, item.question].most_common(1)
        hits[item.kind].append(bool(guesses) and guesses[0][0] == item.answer)
    for kind, chance in {"attribute": 0.155, "existence": 0.5, "digit": 0.1}.items():
        assert np.mean(hits[kind]) < chance + 0.03, (kind, np.mean(hits[kind]))


def test_the_questions_of_a_row_have_different_topics(scenes):
    for scene in scenes[:100]:
        topics = [question.topic for question in ask_many(scene, 8, random.Random(0))]
        assert len(set(topics)) == len(topics) == 8


def test_an_unknown_kind_is_refused(scenes):
    with pytest.raises(ValueError, match="got 'counting'"):
        ask(scenes[0], "counting", random.Random(0))


# Rows


def test_rows_are_in_the_vision_format_of_trl():
    row = MiniBench("train", 4, questions_per_row=3)[2]
    assert [image.size for image in row["images"]] == [(SIDE, SIDE)]
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * 3
    types = [[part["type"] for part in message["content"]] for message in row["messages"]]
    assert types == [["image", "text"], ["text"], ["text"], ["text"], ["text"], ["text"]]


def test_rows_are_the_same_when_read_again_and_end_with_the_data_set():
    rows = MiniBench("train", 4)
    assert rows[3]["messages"] == MiniBench("train", 4)[3]["messages"]
    assert len(list(rows)) == len(rows) == 4
    assert rows[0]["messages"] != MiniBench("train", 4, seed=1)[0]["messages"]


def test_the_caption_share_sets_how_many_rows_ask_for_a_caption():
    def captions(share: float) -> int:
        rows = MiniBench("train", 200, 2, caption_share=share)
        return sum(row["messages"][0]["content"][1]["text"] == CAPTION_REQUEST for row in rows)

    assert captions(0.0) == 0 and captions(1.0) == 200 and 60 < captions(0.5) < 140


def test_the_hub_data_set_holds_the_same_rows():
    rows, table = MiniBench("train", 3, 2), to_hf_dataset("train", 3, 2)
    assert table.column_names == ["images", "messages"]
    for row, record in zip(rows, table, strict=True):
        assert np.array_equal(row["images"][0], record["images"][0])
        texts = [message["content"][-1]["text"] for message in record["messages"]]
        assert texts == [message["content"][-1]["text"] for message in row["messages"]]


# Processor


def test_the_template_writes_a_conversation_of_several_turns(processor):
    messages = to_messages([("Is there a red star?", "yes"), ("Where?", None)])
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == "USER: <image>\nIs there a red star? ASSISTANT: yes</s>USER: Where? ASSISTANT:"


def test_the_template_takes_plain_strings_a_system_message_and_several_pictures(processor):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Same?"}]},
        {"role": "assistant", "content": "no"},
    ]
    text = processor.apply_chat_template(messages)
    assert text == "Be brief. USER: <image>\n<image>\nSame? ASSISTANT: no</s>"


def test_the_template_refuses_an_unknown_role(processor):
    with pytest.raises(Exception, match="Unknown role 'tool'"):
        processor.apply_chat_template([{"role": "tool", "content": "x"}])


def test_a_picture_becomes_one_token_per_patch(processor):
    row = MiniBench("train", 1)[0]
    inputs = processor(text="USER: <image>\n", images=row["images"], return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == IMAGE_TOKENS
    assert inputs["pixel_values"].shape == (1, 3, SIDE, SIDE)


def test_the_tokens_of_a_prompt_begin_the_tokens_of_prompt_and_answer(processor):
    for row in MiniBench("train", 50, 4, caption_share=0.3):
        whole = processor.tokenizer(processor.apply_chat_template(row["messages"]))["input_ids"]
        for end in range(1, len(row["messages"]), 2):
            text = processor.apply_chat_template(row["messages"][:end], add_generation_prompt=True)
            prompt = processor.tokenizer(text)["input_ids"]
            assert whole[: len(prompt)] == prompt


def test_text_survives_the_tokenizer(processor):
    text = "Is there a red star? 左上角是什么颜色？ ünusual \n  spaces"
    assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert len(processor.tokenizer) <= 1000


def test_the_generation_mask_covers_the_replies_and_their_end_tokens_exactly(processor):
    tokenizer = processor.tokenizer
    row = MiniBench("train", 3, 3)[1]
    encoded = tokenizer.apply_chat_template(
        row["messages"],
        chat_template=processor.chat_template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    kept = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    answers = [message["content"][0]["text"] for message in row["messages"][1::2]]
    assert tokenizer.decode(kept) == "".join(f" {answer}</s>" for answer in answers)


def test_the_training_labels_are_the_template_generation_blocks(processor):
    pretrain = pytest.importorskip("minibench.pretrain")
    rows = [MiniBench("train", 20, 3, caption_share=0.3)[index] for index in range(20)]
    labels = pretrain.RowCollator(processor)(rows)["labels"]
    for row, label in zip(rows, labels, strict=True):
        answers = [message["content"][0]["text"] for message in row["messages"][1::2]]
        expected = "".join(f" {answer}</s>" for answer in answers)
        assert processor.tokenizer.decode(label[label != pretrain.IGNORED]) == expected


def test_the_saved_processor_loads_through_the_auto_classes(processor, tmp_path):
    save_processor(processor, tmp_path)
    row = MiniBench("train", 1)[0]
    text = processor.apply_chat_template(row["messages"])
    again = AutoProcessor.from_pretrained(tmp_path)
    expected, got = (p(text=text, images=row["images"], return_tensors="pt") for p in (processor, again))
    assert torch.equal(expected["input_ids"], got["input_ids"])
    assert torch.equal(expected["pixel_values"], got["pixel_values"])
    assert again.apply_chat_template(row["messages"]) == text
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.padding_side == "left" and tokenizer.pad_token == "<pad>" and tokenizer.image_token == "<image>"


def test_the_saved_processor_names_only_classes_that_both_transformers_lines_know(processor, tmp_path):
    save_processor(processor, tmp_path)
    files = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("*_config.json")}
    assert files["tokenizer_config.json"]["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert files["preprocessor_config.json"]["image_processor_type"] == "CLIPImageProcessor"
    assert "image_processor" not in files["processor_config.json"]


# Evaluation


class Oracle:
    """Stands in for a model: gives the true answers, but the first `wrong` of them spoiled."""

    device = torch.device("cpu")
    training = True

    def __init__(self, tokenizer, answers, wrong):
        self.tokenizer, self.answers, self.wrong, self.seen = tokenizer, iter(answers), wrong, []

    def eval(self):
        self.training = False

    def train(self, mode):
        self.training = mode

    def generate(self, input_ids, pixel_values, **_):
        self.seen.append(pixel_values)
        rows = []
        for prompt in input_ids.tolist():
            answer = next(self.answers) if self.wrong <= 0 else f"not {next(self.answers)}"
            self.wrong -= 1
            rows.append(prompt + self.tokenizer.encode(f" {answer}</s>", add_special_tokens=False))
        longest = max(map(len, rows))
        return torch.tensor([row + [self.tokenizer.pad_token_id] * (longest - len(row)) for row in rows])


def test_evaluate_counts_exact_matches_by_kind(processor):
    answers = [item.answer for item in evaluation_items("test", 10, seed=4)]
    model = Oracle(processor.tokenizer, answers, wrong=3)
    result = evaluation.evaluate(model, processor, num_questions=10, seed=4, batch_size=7)
    assert [result["kinds"][kind]["accuracy"] for kind in KINDS] == [0.9, 0.9, 0.9]
    assert (result["n"], result["kinds"]["digit"]["n"]) == (30, 10)
    assert result["mean"] == pytest.approx(0.9) and result["low"] < 0.9 < result["high"]
    assert model.training


def test_chance_is_the_share_of_the_most_frequent_answer():
    items = [SimpleNamespace(kind=kind, answer=answer) for kind in KINDS for answer in ("a", "a", "a", "b")]
    result = evaluation.summarise(items, ["b"] * len(items))
    assert result["chance"] == 0.75 and result["mean"] == 0.25


def test_chance_knows_from_the_question_whether_a_colour_or_a_shape_is_asked_for():
    answers = Counter({"red": 3, "blue": 1, "star": 4, "ring": 2})
    assert evaluation.majority_rate(answers) == 0.7


def test_the_blindfold_shows_every_question_the_same_grey_picture(processor):
    answers = [item.answer for item in evaluation_items("test", 4)]
    model = Oracle(processor.tokenizer, answers, wrong=0)
    evaluation.evaluate(model, processor, num_questions=4, batch_size=12, blind=True)
    (pixels,) = model.seen
    assert torch.equal(pixels, pixels[:1].expand_as(pixels))
    assert (pixels[0].flatten(1).amax(1) == pixels[0].flatten(1).amin(1)).all()


def test_the_wilson_interval_matches_published_values():
    assert evaluation.wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert evaluation.wilson_interval(10, 10)[1] == pytest.approx(1.0)


# Training


def test_patch_labels_name_the_object_that_covers_each_patch():
    tower = pytest.importorskip("minibench.tower")
    scene = make_scene("train", 0, 0)
    labels = tower.patch_labels(scene, 12).view(8, 8, 4)
    for thing in scene.objects:
        x, y = (centre // 12 for centre in thing.centre)
        words = [names[label] for names, label in zip(tower.NAMES, labels[y, x].tolist(), strict=True)]
        assert thing.place in words and set(thing.name.removeprefix("digit ").split()) <= set(words)
    assert (labels[..., 3] > 0).sum() < 40


@pytest.fixture
def tiny_run(tmp_path):
    """Pretrains a tiny model in a folder and returns the log lines of the call."""
    pretrain = pytest.importorskip("minibench.pretrain")
    sizes = "--text_layers 2 --text_width 32 --vision_layers 2 --vision_width 32 --batch_size 2 --num_workers 0"
    data = "--tower_pictures 2 --questions_per_row 2 --captions_first 0 --validation_questions 1"
    steps = "--logging_steps 1 --save_steps 2"

    def run(name: str, pictures: int) -> list[dict]:
        log = tmp_path / name / "log.jsonl"
        before = len(log.read_text().splitlines()) if log.exists() else 0
        command = f"--output_dir {tmp_path / name} --pictures {pictures} {sizes} {data} {steps}"
        pretrain.main(pretrain.parse_args(command.split()))
        return [json.loads(line) for line in log.read_text().splitlines()[before:]]

    return run


def test_pretraining_goes_on_from_its_last_checkpoint_as_if_it_had_never_stopped(tiny_run, tmp_path):
    def losses(log: list[dict]) -> dict[int, float]:
        return {entry["step"]: entry["loss"] for entry in log if entry["stage"] == "llava" and "loss" in entry}

    straight = losses(tiny_run("run", pictures=12))
    shutil.rmtree(tmp_path / "run" / "llava" / "checkpoint-6")
    resumed = losses(tiny_run("run", pictures=12))
    assert list(straight) == [1, 2, 3, 4, 5, 6] and list(resumed) == [5, 6]
    assert resumed == pytest.approx({step: straight[step] for step in (5, 6)}, rel=1e-4)


def test_the_log_holds_the_command_losses_and_validation_accuracies(tiny_run):
    log = tiny_run("run", pictures=2)
    assert {"stage", "command", "hardware", "versions"} <= log[0].keys()
    assert {"stage", "step", "seconds", "loss", "learning_rate"} <= log[1].keys()
    (validation,) = [entry for entry in log if "validation" in entry]
    assert set(validation["validation"]) == set(KINDS)


def test_the_trained_model_is_saved_in_half_and_loads_in_full_precision(tiny_run, tmp_path):
    tiny_run("run", pictures=2)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "final")
    assert model.dtype == torch.float32
    bytes_on_disk = (tmp_path / "run" / "final" / "model.safetensors").stat().st_size
    assert bytes_on_disk < 2.5 * model.num_parameters()
    assert "use_cache" not in json.loads((tmp_path / "run" / "final" / "config.json").read_text())


def test_the_saved_weights_bear_the_names_of_published_llava_checkpoints(tiny_run, tmp_path):
    tiny_run("run", pictures=2)
    with safe_open(tmp_path / "run" / "final" / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    assert "vision_tower.vision_model.embeddings.class_embedding" in {name.removeprefix("model.") for name in names}
    assert not any("vision_tower.encoder" in name for name in names)


def test_hidden_matrices_go_to_muon_and_everything_else_to_adamw(processor):
    pretrain = pytest.importorskip("minibench.pretrain")
    args = pretrain.parse_args(["--output_dir", "x", "--text_layers", "1", "--vision_layers", "2"])
    model = pretrain.make_model(processor, args)
    optimizer = pretrain.MuonWithAdamW(model, 0.02, 0.002)
    names = {id(weight): name for name, weight in model.named_parameters()}
    muon = {names[id(weight)] for weight in optimizer.parts[0].param_groups[0]["params"]}
    assert any("q_proj" in name for name in muon) and any("multi_modal_projector" in name for name in muon)
    assert not any("embed" in name or "lm_head" in name or "norm" in name or "bias" in name for name in muon)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
