"""Every way to decode gives the answers of test_generation.py: compiled, exported, speculative, chunked, batched."""

import copy
from collections.abc import Iterator

import pytest
import torch
import torch._dynamo
from conftest import make_llava
from reference import Prompts, make_dpvr, real_float64
from test_caches import float32
from test_generation import (
    CUT,
    RAGGED,
    TOLERANCE,
    VARIANTS,
    answer,
    assert_dialogue_needs_no_cache,
    assert_same_answers,
)
from torch._dynamo.utils import counters
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache
from transformers.generation import CompileConfig

from cache_dpvr import CacheRecord
from versions_dpvr import LINE_4

variants = pytest.mark.parametrize("variant", VARIANTS, ids=str)
few_variants = pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[4]], ids=str)  # for slow ones
needs_5 = pytest.mark.skipif(LINE_4, reason="transformers 4 gives every chunk of a prefill all pixels, and is refused")


@pytest.fixture(autouse=True, scope="module")
def exact() -> Iterator[None]:
    with real_float64():
        yield


# -- compiled and exported --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [[[1, 2]], RAGGED], ids=["one row", "padded rows"])
@few_variants
@torch._dynamo.config.patch(error_on_recompile=True)
def test_the_decode_step_compiles_whole_and_once(variant: dict, layout: list) -> None:
    """One graph without a break for all tokens of two answers, by `generate`'s own compilation."""
    model, inputs = make_dpvr(dtype=torch.float32, **variant), float32(Prompts(layout, "left").inputs)
    compiled = CompileConfig(fullgraph=True, dynamic=False, backend="eager", mode=None)
    compiled._compile_all_devices = True  # on a CPU generate compiles for tests alone
    want = answer(model, inputs, max_new_tokens=6).sequences
    torch._dynamo.reset()
    counters.clear()
    for _ in range(2):
        got = answer(model, inputs, max_new_tokens=6, cache_implementation="static", compile_config=compiled)
        assert torch.equal(got.sequences, want)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_a_compiled_forward_is_not_compiled_anew_for_every_token() -> None:
    """`torch.compile` of the model with a growing cache: of a prefill with images the stock layers are compiled."""
    model, inputs = make_dpvr(dtype=torch.float32), float32(Prompts([[1, 2]]).inputs)
    want, graphs = answer(model, inputs, max_new_tokens=12).sequences, []
    torch._dynamo.reset()
    counters.clear()
    model.forward = torch.compile(model.forward, backend="eager")
    for num_tokens in (6, 10, 12):  # in the second prefill some stock code has changed its mind
        got = answer(model, inputs, max_new_tokens=num_tokens).sequences
        assert torch.equal(got, want[:, : got.shape[1]])
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[2] > 0


@few_variants
@torch.no_grad()
def test_the_decode_step_may_be_exported(variant: dict) -> None:
    model, inputs = make_dpvr(dtype=torch.float32, **variant), float32(Prompts([[1, 2], [2, 1]]).inputs)
    cache, length = StaticCache(config=model.config, max_cache_len=16), inputs["input_ids"].shape[1]
    if variant.get("routing") == "none":
        options = {"cache_position": torch.arange(length)} if LINE_4 else {}
        model(**inputs, past_key_values=cache, **options)
        with pytest.raises(ValueError, match="is not a static cache that holds a prompt with an image: run"):
            model.decode_step(cache)
        return
    model(**inputs, past_key_values=cache)
    step = model.decode_step(copy.deepcopy(cache))
    tokens = [(torch.tensor([[9 + i], [10 + i]]), torch.full((2, 1), length + i)) for i in range(3)]
    want = [model(input_ids=ids, position_ids=place, past_key_values=cache).logits for ids, place in tokens]
    exported = torch.export.export(step, tokens[0], strict=True).module()
    for (ids, place), logits in zip(tokens, want, strict=True):
        assert (exported(ids, place) - logits).abs().max() < 1e-4


# -- what decoding asks of the device ---------------------------------------------------------------------------------


def on_meta(cache: Cache) -> Cache:
    """The cache without its data: whatever asks for a value of it fails."""
    for layer in cache.layers:
        for name in ("keys", "values", "cumulative_length"):
            if isinstance(value := getattr(layer, name, None), torch.Tensor):
                setattr(layer, name, value.to("meta"))
        layer.device = torch.device("meta")
        if isinstance(layer, CacheRecord):
            layer.tables = {kind: table.to("meta") for kind, table in layer.tables.items()}
    return cache


