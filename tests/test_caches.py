"""Every kind of cache gives the answers of the growing cache of test_generation.py."""

import copy
import gc
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import takewhile
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
from conftest import TOKENS_PER_IMAGE
from hypothesis import assume, given
from hypothesis import strategies as st
from optimum.quanto.library.extensions import get_extension
from reference import Prompts, examples, make_dpvr, naive_logits, plans, prompts, real_float64
from test_generation import (
    RAGGED,
    TOLERANCE,
    VARIANTS,
    answer,
    assert_cached_logits_are_naive,
    assert_dialogue_needs_no_cache,
    assert_same_answers,
    forward_in_pieces,
    pieces_of_prompts,
)
from test_two_stream import own_mask
from transformers import DynamicCache, StaticCache, cache_utils
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, QuantoQuantizedLayer

from modeling_dpvr import DpvrLlavaForConditionalGeneration
from versions_dpvr import LINE_4

variants = pytest.mark.parametrize("variant", VARIANTS, ids=str)
needs_5 = pytest.mark.skipif(LINE_4, reason="transformers 4 gives every chunk of a prefill all pixels, and is refused")


@pytest.fixture(autouse=True, scope="module")
def exact() -> Iterator[None]:
    with real_float64():
        yield


def float32(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}


# -- static caches ----------------------------------------------------------------------------------------------------


@examples(40)
@given(plan=plans(), batch=prompts(ends_with_text=True), attention=st.sampled_from(["sdpa", "eager"]))
def test_a_static_cache_gives_the_answers_of_a_growing_one(plan: dict, batch: Prompts, attention: str) -> None:
    model, inputs = make_dpvr(attention=attention, **plan), Prompts(batch.layout, "left", batch.seed).inputs
    want = answer(model, inputs)
    for _ in range(2):  # transformers 4 uses the cache of the first call again
        assert_same_answers(answer(model, inputs, cache_implementation="static"), want)


@examples(60)
@given(plan=plans(), pieces=pieces_of_prompts(), attention=st.sampled_from(["sdpa", "eager"]))
@torch.no_grad()
def test_a_prompt_in_pieces_on_a_static_cache_is_the_naive_algorithm(
    plan: dict, pieces: list[Prompts], attention: str
) -> None:
    texts = list(takewhile(lambda piece: "pixel_values" not in piece.inputs, pieces))
    # until an image comes this is stock LLaVA, which on transformers 4 counts the first row's keys that are not zero
    assume(not LINE_4 or all(piece.inputs["attention_mask"][0].all() for piece in texts))
    model = make_dpvr(attention=attention, **plan | {"latent_score": None})  # which chooses piece by piece
    cache = StaticCache(config=model.config, max_cache_len=120)
    assert_cached_logits_are_naive(model, pieces, forward_in_pieces(model, pieces, cache))


@variants
def test_beams_may_use_a_static_cache(variant: dict) -> None:
    model, inputs = make_dpvr(**variant), Prompts(RAGGED, "left").inputs
    beams = {"num_beams": 3, "num_return_sequences": 2}
    static = answer(model, inputs, **beams, cache_implementation="static").sequences
    assert torch.equal(static, answer(model, inputs, **beams).sequences)


@variants
@torch.no_grad()
def test_a_static_cache_holds_as_many_bytes_as_promised(variant: dict) -> None:
    model, batch, room = make_dpvr(**variant), Prompts([[3, 0, 2]] * 2), 20
    cache = StaticCache(config=model.config, max_cache_len=room)
    forward_in_pieces(model, [batch], cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)
    image = 2 * TOKENS_PER_IMAGE
    assert model.kv_cache_bytes(image, room - image, batch_size=2) == held


@torch.no_grad()
def test_a_static_cache_that_is_too_short_is_refused_before_anything_is_written() -> None:
    model, batch = make_dpvr(), Prompts([[3, 2]])
    cache = StaticCache(config=model.config, max_cache_len=8)
    with pytest.raises(ValueError, match="has max_cache_len=8, but the sequence has 9 tokens already: make"):
        forward_in_pieces(model, [batch], cache)
    assert not any(layer.is_initialized for layer in cache.layers)


