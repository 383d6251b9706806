"""Generation: a cache changes nothing but the time it takes, in any dialogue; and costs are as promised."""

from collections.abc import Iterator

import pytest
import torch
from conftest import IMAGE_TOKEN_ID, TOKENS_PER_IMAGE
from hypothesis import given
from hypothesis import strategies as st
from reference import SIDE_ROUTINGS, Prompts, examples, layouts, make_dpvr, naive_logits, plans, prompts, real_float64
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, DynamicCache, LlamaConfig
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerateDecoderOnlyOutput

from configuration_dpvr import DpvrLlavaConfig
from modeling_dpvr import DpvrLlavaForConditionalGeneration
from versions_dpvr import LINE_4

TOLERANCE = 1e-9
RAGGED = [[1, 2], [2, 0, 1], [3], [0, 3], [1, 0, 2, 1]]  # 1 image, 2 side by side, none, 1 in front, 3
VARIANTS = [
    *({"routing": routing} for routing in SIDE_ROUTINGS),
    {"num_fusion_layers": 2},
    {"fusion_layers": [2]},
    {"routing": "latent", "latent_rank": 8, "latent_split_layer": 1, "latent_side_layers": 1},
    {"routing": "latent", "latent_rank": 8, "latent_split_layer": 0, "latent_stride": 3},
    {"routing": "latent", "latent_rank": 8, "latent_split_layer": 1, "latent_stride": 2, "latent_score": "norm"},
]
CUT = [one for one in VARIANTS if "latent_score" not in one]  # a prompt may be cut in an image and change nothing
COUNTED = [  # kinds of the latent, beside the variants
    {"routing": "latent", "latent_rank": 6, "latent_split_layer": 0},
    {"routing": "latent", "latent_rank": 6, "latent_split_layer": 0, "latent_side_layers": 2, "latent_stride": 3},
    {"routing": "latent", "latent_rank": 6, "latent_stride": 3, "latent_layers": [2]},
    {"routing": "latent", "latent_rank": 6, "latent_stride": 100, "latent_side_layers": 2},
]


@pytest.fixture(autouse=True, scope="module")
def exact() -> Iterator[None]:
    with real_float64():
        yield


def answer(
    model: DpvrLlavaForConditionalGeneration, inputs: dict[str, torch.Tensor], **options: object
) -> GenerateDecoderOnlyOutput:
    """Four new tokens, greedy unless the options say otherwise, with the logits (B, vocabulary) of each step."""
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "suppress_tokens": [IMAGE_TOKEN_ID]}
    return model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **{**settings, **options})


def assert_same_answers(one: GenerateDecoderOnlyOutput, other: GenerateDecoderOnlyOutput) -> None:
    assert one.sequences.tolist() == other.sequences.tolist()
    error = (torch.stack(one.logits) - torch.stack(other.logits)).abs().max().item()
    assert error < TOLERANCE


# -- one prompt -------------------------------------------------------------------------------------------------------


@examples(40)
@given(plan=plans(), batch=prompts(ends_with_text=True), attention=st.sampled_from(["sdpa", "eager"]))
def test_cached_generation_is_uncached_generation(plan: dict[str, object], batch: Prompts, attention: str) -> None:
    model = make_dpvr(attention=attention, **plan)
    cached = answer(model, batch.inputs)
    assert cached.sequences.shape[1] == batch.inputs["input_ids"].shape[1] + 4
    assert_same_answers(cached, answer(model, batch.inputs, use_cache=False))


@examples(15)
@given(plan=plans(), batch=prompts(ends_with_text=True))
def test_a_left_padded_batch_answers_as_its_rows_do_one_by_one(plan: dict[str, object], batch: Prompts) -> None:
    model = make_dpvr(**plan)
    together = answer(model, Prompts(batch.layout, "left", batch.seed).inputs)
    for index, (row, images) in enumerate(zip(batch.rows, batch.images, strict=True)):
        pixels = {"pixel_values": images} if len(images) else {}
        alone = answer(model, {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None], **pixels})
        assert torch.equal(together.sequences[index, -4:], alone.sequences[0, -4:])
        assert (torch.stack(together.logits)[:, index] - torch.stack(alone.logits)[:, 0]).abs().max() < TOLERANCE


