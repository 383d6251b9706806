"""reduction.py: a latent is read at the tokens that the prompt's last token looks at most, or at random ones."""

from collections.abc import Iterator

import pytest
import torch
from conftest import IMAGE_TOKEN_ID
from hypothesis import given
from hypothesis import strategies as st
from reference import Prompts, _Block, examples, make_dpvr, naive_logits, naive_states, prompts, real_float64
from reference_pruning import _attention
from torch.utils.flop_counter import FlopCounterMode

from dpvr.benchmarks.reduction import choose
from modeling_dpvr import DpvrLlavaForConditionalGeneration

LATENT = {"routing": "latent", "latent_rank": 8, "latent_split_layer": 2, "latent_stride": 2}
CHOICES = st.sampled_from([("attention", 0), ("random", 0), ("random", 3)])
PLANS = st.fixed_dictionaries({"latent_split_layer": st.integers(1, 3), "latent_stride": st.integers(2, 4)})


@pytest.fixture(autouse=True, scope="module")
def exact() -> Iterator[None]:
    with real_float64(), torch.no_grad():
        yield


def naive_worth(
    model: DpvrLlavaForConditionalGeneration, ids: torch.Tensor, pixels: torch.Tensor, rank: str, seed: int
) -> torch.Tensor:
    """The scores of a row's image tokens, (V,); the last of the ids (T,) ranks."""
    image = ids == IMAGE_TOKEN_ID
    if rank == "random":
        return torch.rand(int(image.sum()), generator=torch.Generator().manual_seed(seed))
    below = model.config.latent_split_layer - 1
    states = naive_states(model, ids, pixels)[below]
    return _attention(_Block(model), model.model.language_model.layers[below], states)[image]


@examples(25)
@given(plan=PLANS, choice=CHOICES, batch=prompts(ends_with_text=True))
def test_the_logits_of_every_row_are_those_of_the_naive_derivation(plan, choice, batch: Prompts) -> None:
    model = make_dpvr(**LATENT | plan)
    logits = choose(model, rank=choice[0], seed=choice[1])(**batch.inputs).logits
    for got, row, images in zip(batch.unpad(logits), batch.rows, batch.images, strict=True):
        if len(images):
            text, want = naive_logits(model, row, images, naive_worth(model, row, images, *choice))
        else:
            text, want = slice(None), model(input_ids=row[None]).logits[0]
        assert (got[text] - want).abs().max() < 1e-9


@pytest.mark.parametrize("rank", ["attention", "random"])
def test_cached_generation_is_greedy_search_with_the_tokens_that_the_prompt_chose(rank: str) -> None:
    model, batch = make_dpvr(**LATENT), Prompts([[1, 2], [2, 0, 1], [0, 3]], "left")
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "suppress_tokens": [IMAGE_TOKEN_ID]}
    together = choose(model, rank=rank, seed=1).generate(**batch.inputs, **options)[:, -4:]
    for got, row, images in zip(together, batch.rows, batch.images, strict=True):
        ids, worth = row, naive_worth(model, row, images, rank, 1)
        for _ in range(4):
            logits = naive_logits(model, ids, images, worth)[1][-1]
            logits[IMAGE_TOKEN_ID] = -torch.inf
            ids = torch.cat([ids, logits.argmax()[None]])
        assert torch.equal(got, ids[-4:])


def test_every_choice_reads_its_own_tokens_and_the_model_stays_as_it_was() -> None:
    model, batch = make_dpvr(**LATENT), Prompts([[2, 0, 3]])
    before = model(**batch.inputs, logits_to_keep=1).logits
    chosen = [choose(model, rank="attention"), *(choose(model, rank="random", seed=seed) for seed in (0, 1))]
    logits = [before, *(one(**batch.inputs, logits_to_keep=1).logits for one in chosen)]
    assert all((one - other).abs().max() > 1e-3 for i, one in enumerate(logits) for other in logits[:i])
    assert torch.equal(model(**batch.inputs, logits_to_keep=1).logits, before)
    assert all(one.lm_head.weight is model.lm_head.weight for one in chosen)


@pytest.mark.parametrize("rank", ["attention", "random"])
@pytest.mark.parametrize("images", [0, 1, 3])
def test_flops_are_the_counted_ones(rank: str, images: int) -> None:
    """With eager attention, whose products are counted on CPUs; the vision tower's and projector's are taken off."""
    base = make_dpvr(attention="eager", **LATENT)
    model, batch = choose(base, rank=rank), Prompts([[1] + [0] * (images - 1) + [4] if images else [5]] * 2)
    with FlopCounterMode(display=False) as whole:
        model(**batch.inputs, logits_to_keep=1)
    with FlopCounterMode(display=False) as vision:
        if images:
            base.model.get_image_features(batch.inputs["pixel_values"])
    counted = whole.get_total_flops() - vision.get_total_flops()
    assert model.prefill_flops(4 * images, 5, batch_size=2) == counted


@pytest.mark.parametrize(
    ("plan", "rank", "message"),
    [
        ({"latent_stride": 1}, "random", "reads all image tokens or no latent: .*latent_stride=2"),
        ({"routing": "late_fusion"}, "random", "reads all image tokens or no latent: .*latent_stride=2"),
        ({}, "best", "rank is 'best': choose 'attention' or 'random'"),
        ({"latent_split_layer": 0}, "attention", "no layer attends to the image .*use rank='random', or split 1"),
    ],
)
def test_what_cannot_be_chosen_is_refused(plan: dict[str, object], rank: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(make_dpvr(**LATENT | plan), rank=rank)


def test_random_tokens_are_chosen_at_split_0_too() -> None:
    model, batch = make_dpvr(**LATENT | {"latent_split_layer": 0}), Prompts([[2, 3], [1, 1]])
    logits = choose(model, rank="random").forward(**batch.inputs).logits
    for got, row, images in zip(batch.unpad(logits), batch.rows, batch.images, strict=True):
        text, want = naive_logits(model, row, images, naive_worth(model, row, images, "random", 0))
        assert (got[text] - want).abs().max() < 1e-9