def test_flex_attention_with_a_static_cache_is_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match="flex_attention does not run with a static cache.* set_attn_implementation"):
        answer(make_dpvr(attention="flex_attention"), Prompts([[1, 2]]).inputs, cache_implementation="static")


@variants
@torch.no_grad()
def test_a_static_cache_that_was_reset_takes_any_prompt(variant: dict) -> None:
    """First one with two images, then a long one without any, which needs all the room in the text layers."""
    model = make_dpvr(**variant)
    cache = StaticCache(config=model.config, max_cache_len=12)
    for layout in ([[1, 1, 2]], [[12]], [[3, 2]]):
        batch = Prompts(layout)
        assert_cached_logits_are_naive(model, [batch], forward_in_pieces(model, [batch], cache))
        cache.reset()


@variants
@torch.no_grad()
def test_a_mask_of_ones_own_is_read_on_a_static_cache_too(variant: dict) -> None:
    model, batch = make_dpvr(**variant), Prompts([[1, 2, 3]])
    seen = own_mask(len(batch.rows[0]), seed=3)
    room = torch.nn.functional.pad(seen, (0, 4))[None, None]
    cache = StaticCache(config=model.config, max_cache_len=room.shape[-1])
    options = {"cache_position": torch.arange(len(seen))} if LINE_4 else {}
    logits = model(**{**batch.inputs, "attention_mask": room}, past_key_values=cache, **options).logits[0]
    text, want = naive_logits(model, batch.rows[0], batch.images[0], seen=seen)
    assert (logits[text] - want).abs().max() < TOLERANCE


# -- what is done to caches -------------------------------------------------------------------------------------------


def cached(model: DpvrLlavaForConditionalGeneration, batch: Prompts, kind: str) -> Cache:
    cache = StaticCache(config=model.config, max_cache_len=40) if kind == "static" else DynamicCache()
    forward_in_pieces(model, [batch], cache)
    return cache


@pytest.mark.parametrize("kind", ["growing", "static"])
@variants
@torch.no_grad()
def test_a_prefix_may_be_copied_and_asked_different_questions(variant: dict, kind: str) -> None:
    model, prefix = make_dpvr(**variant), Prompts([[2, 1], [1, 3]])
    cache = cached(model, prefix, kind)
    for question in (Prompts([[3], [2]], seed=1), Prompts([[1, 2], [2, 0, 1]], seed=2)):
        logits = forward_after(model, prefix, question, copy.deepcopy(cache))
        assert_cached_logits_are_naive(model, [prefix, question], [prefix_logits(model, prefix), logits])


def prefix_logits(model: DpvrLlavaForConditionalGeneration, prefix: Prompts) -> torch.Tensor:
    return model(**prefix.inputs).logits


def forward_after(
    model: DpvrLlavaForConditionalGeneration, prefix: Prompts, piece: Prompts, cache: Cache
) -> torch.Tensor:
    """Logits (B, T, vocabulary) of a piece on the cache of a prefix."""
    past = prefix.inputs["input_ids"].shape[1]
    mask = torch.cat([prefix.inputs["attention_mask"], piece.inputs["attention_mask"]], dim=1)
    inputs = {**piece.inputs, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, past:]}
    if LINE_4:
        inputs["cache_position"] = torch.arange(past, mask.shape[1])
    return model(**inputs, past_key_values=cache).logits


@variants
@torch.no_grad()
def test_the_rows_of_a_cache_may_be_picked_and_repeated(variant: dict) -> None:
    """Rows of unlike images and lengths, permuted, then each of them twice."""
    model, batch = make_dpvr(**variant), Prompts(RAGGED)
    cache, order = cached(model, batch, "growing"), [4, 0, 3, 1]
    cache.batch_select_indices(torch.tensor(order))
    cache.batch_repeat_interleave(2)
    chosen = [row for row in order for _ in range(2)]
    mask = torch.cat([batch.inputs["attention_mask"][chosen], torch.ones(8, 1, dtype=torch.long)], dim=1)
    token = torch.tensor([[9]])
    logits = model(
        input_ids=token.expand(8, 1),
        attention_mask=mask,
        position_ids=mask.sum(1, keepdim=True) - 1,
        past_key_values=cache,
    ).logits
    for got, row in zip(logits, chosen, strict=True):
        _, want = naive_logits(model, torch.cat([batch.rows[row], token[0]]), batch.images[row])
        assert (got[0] - want[-1]).abs().max() < TOLERANCE


