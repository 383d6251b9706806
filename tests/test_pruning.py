"""FastV and random pruning do what their definitions say, in any batch, with a cache, at the promised cost."""

from collections.abc import Iterator

import pytest
import torch
from conftest import IMAGE_TOKEN_ID, make_llava
from hypothesis import given
from hypothesis import strategies as st
from reference import Prompts, examples, make_dpvr, prompts, randomise_vectors, real_float64
from reference_pruning import naive_pruned_logits
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlavaForConditionalGeneration, StaticCache

from dpvr.benchmarks.pruning import Pruned, prune

TOLERANCE = 1e-9
RAGGED = [[1, 2], [2, 0, 1], [3], [0, 3], [1, 0, 2, 1]]  # 1 image, 2 side by side, none, 1 in front, 3
CUTS = st.fixed_dictionaries(
    {
        "layer": st.integers(1, 3),
        "keep": st.sampled_from([0.05, 0.3, 0.5, 0.8]),
        "rank": st.sampled_from(["attention", "random"]),
        "seed": st.integers(0, 9),
    }
)
HALF = {"layer": 2, "keep": 0.5}


@pytest.fixture(autouse=True, scope="module")
def exact() -> Iterator[None]:
    with real_float64(), torch.no_grad():
        yield


@pytest.fixture(scope="module")
def base() -> LlavaForConditionalGeneration:
    llava = randomise_vectors(make_llava())
    llava.generation_config.eos_token_id = None
    return llava


def answer(model: LlavaForConditionalGeneration, inputs: dict[str, torch.Tensor], **options) -> torch.Tensor:
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "suppress_tokens": [IMAGE_TOKEN_ID]}
    return model.generate(**inputs, **{**settings, **options})[:, -4:]


@examples(25)
@given(cut=CUTS, batch=prompts(ends_with_text=True), attention=st.sampled_from(["sdpa", "eager"]))
def test_the_logits_of_every_row_are_those_of_the_naive_derivation(base, cut, batch: Prompts, attention: str) -> None:
    base.set_attn_implementation(attention)
    logits = prune(base, **cut)(**batch.inputs).logits
    for got, row, images in zip(batch.unpad(logits), batch.rows, batch.images, strict=True):
        if len(images):
            left, want = naive_pruned_logits(base, row, images, **cut)
        else:
            left, want = slice(None), base(input_ids=row[None]).logits[0]
        assert (got[left] - want).abs().max() < TOLERANCE
    base.set_attn_implementation("sdpa")


@examples(10)
@given(cut=CUTS, batch=prompts(ends_with_text=True))
def test_cached_generation_is_naive_greedy_search_with_the_tokens_that_the_prompt_left(base, cut, batch) -> None:
    batch = Prompts(batch.layout, "left", batch.seed)
    together = answer(prune(base, **cut), batch.inputs)
    for got, row, images in zip(together, batch.rows, batch.images, strict=True):
        if not len(images):
            assert torch.equal(got, answer(base, {"input_ids": row[None]})[0])
            continue
        ids = row
        for _ in range(4):
            logits = naive_pruned_logits(base, ids, images, **cut, prompt_length=len(row))[1][-1]
            logits[IMAGE_TOKEN_ID] = -torch.inf
            ids = torch.cat([ids, logits.argmax()[None]])
        assert torch.equal(got, ids[-4:])


@pytest.mark.parametrize(("layout", "dropped"), [(RAGGED, 0), ([[2, 3]] * 2, 2)])
def test_a_static_cache_answers_as_a_growing_one_and_is_as_much_smaller(base, layout, dropped: int) -> None:
    """A row without an image keeps all its tokens, and the layers are as long as the longest row."""
    model, batch = prune(base, **HALF), Prompts(layout, "left")
    cache = StaticCache(config=base.config, max_cache_len=batch.inputs["input_ids"].shape[1] + 4)
    assert torch.equal(answer(model, batch.inputs, past_key_values=cache), answer(model, batch.inputs))
    rooms = [layer.max_cache_len for layer in cache.layers[:4]]
    assert rooms == [rooms[0], rooms[0], rooms[0] - dropped, rooms[0] - dropped]