@pytest.mark.parametrize("kind", ["growing", "static"])
@pytest.mark.parametrize("layout", [[[1, 2]], RAGGED], ids=["one row", "padded rows"])
@variants
@torch.no_grad()
def test_a_decoded_token_reads_nothing_from_the_device(variant: dict, layout: list, kind: str) -> None:
    """On tensors without data every synchronisation and every operation that depends on data raises."""
    model, batch = make_dpvr(**variant), Prompts(layout, "left")
    cache = StaticCache(config=model.config, max_cache_len=40) if kind == "static" else DynamicCache()
    mask, length = batch.inputs["attention_mask"], batch.inputs["input_ids"].shape[1]
    model(**batch.inputs, past_key_values=cache)
    if LINE_4 and kind == "static" and variant.get("routing") == "none":
        pytest.skip("stock LLaVA of transformers 4 looks for its place in a static cache")
    model, cache, rows = model.to("meta"), on_meta(cache), len(layout)
    mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=1).to("meta") if kind == "growing" else None
    token = torch.zeros(rows, 1, dtype=torch.long, device="meta")
    options = {"attention_mask": mask, "position_ids": token + length, "past_key_values": cache}
    if variant.get("routing") == "none" and kind == "growing":
        options["attention_mask"] = None  # stock LLaVA looks for padding
    assert model(input_ids=token, **options).logits.shape[:2] == (rows, 1)
    with pytest.raises((RuntimeError, NotImplementedError)):  # a prefill counts its images
        model(**{name: value.to("meta") for name, value in batch.inputs.items()})


# -- other ways to decode ---------------------------------------------------------------------------------------------


@variants
def test_prompt_lookup_finds_the_greedy_answer(variant: dict) -> None:
    model, inputs = make_dpvr(**variant), Prompts([[1, 6]]).inputs
    options = {"max_new_tokens": 8, "eos_token_id": 39}  # transformers 4 asks for one
    greedy = answer(model, inputs, **options).sequences
    assert torch.equal(answer(model, inputs, **options, prompt_lookup_num_tokens=3).sequences, greedy)


@pytest.mark.parametrize("assistant", ["DPVR", "LLaVA"])
@variants
def test_speculative_decoding_finds_the_greedy_answer(variant: dict, assistant: str) -> None:
    """The assistants are right at times, so that some of their tokens are kept and others dropped."""
    model, inputs = make_dpvr(**variant), Prompts([[1, 6]]).inputs
    other = make_dpvr(routing="text_only") if assistant == "DPVR" else make_llava()
    greedy = answer(model, inputs, max_new_tokens=8).sequences
    assert torch.equal(answer(model, inputs, max_new_tokens=8, assistant_model=other).sequences, greedy)


@needs_5
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["growing", "static"])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("variant", CUT, ids=str)
def test_a_prefill_in_chunks_may_cut_through_images(variant: dict, size: int, cache: dict) -> None:
    model, inputs = make_dpvr(**variant), Prompts([[2, 0, 1]] if size == 1 else [*RAGGED, [0, 8]], "left").inputs
    assert_same_answers(answer(model, inputs, prefill_chunk_size=size, **cache), answer(model, inputs))


@needs_5
@pytest.mark.parametrize("new_pixels_only", [False, True], ids=["all images", "new images"])
def test_a_second_turn_may_be_prefilled_in_chunks(new_pixels_only: bool) -> None:
    turns = [Prompts([[1, 2], [2, 1]], "left"), Prompts([[2, 0, 1], [1, 1, 3]], "left", 1)]
    assert_dialogue_needs_no_cache(make_dpvr(), turns, new_pixels_only, prefill_chunk_size=3)


@needs_5
def test_chunks_of_one_token_are_refused_for_a_padded_batch() -> None:
    inputs = Prompts([[0, 8], [2]], "left").inputs
    with pytest.raises(ValueError, match="prefill_chunk_size is 1, .*: choose 2 or more"):
        answer(make_dpvr(), inputs, prefill_chunk_size=1)


@pytest.mark.skipif(not LINE_4, reason="transformers 5 prefills in chunks: the tests above")
def test_transformers_4_refuses_a_prefill_in_chunks_and_goes_on() -> None:
    model, inputs = make_dpvr(), Prompts([[1, 2]]).inputs
    with pytest.raises(ValueError, match="prefill_chunk_size is 3, .* leave it out, or use transformers 5"):
        answer(model, inputs, prefill_chunk_size=3, cache_implementation="static")
    assert_same_answers(answer(model, inputs, cache_implementation="static"), answer(model, inputs))


# -- at serving size --------------------------------------------------------------------------------------------------


def test_a_batch_at_serving_size_answers_as_its_rows_do_one_by_one() -> None:
    """16 rows of 5 to 900 text tokens and 0 to 4 images each."""
    generator = torch.Generator().manual_seed(0)
    images = torch.arange(16) % 5
    lengths = [5, 900, *torch.randint(5, 900, (14,), generator=generator).tolist()]
    layout = []
    for length, count in zip(lengths, images.tolist(), strict=True):
        cuts = torch.randperm(length - 1, generator=generator)[:count].sort().values.tolist()
        layout.append([end - start for start, end in zip([0, *cuts], [*cuts, length], strict=True)])
    model, batch = make_dpvr(), Prompts(layout, "left")
    assert sorted({len(row) - 1 for row in layout}) == [0, 1, 2, 3, 4]
    together = answer(model, batch.inputs)
    for index, (row, pixels) in enumerate(zip(batch.rows, batch.images, strict=True)):
        inputs = {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]}
        alone = answer(model, inputs | ({"pixel_values": pixels} if len(pixels) else {}))
        assert torch.equal(together.sequences[index, -4:], alone.sequences[0, -4:])
        assert (torch.stack(together.logits)[:, index] - torch.stack(alone.logits)[:, 0]).abs().max() < TOLERANCE