@pytest.mark.parametrize("kind", ["growing", "static"])
@torch.no_grad()
def test_a_cache_does_not_go_on_with_another_number_of_side_layers(kind: str) -> None:
    batch = Prompts([[1, 2]])
    cache = cached(make_dpvr(num_side_layers=2), batch, kind)
    with pytest.raises(ValueError, match="with a side branch of 2 layers, and the model now has one of 1: start"):
        forward_after(make_dpvr(), batch, batch, cache)


@pytest.mark.parametrize("new_pixels_only", [False, True], ids=["all images", "new images"])
@variants
def test_a_dialogue_may_go_on_with_a_cache_of_ones_own(variant: dict, new_pixels_only: bool) -> None:
    turns = [Prompts([[1, 2], [2, 1]], "left"), Prompts([[2], [2]], "left"), Prompts([[0, 1], [1, 1]], "left", 1)]
    assert_dialogue_needs_no_cache(make_dpvr(**variant), turns, new_pixels_only, own_cache=DynamicCache())


@variants
@torch.no_grad()
def test_a_growing_cache_cropped_to_nothing_is_an_empty_one(variant: dict) -> None:
    """A text prompt then runs through stock LLaVA, and a picture after that is the first one again."""
    model, pieces = make_dpvr(**variant), [Prompts([[12]]), Prompts([[1, 2]], seed=1)]
    for nothing in [0, -10] if LINE_4 else [-10]:
        for after in (pieces, pieces[1:]):
            cache = cached(model, Prompts([[2, 4]]), "growing")
            cache.crop(nothing)
            assert_cached_logits_are_naive(model, after, forward_in_pieces(model, after, cache))