@pytest.mark.parametrize("side", ["left", "right"])
def test_keeping_every_token_is_vanilla_bit_for_bit(base, side: str) -> None:
    for layout in (RAGGED, [[2, 3]]):
        batch = Prompts(layout, side)
        got, want = prune(base, keep=1.0)(**batch.inputs).logits, base(**batch.inputs).logits
        for one, other in zip(batch.unpad(got), batch.unpad(want), strict=True):
            assert torch.equal(one, other)


def test_pruning_after_a_layer_changes_the_logits_and_each_rank_its_own_way(base) -> None:
    batch = Prompts([[2, 0, 3]])
    found = [base, prune(base, **HALF), *(prune(base, rank="random", seed=seed, **HALF) for seed in (0, 1))]
    logits = [model(**batch.inputs, logits_to_keep=1).logits for model in found]
    assert all((one - other).abs().max() > 1e-3 for i, one in enumerate(logits) for other in logits[:i])


@pytest.mark.parametrize("rank", ["attention", "random"])
@pytest.mark.parametrize(("images", "keep", "kept"), [(0, 0.5, 1), (1, 0.5, 1), (3, 0.3, 2), (2, 1.0, 0), (2, 0.5, 0)])
def test_flops_and_cache_bytes_are_the_counted_ones(base, rank: str, images: int, keep: float, kept: int) -> None:
    """With eager attention, whose products are counted on CPUs; the vision tower's and projector's are taken off."""
    base.set_attn_implementation("eager")
    model, cache = prune(base, layer=2, keep=keep, rank=rank), DynamicCache()
    batch = Prompts([[1] + [0] * (images - 1) + [4] if images else [5]] * 2)
    with FlopCounterMode(display=False) as whole:
        model(**batch.inputs, past_key_values=cache, logits_to_keep=kept)
    with FlopCounterMode(display=False) as vision:
        if images:
            base.model.get_image_features(batch.inputs["pixel_values"])
    base.set_attn_implementation("sdpa")
    size = {"num_image_tokens": 4 * images, "num_text_tokens": 5, "batch_size": 2}
    counted = whole.get_total_flops() - vision.get_total_flops()
    assert model.prefill_flops(**size, logits_to_keep=kept) == counted
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)
    assert model.kv_cache_bytes(**size) == held


def test_weights_are_shared_and_a_dpvr_model_lends_its_vanilla_base() -> None:
    dpvr, batch = make_dpvr(), Prompts([[2, 3]])
    pruned = prune(dpvr, **HALF)
    assert isinstance(pruned, Pruned) and pruned.lm_head.weight is dpvr.lm_head.weight
    assert pruned.model.language_model is dpvr.model.language_model and not pruned.training
    left, want = naive_pruned_logits(dpvr, batch.rows[0], batch.images[0], **HALF)
    for use_cache in (True, False):
        output = pruned(**batch.inputs, use_cache=use_cache)
        assert (output.logits[0, left] - want).abs().max() < TOLERANCE
        assert (output.past_key_values is not None) == use_cache


NO_PLAN = [{"layer": 0}, {"layer": 4}, {"layer": True}, {"keep": 0}, {"keep": 1.1}, {"rank": "best"}]


@pytest.mark.parametrize("arguments", NO_PLAN, ids=str)
def test_arguments_that_make_no_plan_are_refused(base, arguments: dict[str, object]) -> None:
    with pytest.raises(
        ValueError,
        match=r"layer is .* has 4 layers: choose 1 to 3|keep is .*above 0 and at most 1|rank is 'best': choose",
    ):
        prune(base, **arguments)


def test_what_belongs_to_training_is_refused(base) -> None:
    batch = Prompts([[2, 3]])
    with pytest.raises(ValueError, match="for inference only and takes no labels: leave them out"):
        prune(base)(**batch.inputs, labels=batch.inputs["input_ids"])
