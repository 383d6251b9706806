"""two_stream_dpvr.py in training: loss, gradients and what autograd stores, against the naive algorithm."""

from collections.abc import Iterator

import pytest
import torch
from conftest import IMAGE_TOKEN_ID
from hypothesis import assume, example, given
from reference import Prompts, examples, make_dpvr, naive_logits, plans, prompts, real_float64
from test_two_stream import DEEP_ROUTINGS, TOLERANCE
from torch.nn import functional as F

from modeling_dpvr import DpvrLlavaForConditionalGeneration, is_side_branch


@pytest.fixture(autouse=True, scope="module")
def exact() -> Iterator[None]:
    with real_float64():
        yield


def answer_labels(batch: Prompts) -> torch.Tensor:
    """Labels (B, T): of the second half of each row, the text that follows text."""
    labels = torch.full_like(batch.inputs["input_ids"], -100)
    for target, row in zip(batch.unpad(labels), batch.rows, strict=True):
        text = row != IMAGE_TOKEN_ID
        answer = (torch.arange(len(row)) >= max(1, len(row) // 2)) & text & text.roll(1)
        target[answer] = row[answer]
    return labels


def naive_loss(model: DpvrLlavaForConditionalGeneration, batch: Prompts, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over the labels (B, T) that follow a text token."""
    logits, targets = [], []
    for row, images, row_labels in zip(batch.rows, batch.images, batch.unpad(labels), strict=True):
        text, predicted = naive_logits(model, row, images)
        for place, prediction in zip(text.tolist(), predicted, strict=True):
            if place + 1 < len(row) and row_labels[place + 1] != -100:
                logits.append(prediction)
                targets.append(row_labels[place + 1])
    return F.cross_entropy(torch.stack(logits), torch.stack(targets))


def gradients(loss: torch.Tensor, weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of a loss that may not depend on the weights, as where no labelled row has an image."""
    if not loss.requires_grad:
        return [torch.zeros_like(weight) for weight in weights]
    return torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)


ONE_OF_EACH = Prompts([[2, 4], [1, 0, 3], [5]], "right")


@examples(20)
@given(plan=plans().filter(lambda plan: plan["routing"] not in ("none", "text_only")), batch=prompts())
@example(plan={"depth": 4, "routing": "late_fusion"}, batch=ONE_OF_EACH)
def test_loss_and_side_branch_gradients_are_the_references(plan: dict[str, object], batch: Prompts) -> None:
    labels = answer_labels(batch)
    assume((labels != -100).any())
    model = make_dpvr(**plan).train()
    model.freeze_base()
    loss, want = model(**batch.inputs, labels=labels).loss, naive_loss(model, batch, labels)
    assert (loss - want).abs() < TOLERANCE
    weights = list(model.side_branch.parameters())
    pairs = zip(gradients(loss, weights), gradients(want, weights), strict=True)
    assert max((ours - theirs).abs().max() for ours, theirs in pairs) < TOLERANCE


@pytest.mark.parametrize("routing", DEEP_ROUTINGS)
def test_only_text_only_leaves_the_side_branch_without_gradient(routing: str) -> None:
    """Paper, section 3.2: without fusion the side branch is strictly untrainable."""
    model = make_dpvr(routing=routing).train()
    model(**ONE_OF_EACH.inputs, labels=answer_labels(ONE_OF_EACH)).loss.backward()
    grads = [parameter.grad for parameter in model.side_branch.parameters()]
    if routing == "text_only":
        assert all(grad is None or not grad.any() for grad in grads)
    else:
        assert all(grad is not None and grad.any() for grad in grads)


def test_an_optimizer_step_moves_the_side_branch_and_no_bit_of_the_base() -> None:
    model = make_dpvr().train()
    model.freeze_base()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    model(**ONE_OF_EACH.inputs, labels=answer_labels(ONE_OF_EACH)).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != is_side_branch(name), name


def saved_bytes(model: DpvrLlavaForConditionalGeneration) -> int:
    """Bytes of the activations, parameters apart, that autograd keeps for the backward pass."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**ONE_OF_EACH.inputs, labels=answer_labels(ONE_OF_EACH)).loss
    assert loss.requires_grad
    return sum(size for size, _ in kept.values())


def test_autograd_stores_nothing_in_the_frozen_stack() -> None:
    """What is kept does not depend on how many frozen layers stand before the split or between it and the fusion."""
    sizes = {}
    for depth, split in ((4, 1), (4, 3), (8, 1), (8, 7)):
        model = make_dpvr(depth=depth, split_layer=split).train()
        model.freeze_base()
        sizes[depth, split] = saved_bytes(model)
    assert len(set(sizes.values())) == 1, sizes
    everything = [saved_bytes(make_dpvr(depth=depth).train()) for depth in (4, 8)]  # the count does see stored layers
    assert everything[1] > 1.3 * everything[0] > 1.3 * sizes[4, 1]
