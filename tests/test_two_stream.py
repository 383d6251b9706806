"""The two-stream forward pass against the naive reference (reference.py), on random prompts and plans, in float64."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from conftest import IMAGE_TOKEN_ID, TOKENS_PER_IMAGE, make_llava
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version
from reference import (
    SIDE_ROUTINGS,
    Prompts,
    examples,
    make_dpvr,
    naive_logits,
    naive_states,
    plans,
    prompts,
    randomise_vectors,
    real_float64,
)
from transformers import LlavaConfig, LlavaForConditionalGeneration, MistralConfig, Qwen2Config

from modeling_dpvr import DpvrLlavaForConditionalGeneration, is_side_branch

TOLERANCE = 1e-9
DEEP_ROUTINGS = tuple(routing for routing in SIDE_ROUTINGS if routing != "none")
RAGGED = [[1, 2], [2, 0, 1], [3], [0, 3], [1, 0, 2, 1]]  # 1 image, 2 side by side, none, 1 in front, 3


@pytest.fixture(autouse=True, scope="module")
def exact() -> Iterator[None]:
    with real_float64():
        yield


def assert_naive(model: DpvrLlavaForConditionalGeneration, batch: Prompts, logits: torch.Tensor) -> None:
    """Logits (B, T, vocabulary) are the reference's at all valid text positions."""
    for index, (got, ids, images) in enumerate(zip(batch.unpad(logits), batch.rows, batch.images, strict=True)):
        text, want = naive_logits(model, ids, images)
        error = (got[text] - want).abs().max().item()
        assert error < TOLERANCE, f"row {index}"


def position_ids(batch: Prompts) -> torch.Tensor:
    """As `generate` makes them: counted over the valid tokens."""
    return (batch.inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)


# -- the function -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@examples(80)
@given(plan=plans(), batch=prompts(), counted=st.booleans())
@torch.no_grad()
def test_any_plan_on_any_prompts_is_the_naive_algorithm(
    attention: str, plan: dict[str, object], batch: Prompts, counted: bool
) -> None:
    model = make_dpvr(attention=attention, **plan)
    positions = {"position_ids": position_ids(batch)} if counted else {}
    logits = model(**batch.inputs, **positions).logits
    assert_naive(model, batch, logits)
    assert logits.isfinite().all()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("routing", SIDE_ROUTINGS)
@pytest.mark.parametrize(
    "layout", [[[2, 3]], [[2, 3]] * 2, [[0, 3]], [[3, 0]], [[1, 0]], [[0, 1]], [[1, 0, 0, 1]], [[6], [1, 1]]], ids=str
)
@torch.no_grad()
def test_prompts_without_padding_are_the_naive_algorithm_too(
    routing: str, layout: list[list[int]], attention: str
) -> None:
    """Where nothing is padded sdpa runs without a mask, also if the only text token stands before the image."""
    model, batch = make_dpvr(routing=routing, attention=attention), Prompts(layout)
    assert_naive(model, batch, model(**batch.inputs).logits)
    del batch.inputs["attention_mask"]
    assert_naive(model, batch, model(**batch.inputs).logits)


# -- what stock LLaVA reads from its inputs ---------------------------------------------------------------------------


def own_mask(length: int, seed: int) -> torch.Tensor:
    """bool (T, T): a token sees itself and some of those before it."""
    random = torch.rand(length, length, generator=torch.Generator().manual_seed(seed)) < 0.6
    return random.tril() | torch.eye(length, dtype=torch.bool)


