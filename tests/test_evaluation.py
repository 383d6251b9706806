"""evaluation.py: what the model is shown, and that its replies are counted as they are."""

from types import SimpleNamespace

import pytest
import torch

from dpvr.inference.evaluation import ask, evaluate, grey
from minibench.data import make_items
from minibench.scoring import summarise
from minibench.tasks import TASKS, Item

QUESTIONS = 4
PAIRED = ("perception", "cognition")


class Oracle:
    """Stands in for a model: gives the replies that it is made with, the first `endless` of them without an end."""

    device, dtype = torch.device("cpu"), torch.float32
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=2048))

    def __init__(self, tokenizer, replies: list[str], endless: int = 0) -> None:
        self.tokenizer, self.replies, self.endless = tokenizer, iter(replies), endless
        self.training, self.prompts, self.pixels = True, [], []

    def eval(self) -> None:
        self.training = False

    def train(self, mode: bool) -> None:
        self.training = mode

    def generate(self, input_ids, pixel_values, attention_mask, **options):
        assert not self.training and not options["do_sample"]
        self.pixels.append(pixel_values)
        rows = []
        for prompt, mask in zip(input_ids, attention_mask, strict=True):
            self.prompts.append(self.tokenizer.decode(prompt[mask.bool()]))
            end = "" if self.endless > 0 else "</s>"
            self.endless -= 1
            reply = self.tokenizer.encode(f" {next(self.replies)}{end}", add_special_tokens=False)
            rows.append(prompt.tolist() + reply)
        longest = max(map(len, rows))
        return torch.tensor([row + [self.tokenizer.pad_token_id] * (longest - len(row)) for row in rows])


def right_replies(items: list[Item]) -> list[str]:
    return [reply for item in items for _, reply in item.questions]


@pytest.fixture
def processor(minibench_processor):
    return minibench_processor


def test_a_model_that_knows_the_answers_scores_everything(processor):
    model = Oracle(processor.tokenizer, right_replies(make_items("test", QUESTIONS, seed=4)))
    result = evaluate(model, processor, num_questions=QUESTIONS, seed=4, batch_size=7)
    assert result["tasks"] == dict.fromkeys(TASKS, 1.0)
    assert result["mean"] == result["six_bench_mean"] == result["ended"] == 1.0
    assert model.training


def test_a_wrong_reply_costs_its_own_item_alone(processor):
    items = make_items("test", QUESTIONS, seed=4)
    replies = right_replies(items)
    replies[0] = "maybe"
    replies[-1] = "neither"
    result = evaluate(Oracle(processor.tokenizer, replies), processor, num_questions=QUESTIONS, seed=4)
    assert result["tasks"] == dict.fromkeys(TASKS, 1.0) | {"existence": 0.75, "multi_image": 0.75}


def test_the_result_is_the_summary_and_the_share_of_replies_that_ended(processor):
    items = make_items("validation", QUESTIONS, tasks=["scene", "science"])
    model = Oracle(processor.tokenizer, right_replies(items), endless=2)
    result = evaluate(model, processor, split="validation", num_questions=QUESTIONS, tasks=["scene", "science"])
    assert result.pop("ended") == 1 - 2 / (2 * QUESTIONS)
    assert result == summarise(items, [[reply for _, reply in item.questions] for item in items])


def test_every_question_is_asked_with_its_pictures_before_it(processor):
    items = make_items("test", QUESTIONS)
    model = Oracle(processor.tokenizer, right_replies(items))
    evaluate(model, processor, num_questions=QUESTIONS, batch_size=5)
    asked = [(item, text) for item in items for text, _ in item.questions]
    for prompt, (item, text) in zip(model.prompts, asked, strict=True):
        images = ("<image>" * 64 + "\n") * len(item.scenes)
        assert prompt == f"<s>USER: {images}{text} ASSISTANT:"
    pictures = [scene.draw() for item, _ in asked for scene in item.scenes]
    expected = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    assert torch.equal(torch.cat(model.pixels), expected)


def test_the_blindfold_shows_one_even_grey_for_each_picture_of_an_item(processor):
    items = make_items("test", QUESTIONS, tasks=["scene", "multi_image"])
    model = Oracle(processor.tokenizer, right_replies(items))
    evaluate(model, processor, num_questions=QUESTIONS, tasks=["scene", "multi_image"], show=grey)
    (pixels,) = model.pixels
    assert len(pixels) == QUESTIONS + 2 * QUESTIONS
    assert torch.equal(pixels, pixels[:1].expand_as(pixels))
    assert (pixels[0].flatten(1).amax(1) == pixels[0].flatten(1).amin(1)).all()


def test_a_reply_is_read_without_its_spaces_and_end_and_says_whether_it_ended(processor):
    (item,) = make_items("test", 2, tasks=["perception"])
    model = Oracle(processor.tokenizer, ["yes no", " yes "], endless=1)
    (replies,) = ask(model, processor, [item])
    assert [(reply.text, reply.ended) for reply in replies] == [("yes no", False), ("yes", True)]


def test_a_pair_counts_as_two_questions_and_four_rotations_as_one():
    items = make_items("test", 6)
    counts = {task: sum(item.task == task for item in items) for task in TASKS}
    assert counts == {task: 3 if task in PAIRED else 6 for task in TASKS}
    assert len(make_items("test", 2)) == 2 * len(TASKS) - 2


def test_fewer_than_two_questions_are_refused():
    with pytest.raises(ValueError, match="at least 2 questions.*got 1"):
        make_items("test", 1)


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="no task named 'captions': its tasks are existence, "):
        make_items("test", 2, tasks=["captions", "scene"])