@pytest.mark.parametrize("routing", SIDE_ROUTINGS)
def test_beams_and_samples_are_the_same_with_and_without_a_cache(routing: str) -> None:
    model, batch = make_dpvr(routing=routing), Prompts(RAGGED, "left")
    beams = {"num_beams": 3, "num_return_sequences": 2}
    samples = {"do_sample": True, "num_return_sequences": 2, "temperature": 0.7}
    for options in (beams, samples):
        found = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            found.append(answer(model, batch.inputs, use_cache=use_cache, **options).sequences)
        assert torch.equal(*found)
        assert len(found[0]) == 2 * len(RAGGED)


def test_repeated_rows_keep_their_own_images_together() -> None:
    """Rows with unlike numbers of images, in beams as wide as greedy search."""
    model, batch = make_dpvr(), Prompts(RAGGED, "left")
    repeated = answer(model, batch.inputs, do_sample=True, top_k=1, num_return_sequences=3).sequences
    assert torch.equal(repeated, answer(model, batch.inputs).sequences.repeat_interleave(3, dim=0))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@torch.no_grad()
def test_a_rejected_answer_may_be_cropped_and_another_picture_sent(variant: dict[str, object]) -> None:
    model, first, second = make_dpvr(**variant), Prompts([[2, 4]]), Prompts([[1, 2]], seed=1)
    cache = DynamicCache()
    model(**first.inputs, past_key_values=cache)
    model(input_ids=torch.tensor([[9, 9, 9]]), past_key_values=cache)
    cache.crop(-5)  # the answer, and two tokens of the question
    kept = Prompts([[2, 4]])
    kept.rows[0] = kept.rows[0][:-2]
    inputs = {**second.inputs, "attention_mask": None}
    logits = model(**inputs, past_key_values=cache).logits[0]
    row, images = joined([kept, second], 0)
    text, want = naive_logits(model, row, images)
    new = text >= len(kept.rows[0])
    assert (logits[text[new] - len(kept.rows[0])] - want[new]).abs().max() < TOLERANCE


@torch.no_grad()
def test_a_cache_cropped_into_its_picture_or_layer_by_layer_is_refused() -> None:
    model, batch = make_dpvr(), Prompts([[2, 3]])
    for damage, message in (
        (lambda cache: cache.crop(-4), "cropped to 5 tokens, into its last image, which ends at 6"),
        (lambda cache: cache.layers[1].crop(-1), "Layer 1 of a cache of .* tokens holds .* keys in place of"),
    ):
        cache = model(**batch.inputs, use_cache=True).past_key_values
        damage(cache)
        with pytest.raises(ValueError, match=message):
            model(input_ids=torch.tensor([[9]]), past_key_values=cache)


def test_images_are_counted_by_the_tower_and_not_by_a_config_left_at_its_default() -> None:
    model, batch = make_dpvr(), Prompts([[1, 0, 2, 1], [2, 2]], "left")
    beams = {"num_beams": 2, "num_return_sequences": 2}
    want = answer(model, batch.inputs, **beams).sequences
    model.config.image_seq_length = 576
    assert torch.equal(answer(model, batch.inputs, **beams).sequences, want)


@torch.no_grad()
def test_a_given_cache_is_read_even_if_none_is_asked_for() -> None:
    model, batch = make_dpvr(), Prompts([[2, 3]])
    caches = [model(**batch.inputs, use_cache=True).past_key_values for _ in range(2)]
    token = torch.tensor([[9]])
    kept = model(input_ids=token, past_key_values=caches[0], use_cache=True).logits
    assert torch.equal(model(input_ids=token, past_key_values=caches[1], use_cache=False).logits, kept)


# -- many pieces ------------------------------------------------------------------------------------------------------


