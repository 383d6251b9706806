"""pruning.py on models of any family: what it drops, what it costs, and what it refuses."""

from collections.abc import Iterator

import pytest
import torch
from families import FAMILIES, PRESENT, forget, make, make_prompts
from family_checks import with_adapter
from naive_families import exact
from reference_pruning import masked_pruned_logits
from test_costs import flops_of

from decoders_dpvr import decoder_of, layer_kinds
from dpvr.benchmarks.pruning import prune
from versions_dpvr import LINE_4, cache_in

TOLERANCE = 1e-9
PLAIN = [name for name in PRESENT if set(layer_kinds(make(name).config.get_text_config())) == {"full_attention"}]
OTHERS = [name for name in PRESENT if name not in PLAIN]
LAYOUT = [[3, 2, 5]]  # two images


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_there_are_plain_families_and_others():
    assert len(PLAIN) >= 8 and len(OTHERS) >= 2


@pytest.mark.parametrize("rank", ["attention", "random"])
@pytest.mark.parametrize("name", PLAIN)
def test_on_every_plain_family_the_logits_are_those_of_the_stock_model_that_hides_what_is_dropped(name, rank) -> None:
    model = make(name, attention="eager")
    inputs, _ = make_prompts(name, model, LAYOUT)
    if name == "paligemma":  # whose prompt is one block; the naive one takes its causal mask
        inputs["token_type_ids"] = inputs["attention_mask"] * 0
    cut = {"layer": 3, "keep": 0.4, "rank": rank, "seed": 2}
    with exact():
        left, want = masked_pruned_logits(model, inputs, **cut)
        forget(model)
        got = prune(model, **cut)(**inputs).logits[0, left]
        forget(model)
        stock = model(**inputs).logits[0, left]
    assert (got - want).abs().max() < TOLERANCE < 1e-3 < (stock - want).abs().max()


@pytest.mark.parametrize("rank", ["attention", "random"])
@pytest.mark.parametrize("name", PLAIN)
def test_on_every_plain_family_flops_and_cache_bytes_are_the_counted_ones(name, rank) -> None:
    if LINE_4 and name == "qwen3_vl_moe":
        pytest.skip("transformers 4 runs all experts of this decoder on all tokens, and the active ones are counted")
    model = make(name, attention="eager")
    inputs, _ = make_prompts(name, model, LAYOUT)
    pruned = prune(model, layer=3, keep=0.4, rank=rank)
    forget(model)
    with flops_of(type(decoder_of(model.model)[1])) as counted:
        output = pruned(**inputs, use_cache=True, logits_to_keep=1)
    text = sum(LAYOUT[0]) + 2 * 2  # and two marks around each image
    size = (inputs["input_ids"].shape[1] - text, text)
    head = 2 * pruned.config.get_text_config().hidden_size * pruned.config.get_text_config().vocab_size
    assert [pruned.prefill_flops(*size) - head] == counted
    layers = [layer for layer in cache_in(output).layers if isinstance(vars(layer).get("keys"), torch.Tensor)]
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    assert pruned.kv_cache_bytes(*size) == held


@pytest.mark.parametrize("name", PLAIN[:4])
def test_a_model_with_an_adapter_lends_its_base_and_keeps_its_adapter(name) -> None:
    adapted = with_adapter(name, split_layer=FAMILIES[name].depth // 2)
    base, inputs = adapted.base_model.model, make_prompts(name, make(name), LAYOUT)[0]
    before = adapted(**inputs).logits
    forget(base)
    got = prune(base, layer=3)(**inputs).logits
    forget(base)
    assert torch.equal(got, prune(make(name).requires_grad_(False), layer=3)(**inputs).logits)
    assert torch.equal(adapted(**inputs).logits, before)


@pytest.mark.parametrize("name", OTHERS)
def test_a_decoder_without_full_attention_everywhere_is_refused_by_name(name) -> None:
    family = FAMILIES[name].model_type
    with pytest.raises(ValueError, match=f"the decoder of {family!r} has layers of (recurrent|sliding_attention): "):
        prune(make(name))


@pytest.mark.skipif("qwen3_vl" not in PRESENT, reason="this release does not have the family")
def test_a_cut_among_the_layers_of_deepstack_is_refused() -> None:
    with pytest.raises(ValueError, match="6 layers and adds features of its tower .*DeepStack.*: choose 2 to 5"):
        prune(make("qwen3_vl"), layer=1)