@torch.no_grad()
def test_a_static_cache_serves_on_after_a_prefill_that_was_broken_off() -> None:
    model, inputs = make_dpvr(), Prompts([[1, 2]]).inputs
    want = answer(model, inputs)
    for layer in (0, 2):
        with pytest.raises(KeyboardInterrupt):
            hook = model.model.language_model.layers[layer].register_forward_pre_hook(interrupt)
            answer(model, inputs, cache_implementation="static")
        hook.remove()
        assert_same_answers(answer(model, inputs, cache_implementation="static"), want)
        text = Prompts([[7]]).inputs  # as long a prompt as the cache has room for
        assert_same_answers(answer(model, text, cache_implementation="static"), answer(model, text))
    with pytest.raises(ValueError, match=r"rows have \[.*\] image tokens, but"):
        answer(
            model, {**inputs, "pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)}, cache_implementation="static"
        )
    assert_same_answers(answer(model, inputs, cache_implementation="static"), want)


@variants
def test_the_keys_of_a_cache_are_freed_with_it(variant: dict) -> None:
    """And not only when Python next looks for cycles, which it seldom does beside a large model."""
    model, batch = make_dpvr(**variant), Prompts([[1, 2]])
    gc.disable()
    try:
        with torch.no_grad():
            cache = model(**batch.inputs, use_cache=True).past_key_values
        layers = [weakref.ref(layer) for layer in cache.layers]
        assert all(layer() is not None for layer in layers)
        del cache
        assert not any(layer() for layer in layers)
    finally:
        gc.enable()


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_generate_takes_embeddings() -> None:
    model, inputs = make_dpvr(), Prompts([[6]]).inputs
    embeddings = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    got = answer(model, {**embeddings, "attention_mask": inputs["attention_mask"]}).sequences
    assert torch.equal(got, answer(model, inputs).sequences[:, 6:])


# -- quantized and offloaded ------------------------------------------------------------------------------------------

QUANTIZED = {
    "cache_implementation": "quantized",
    "cache_config": {"backend": "quanto", "nbits": 4, "q_group_size": 8, "residual_length": 4},
}


@variants
def test_a_quantizer_that_loses_nothing_changes_nothing(variant: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QuantoQuantizedLayer, "_quantize", lambda self, tensor, axis: tensor)
    monkeypatch.setattr(QuantoQuantizedLayer, "_dequantize", lambda self, tensor: tensor)
    model = make_dpvr(**variant)
    for inputs in (Prompts(RAGGED, "left").inputs, Prompts([[1, 2]]).inputs):
        got, want = answer(model, inputs, max_new_tokens=8, **QUANTIZED), answer(model, inputs, max_new_tokens=8)
        assert_same_answers(got, want)
        quantized = [type(layer) for layer in got.past_key_values.layers].count(QuantoQuantizedLayer)
        assert quantized == len(model.model.language_model.layers)


@pytest.fixture
def unpacked_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quanto's unpacking of 4-bit values without its C++, which needs a compiler and minutes to build."""

    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        return torch.cat([packed >> shift & 2**bits - 1 for shift in range(0, 8, bits)])

    monkeypatch.setattr(get_extension("quanto_cpp"), "_lib", SimpleNamespace(unpack=unpack))


@pytest.mark.usefixtures("unpacked_in_python")
@pytest.mark.parametrize("backend", ["quanto", pytest.param("fp8", marks=needs_5)])
def test_keys_in_few_bits_cost_no_more_exactness_than_they_cost_llava(backend: str) -> None:
    """Distance of the logits from exact ones, over the same forced answers."""
    settings = QUANTIZED if backend == "quanto" else {**QUANTIZED, "cache_config": {"backend": "fp8"}}
    distance = {}
    for routing in ("none", "late_fusion"):
        model, inputs = make_dpvr(dtype=torch.float32, routing=routing), float32(Prompts([[3, 5]]).inputs)
        forced = {"prefix_allowed_tokens_fn": lambda _, ids: [9 + len(ids) % 5], "max_new_tokens": 8}
        exact, got = answer(model, inputs, **forced), answer(model, inputs, **forced, **settings)
        if backend == "fp8":
            layers = got.past_key_values.layers
            held = sum(layer._quantized_keys[0].nbytes * 2 for layer in layers[:4])
            side = 0 if routing == "none" else 2 * layers[4].keys.numel()  # in as many values, not in 8 bits
            assert held + side == model.kv_cache_bytes(TOKENS_PER_IMAGE, 8 + 7, dtype=torch.float8_e4m3fn)
        distance[routing] = (torch.stack(got.logits) - torch.stack(exact.logits)).std().item()
    assert 0 < distance["late_fusion"] < 1.5 * distance["none"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading is from a GPU to the CPU")
@variants
def test_an_offloaded_cache_gives_the_same_answers(variant: dict) -> None:
    model, inputs = make_dpvr(**variant).cuda(), {k: v.cuda() for k, v in Prompts(RAGGED, "left").inputs.items()}
    assert_same_answers(answer(model, inputs, cache_implementation="offloaded"), answer(model, inputs))


class NoStream(nullcontext):
    def wait_stream(self, other: "NoStream") -> None:
        pass


@variants
def test_keys_are_fetched_before_a_layer_of_an_offloaded_cache_is_used(
    variant: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of moves to and from a GPU, a note on the layer; using a layer that is away fails."""
    update, moves = DynamicLayer.update, []

    def checked(layer: DynamicLayer, *args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
        assert not getattr(layer, "is_away", False), f"{type(layer).__name__} is used while its keys are away"
        return update(layer, *args, **kwargs)

    def move(layer: DynamicLayer, is_away: bool) -> None:
        layer.is_away = is_away
        moves.append(is_away)

    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: NoStream())
    monkeypatch.setattr(cache_utils, "_is_torch_greater_or_equal_than_2_7", True)
    monkeypatch.setattr(DynamicLayer, "update", checked)
    monkeypatch.setattr(CacheLayerMixin, "offload", lambda layer: move(layer, True))
    monkeypatch.setattr(CacheLayerMixin, "prefetch", lambda layer: move(layer, False))
    model, inputs, cache = make_dpvr(**variant), Prompts([[1, 2]]).inputs, DynamicCache()
    cache.offloading, cache.only_non_sliding, cache.prefetch_stream = True, False, NoStream()
    assert_same_answers(answer(model, inputs, past_key_values=cache), answer(model, inputs))
    assert True in moves and False in moves