@pytest.mark.parametrize(("attention", "additive"), [("eager", True), ("sdpa", True), ("sdpa", False)])
@examples(25)
@given(plan=plans(), batch=prompts(), seed=st.integers(0, 99))
@torch.no_grad()
def test_a_mask_of_ones_own_is_read(attention: str, additive: bool, plan: dict, batch: Prompts, seed: int) -> None:
    """Bool for sdpa or additive for both; rows of one layout, so that none is padded."""
    batch = Prompts(batch.layout[:1] * 2, seed=batch.seed)
    length = len(batch.rows[0])
    seen = torch.stack([own_mask(length, seed), own_mask(length, seed + 1)])
    mask = seen[:, None]
    if additive:
        mask = torch.zeros(mask.shape).double().masked_fill(~mask, torch.finfo(torch.float64).min)
    positions = torch.stack([torch.arange(length) // 2, torch.arange(length) * 3])
    model = make_dpvr(attention=attention, **plan)
    logits = model(**{**batch.inputs, "attention_mask": mask}, position_ids=positions, use_cache=False).logits
    for row in range(2):
        text, want = naive_logits(model, batch.rows[row], batch.images[row], seen=seen[row], positions=positions[row])
        assert (logits[row, text] - want).abs().max() < TOLERANCE


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@examples(40)
@given(plan=plans(), batch=prompts())
@torch.no_grad()
def test_rows_packed_by_restarting_their_positions_do_not_see_each_other(
    attention: str, plan: dict, batch: Prompts
) -> None:
    model, rows = make_dpvr(attention=attention, **plan), [row for row in batch.rows if len(row)]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    packed = {"input_ids": torch.cat(rows)[None], "position_ids": positions, "use_cache": False}
    if any(map(len, batch.images)):
        packed["pixel_values"] = torch.cat(batch.images)
    logits = model(**packed).logits[0].split([len(row) for row in rows])
    for got, row, images in zip(logits, batch.rows, batch.images, strict=True):
        text, want = naive_logits(model, row, images)
        assert (got[text] - want).abs().max() < TOLERANCE


@torch.no_grad()
def test_what_stock_llava_is_told_of_the_tower_reaches_it_under_a_routing() -> None:
    """Another layer of the tower, and its class token, which makes an image five tokens long."""
    model, batch = make_dpvr(routing="kv_substitution"), Prompts([[2, 3]])
    plain = model(**batch.inputs).logits
    told = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    ids = torch.cat([batch.rows[0][:2], torch.full((5,), IMAGE_TOKEN_ID), batch.rows[0][-3:]])[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": batch.images[0]}
    logits = model(**inputs, **told).logits
    as_config = make_dpvr(routing="kv_substitution")
    for name, value in told.items():
        setattr(as_config.config, name, value)
    assert torch.equal(logits, as_config(**inputs).logits)
    assert (logits[0, -1] - plain[0, -1]).abs().max() > 1e-3
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "num_beams": 2}
    assert torch.equal(model.generate(**inputs, **told, **options), as_config.generate(**inputs, **options))


@torch.no_grad()
def test_token_types_go_by_streams_and_what_goes_by_tokens_unknown_is_refused_by_name() -> None:
    model, batch = make_dpvr(), Prompts([[2, 3]])
    ids = batch.inputs["input_ids"]
    plain = model(**batch.inputs).logits
    assert torch.equal(model(**batch.inputs, token_type_ids=torch.zeros_like(ids)).logits, plain)
    with pytest.raises(ValueError, match="argument 'importance' of shape .* leave it out"):
        model(**batch.inputs, importance=torch.zeros(ids.shape))


@pytest.mark.parametrize("decoder", [Qwen2Config, MistralConfig])
@torch.no_grad()
def test_qwen2_and_mistral_decoders_are_the_naive_algorithm_too(decoder: type) -> None:
    base = make_llava()
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    fields = {name: getattr(base.config.text_config, name) for name in (*shared, "num_key_value_heads")}
    text_config = decoder(**fields, initializer_range=0.3, sliding_window=None, pad_token_id=0)
    config = LlavaConfig(
        vision_config=base.config.vision_config,
        text_config=text_config,
        image_token_index=IMAGE_TOKEN_ID,
        image_seq_length=TOKENS_PER_IMAGE,
    )
    llava = LlavaForConditionalGeneration(config).double().eval()
    batch = Prompts(RAGGED, "left")
    for routing in SIDE_ROUTINGS:
        model = DpvrLlavaForConditionalGeneration.from_llava(llava, routing=routing, split_layer=2)
        randomise_vectors(model)
        assert_naive(model, batch, model(**batch.inputs).logits)


FLEX = """
import torch
from reference import make_dpvr, Prompts
batch = Prompts([[2, 3], [1, 1, 1]], "left")
batch.inputs["pixel_values"] = batch.inputs["pixel_values"].float()
model = make_dpvr(dtype=torch.float32)
valid = (batch.inputs["attention_mask"] == 1)
with torch.no_grad():
    want = model(**batch.inputs).logits[valid]
    model.set_attn_implementation({"text_config": "flex_attention"})
    got = model(**batch.inputs).logits[valid]
    print("equal" if torch.allclose(got, want, atol=1e-3) else "different")
"""


HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


@pytest.mark.skipif(HAS_AVX512, reason="flex_attention runs on this CPU")
def test_flex_attention_is_refused_where_its_kernel_is_wrong() -> None:
    model = make_dpvr(dtype=torch.float32)
    model.set_attn_implementation({"text_config": "flex_attention"})
    inputs = Prompts([[2, 3]]).inputs
    inputs["pixel_values"] = inputs["pixel_values"].float()
    with pytest.raises(ValueError, match="flex_attention gives wrong results .* attn_implementation='sdpa'"):
        model(**inputs)


@pytest.mark.skipif(not HAS_AVX512, reason="torch's compiled flex kernel is wrong on CPUs without AVX-512")
def test_flex_attention_is_sdpa() -> None:
    """In a process of its own: on CPUs torch's flex kernel can write past its memory when it gets an additive mask."""
    here = Path(__file__).parent
    path = f"import sys; sys.path[:0] = [{str(here)!r}, {str(here.parent)!r}]\n"
    done = subprocess.run([sys.executable, "-c", path + FLEX], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr[-300:]}"
    assert done.stdout.split()[-1] == "equal"


@examples(10)
@given(batch=prompts(), split=st.integers(1, 3), num_side_layers=st.integers(1, 2))
@torch.no_grad()
def test_persistent_context_and_kv_substitution_are_one_function(
    batch: Prompts, split: int, num_side_layers: int
) -> None:
    model = make_dpvr(routing="persistent_context", split_layer=split, num_side_layers=num_side_layers)
    persistent = model(**batch.inputs).logits
    model.set_routing("kv_substitution")
    substituted = model(**batch.inputs).logits
    valid_text = (batch.inputs["attention_mask"] == 1) & (batch.inputs["input_ids"] != IMAGE_TOKEN_ID)
    assert (persistent - substituted)[valid_text].abs().max() < TOLERANCE


def as_float(batch: Prompts) -> dict[str, torch.Tensor]:
    return {name: value.float() if value.is_floating_point() else value for name, value in batch.inputs.items()}


def assert_bit_identical(routing: str, layout: list[list[int]], padding_side: str) -> None:
    """Logits, loss and all states of DPVR and of the stock LLaVA around the same float32 weights."""
    llava = make_llava(dtype=torch.float32)
    model = DpvrLlavaForConditionalGeneration.from_llava(llava, routing=routing, split_layer=2)
    inputs = as_float(Prompts(layout, padding_side))
    inputs["labels"] = inputs["input_ids"]
    ours, stock = (m(**inputs, output_hidden_states=True) for m in (model, llava))
    assert torch.equal(ours.logits, stock.logits)
    assert torch.equal(ours.loss, stock.loss)
    assert all(map(torch.equal, ours.hidden_states, stock.hidden_states))


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("routing", SIDE_ROUTINGS)
def test_prompts_without_images_are_stock_llava_bit_for_bit(routing: str, padding_side: str) -> None:
    assert_bit_identical(routing, [[5], [3], [1]], padding_side)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_routing_none_is_stock_llava_bit_for_bit_with_images(padding_side: str) -> None:
    assert_bit_identical("none", RAGGED, padding_side)


# -- what the forward pass returns ------------------------------------------------------------------------------------


@examples(40)
@given(plan=plans(), batch=prompts() | prompts(ends_with_text=True), data=st.data())
@torch.no_grad()
def test_logits_to_keep_are_a_slice_of_all_logits(
    plan: dict[str, object], batch: Prompts, data: st.DataObject
) -> None:
    model = make_dpvr(**plan)
    length = batch.inputs["input_ids"].shape[1]
    everything = model(**batch.inputs).logits
    last = data.draw(st.integers(1, min(3, length)) | st.integers(1, length))
    indices = -torch.tensor(data.draw(st.lists(st.integers(1, last), min_size=1, max_size=3)))
    valid = batch.inputs["attention_mask"] == 1
    for keep, chosen in ((last, slice(-last, None)), (indices, indices), (length + indices, indices)):
        kept = model(**batch.inputs, logits_to_keep=keep).logits
        assert kept.shape == everything[:, chosen].shape
        assert (kept - everything[:, chosen])[valid[:, chosen]].abs().sum() < TOLERANCE


@pytest.mark.parametrize(
    "plan", [{"num_fusion_layers": 2}, {"fusion_layers": [2, 4]}, {"routing": "kv_substitution"}], ids=str
)
@torch.no_grad()
def test_hidden_states_show_each_layer_and_the_side_branch_at_image_tokens(plan: dict[str, object]) -> None:
    model, batch = make_dpvr(depth=5, **plan), Prompts([[1, 2, 1], [4]], "left")
    states = model(**batch.inputs, output_hidden_states=True).hidden_states
    assert len(states) == 6
    row, images = batch.rows[0], batch.images[0]
    got = [batch.unpad(state)[0] for state in states]
    want = naive_states(model, row, images)
    want[-1] = model.model.language_model.norm(want[-1])
    text, image = row != IMAGE_TOKEN_ID, row == IMAGE_TOKEN_ID
    for index in range(6):
        assert (got[index] - want[index])[text].abs().max() < TOLERANCE
    for index in range(3):  # up to the split the image is one of the tokens
        assert (got[index] - want[index])[image].abs().max() < TOLERANCE
    assert (got[3] - got[2])[image].abs().max() > 0.1  # from there on it is what the side branch made of it
    moved = model.config.fusion_layers is None and model.config.num_fusion_layers == 2
    if moved:
        assert (got[4] - want[4])[image].abs().max() < TOLERANCE
    else:
        assert torch.equal(got[4][image], got[3][image])


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"), reason="older releases give all hidden states or none"
)
@torch.no_grad()
def test_some_hidden_states_may_be_chosen_as_of_stock_llava() -> None:
    """Stock LLaVA hands the wish on to its tower, where other choices than these fail."""
    chosen = [1, -2]
    model, batch = make_dpvr(), Prompts([[2, 3]])
    everything, some = (model(**batch.inputs, output_hidden_states=wish).hidden_states for wish in (True, chosen))
    model.set_routing("none")
    of_stock = model(**batch.inputs, output_hidden_states=chosen).hidden_states
    assert [state is None for state in some] == [state is None for state in of_stock]
    assert all(mine is None or torch.equal(mine, state) for mine, state in zip(some, everything, strict=True))


# -- making -----------------------------------------------------------------------------------------------------------


def test_from_llava_shares_every_weight_of_the_base() -> None:
    llava = make_llava()
    model = DpvrLlavaForConditionalGeneration.from_llava(llava, split_layer=2)
    ours, stock = dict(model.named_parameters()), dict(llava.named_parameters())
    assert {name for name in ours if not is_side_branch(name)} == set(stock)
    assert all(ours[name].data_ptr() == stock[name].data_ptr() for name in stock)
    taken = {parameter.data_ptr() for parameter in stock.values()}
    assert not any(ours[name].data_ptr() in taken for name in ours if is_side_branch(name))


@pytest.mark.parametrize("init", ["split_layer", "identity", "random"])
def test_side_branch_starts_as_its_init_says(init: str) -> None:
    llava = make_llava()
    model = DpvrLlavaForConditionalGeneration.from_llava(
        llava, split_layer=2, num_side_layers=2, side_branch_init=init
    )
    for index, side_layer in enumerate(model.side_branch):
        source = llava.model.language_model.layers[2 + index].state_dict()
        for name, weight in side_layer.state_dict().items():
            if init == "identity" and name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
                assert not weight.any()
            elif weight.ndim > 1:
                assert torch.equal(weight, source[name]) == (init != "random")
    batch = Prompts([[2, 3]])
    states = model(**batch.inputs, output_hidden_states=True).hidden_states
    image = batch.inputs["input_ids"] == IMAGE_TOKEN_ID
    assert torch.equal(states[3][image], states[2][image]) == (init == "identity")