def joined(pieces: list[Prompts], index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and images of one row over all pieces, without padding."""
    return torch.cat([p.rows[index] for p in pieces]), torch.cat([p.images[index] for p in pieces])


def assert_cached_logits_are_naive(
    model: DpvrLlavaForConditionalGeneration, pieces: list[Prompts], logits: list[torch.Tensor]
) -> None:
    """`logits` (B, T, vocabulary) of each piece, given after the others, against the reference on the whole rows."""
    for index in range(len(pieces[0].rows)):
        row, images = joined(pieces, index)
        if len(row) == 0:
            continue
        got = torch.cat([piece.unpad(part)[index] for piece, part in zip(pieces, logits, strict=True)])
        text, want = naive_logits(model, row, images)
        error = (got[text] - want).abs().sum()  # of none, if the row is all images
        assert error < TOLERANCE, f"row {index}"


def forward_in_pieces(
    model: DpvrLlavaForConditionalGeneration, pieces: list[Prompts], cache: Cache | None = None
) -> list[torch.Tensor]:
    """Logits (B, T, vocabulary) of each piece, with one cache; padding of a piece stays as a hole in the sequence."""
    cache = DynamicCache() if cache is None else cache
    mask = torch.zeros(len(pieces[0].rows), 0, dtype=torch.long)
    logits = []
    for piece in pieces:
        past, mask = mask.shape[1], torch.cat([mask, piece.inputs["attention_mask"]], dim=1)
        place = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
        inputs = {**piece.inputs, "attention_mask": mask, "position_ids": place}
        if LINE_4:  # which has the caller count for static caches
            inputs["cache_position"] = torch.arange(past, mask.shape[1])
        logits.append(model(**inputs, past_key_values=cache, use_cache=True).logits)
    return logits


def length(text_lengths: list[int]) -> int:
    return sum(text_lengths) + TOKENS_PER_IMAGE * (len(text_lengths) - 1)


@st.composite
def pieces_of_prompts(draw: st.DrawFn) -> list[Prompts]:
    """2 to 4 pieces of the same 1 to 3 rows; in a piece a row may have text, images, both, or nothing at all.

    A piece of one token is not padded: it is how decoding looks, where the mask is not read.
    """
    num_rows, side = st.just(draw(st.integers(1, 3))), st.sampled_from(["left", "right"])
    row = st.lists(st.integers(0, 3), min_size=1, max_size=3)
    batch = layouts(row, num_rows).filter(lambda rows: max(map(length, rows)) > 1 or rows == [[1]] * len(rows))
    return [
        Prompts(layout, draw(side), seed) for seed, layout in enumerate(draw(st.lists(batch, min_size=2, max_size=4)))
    ]


@examples(150)
@given(plan=plans(), pieces=pieces_of_prompts(), attention=st.sampled_from(["sdpa", "eager"]))
@torch.no_grad()
def test_a_prompt_given_in_pieces_is_the_naive_algorithm_on_the_whole(
    plan: dict[str, object], pieces: list[Prompts], attention: str
) -> None:
    model = make_dpvr(attention=attention, **plan | {"latent_score": None})  # which chooses piece by piece
    assert_cached_logits_are_naive(model, pieces, forward_in_pieces(model, pieces))


@pytest.mark.parametrize("score", ["norm", "distance"])
@torch.no_grad()
def test_pictures_are_chosen_from_one_by_one_so_pieces_that_end_behind_them_change_nothing(score: str) -> None:
    model = make_dpvr(routing="latent", latent_rank=8, latent_split_layer=1, latent_stride=2, latent_score=score)
    pieces = [Prompts([[1, 2]]), Prompts([[1, 0, 2]]), Prompts([[3]])]  # no two pictures without text between them
    assert_cached_logits_are_naive(model, pieces, forward_in_pieces(model, pieces))


@pytest.mark.parametrize("variant", CUT, ids=str)
@pytest.mark.parametrize("cut", [[[[1, 0]], [[2]]], [[[0, 0]], [[2]]], [[[2]], [[1, 0]], [[0, 1]]]], ids=str)
@torch.no_grad()
def test_a_piece_may_end_with_an_image_or_hold_nothing_else(cut: list, variant: dict[str, object]) -> None:
    model, pieces = make_dpvr(**variant), [Prompts(layout) for layout in cut]
    assert_cached_logits_are_naive(model, pieces, forward_in_pieces(model, pieces))


def dialogue(
    model: DpvrLlavaForConditionalGeneration,
    turns: list[Prompts],
    new_pixels_only: bool,
    cache: Cache | None,
    **options: object,
) -> Iterator[tuple[dict[str, torch.Tensor], GenerateDecoderOnlyOutput]]:
    """Answer each turn with the cache of those before; yields the history with all its images, and the answer."""
    count = len(turns[0].rows)
    ids = mask = torch.zeros(count, 0, dtype=torch.long)
    for number, turn in enumerate(turns, start=1):
        ids = torch.cat([ids, turn.inputs["input_ids"]], dim=1)
        mask = torch.cat([mask, turn.inputs["attention_mask"]], dim=1)
        history = {"input_ids": ids, "attention_mask": mask}
        images = torch.cat([images for row in range(count) for images in [p.images[row] for p in turns[:number]]])
        if len(images):
            history["pixel_values"] = images
        asked = dict(history)
        if new_pixels_only:
            asked.pop("pixel_values", None)
            asked |= {name: value for name, value in turn.inputs.items() if name == "pixel_values"}
        answered = answer(model, asked, past_key_values=cache, **options)
        yield history, answered
        cache, ids = answered.past_key_values, answered.sequences
        mask = torch.cat([mask, mask.new_ones(count, 4)], dim=1)


def assert_dialogue_needs_no_cache(
    model: DpvrLlavaForConditionalGeneration,
    turns: list[Prompts],
    new_pixels_only: bool,
    own_cache: Cache | None = None,
    **options: object,
) -> None:
    for history, answered in dialogue(model, turns, new_pixels_only, own_cache, **options):
        assert_same_answers(answered, answer(model, history, use_cache=False))


WITH_IMAGE, TEXT_ONLY = [[1, 2], [2, 0, 1]], [[2], [3]]


@pytest.mark.parametrize("new_pixels_only", [False, True], ids=["all images", "new images"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(
    "talk",
    [
        [WITH_IMAGE, TEXT_ONLY],
        [WITH_IMAGE, [[2, 1], [0, 2]]],
        [[[6], [1, 1]], TEXT_ONLY],
        [TEXT_ONLY, WITH_IMAGE],
        [[[1, 2], [2, 1]], TEXT_ONLY],
        [[[1, 2], [2, 1]], TEXT_ONLY, [[0, 1], [1, 1]]],
    ],
    ids=[
        "image, text",
        "image, image",
        "some with images of one length, text",
        "text, image",
        "image, ragged text",
        "image, ragged text, image",
    ],
)
def test_a_second_turn_may_reuse_the_cache(talk: list, variant: dict[str, object], new_pixels_only: bool) -> None:
    turns = [Prompts(layout, "left", seed) for seed, layout in enumerate(talk)]
    assert_dialogue_needs_no_cache(make_dpvr(**variant), turns, new_pixels_only)


@st.composite
def dialogues(draw: st.DrawFn) -> list[Prompts]:
    """2 or 3 turns of the same 1 to 3 rows, each ending with text."""
    num_rows = st.just(draw(st.integers(1, 3)))
    row = st.lists(st.integers(0, 3), min_size=1, max_size=3).filter(lambda lengths: lengths[-1] > 0)
    turns = draw(st.lists(layouts(row, num_rows), min_size=2, max_size=3))
    return [Prompts(layout, "left", seed) for seed, layout in enumerate(turns)]


@examples(40)
@given(plan=plans(), turns=dialogues(), new_pixels_only=st.booleans())
def test_any_dialogue_may_reuse_the_cache(
    plan: dict[str, object], turns: list[Prompts], new_pixels_only: bool
) -> None:
    assert_dialogue_needs_no_cache(make_dpvr(**plan), turns, new_pixels_only)


@pytest.mark.parametrize("after", SIDE_ROUTINGS)
@pytest.mark.parametrize("before", SIDE_ROUTINGS)
@torch.no_grad()
def test_a_cache_serves_one_routing_only(before: str, after: str) -> None:
    model, batch = make_dpvr(routing=before), Prompts([[1, 2]])
    cache = model(**batch.inputs, use_cache=True).past_key_values
    model.set_routing(after)
    token = torch.tensor([[9]])
    if before == after:
        model(input_ids=token, past_key_values=cache)
        return
    with pytest.raises(ValueError, match="start with a new cache after changing the routing"):
        model(input_ids=token, past_key_values=cache)


# -- what it costs ----------------------------------------------------------------------------------------------------


def prefill(model: DpvrLlavaForConditionalGeneration, batch: Prompts) -> Cache:
    return model(**batch.inputs, use_cache=True).past_key_values


@pytest.mark.parametrize("num_side_layers", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS + COUNTED, ids=str)
@torch.no_grad()
def test_the_cache_holds_as_many_keys_and_bytes_as_promised(variant: dict[str, object], num_side_layers: int) -> None:
    model, batch = make_dpvr(**variant, num_side_layers=num_side_layers), Prompts([[3, 0, 2]] * 2)
    image, text = 2 * TOKENS_PER_IMAGE, 5
    layers = [layer for layer in prefill(model, batch).layers if layer.is_initialized]  # without the record
    plan = model.config.layer_plan()
    expected = [text if mode == "text" else image + text for mode in plan.modes]
    if model.config.routing == "latent":
        read = [image, *[-(-image // model.config.latent_stride)] * (len(plan.modes) - 1)]
        reads = [mode == "context" for mode in plan.modes]
        expected = [text + new if reading else keys for new, reading, keys in zip(read, reads, expected, strict=True)]
        expected += [image] * model.config.latent_side_layers
    elif model.config.routing not in ("none", "text_only"):
        expected += [image] * num_side_layers
    assert [layer.keys.shape[-2] for layer in layers] == expected
    assert [layer.values.shape[-2] for layer in layers] == expected
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    assert model.kv_cache_bytes(image, text, batch_size=2) == held


@pytest.mark.parametrize("logits_to_keep", [1, 0])
@pytest.mark.parametrize("variant", VARIANTS + COUNTED, ids=str)
@torch.no_grad()
def test_prefill_flops_are_what_torch_counts(variant: dict[str, object], logits_to_keep: int) -> None:
    """With eager attention, whose products are counted on CPUs; the vision tower's and projector's are taken off."""
    model, batch = make_dpvr(attention="eager", **variant), Prompts([[3, 0, 2]] * 2)
    with FlopCounterMode(display=False) as whole:
        model(**batch.inputs, logits_to_keep=logits_to_keep)
    with FlopCounterMode(display=False) as vision:
        model.model.get_image_features(batch.inputs["pixel_values"])
    counted = whole.get_total_flops() - vision.get_total_flops()
    image, text = 2 * TOKENS_PER_IMAGE, 5
    assert model.prefill_flops(image, text, batch_size=2, logits_to_keep=logits_to_keep) == counted


def llava_15(width: int = 4096, depth: int = 32, heads: int = 32, mlp: int = 11008, **dpvr_fields):
    """LLaVA-1.5 as DPVR, without weights: 7B, or 13B with other sizes."""
    text = LlamaConfig(
        vocab_size=32064,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=mlp,
    )
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    config = DpvrLlavaConfig(text_config=text, vision_config=vision, image_token_index=32000, **dpvr_fields)
    with torch.device("meta"):
        return DpvrLlavaForConditionalGeneration(config)


def flops_ratio(model: DpvrLlavaForConditionalGeneration, num_text_tokens: int = 128) -> float:
    return model.prefill_flops(576, num_text_tokens) / model.prefill_flops(576, num_text_tokens, routing="none")


def test_late_fusion_on_7b_costs_two_thirds_of_vanilla_in_flops_and_in_cache() -> None:
    model = llava_15(split_layer=18)
    assert sum(parameter.numel() for parameter in model.side_branch.parameters()) == 202_383_360
    assert flops_ratio(model) == pytest.approx(0.6652, abs=5e-5)
    assert flops_ratio(model, 64) == pytest.approx(0.6354, abs=5e-3)
    assert flops_ratio(model, 1024) == pytest.approx(0.8325, abs=5e-3)
    assert model.kv_cache_bytes(576, 128) / model.kv_cache_bytes(576, 128, routing="none") <= 0.70


def test_an_early_split_with_four_reading_layers_on_7b_costs_less_than_half() -> None:
    model = llava_15(split_layer=8, fusion_layers=[10, 12, 14, 16])
    assert flops_ratio(model) <= 0.427
    entries = (8 + 4) * 704 + 20 * 128 + 576  # joint and context, text, side branch
    assert model.kv_cache_bytes(576, 128) == entries * 2 * 4096 * model.dtype.itemsize
    assert entries / (32 * 704) < 0.515


def test_late_fusion_on_13b_costs_as_much_as_counted() -> None:
    model = llava_15(width=5120, depth=40, heads=40, mlp=13824, split_layer=24)
    assert flops_ratio(model) == pytest.approx(0.6914, abs=5e-5)
