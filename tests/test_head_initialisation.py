"""head_initialisation.py: where the heads of a decoder attend before any training."""

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from dpvr.pretraining.head_initialisation import initialise_heads

LENGTH = 20


def make_decoder(**settings: int) -> LlamaModel:
    sizes = {"num_hidden_layers": 3, "hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 3}
    torch.manual_seed(0)
    return LlamaModel(LlamaConfig(vocab_size=300, intermediate_size=240, **{**sizes, **settings})).eval()


def attention_of_heads(decoder: LlamaModel, starts: int) -> tuple[float, float]:
    """The shares of attention on the previous token, and on the token after an earlier copy of the current one."""
    decoder.set_attn_implementation("eager")
    shares = []
    for seed in range(10):
        words = torch.randperm(300, generator=torch.Generator().manual_seed(seed))[: LENGTH + starts]
        ids = torch.cat((words, words[-LENGTH:]))[None]
        with torch.no_grad():
            first, second, _ = decoder(input_ids=ids, output_attentions=True).attentions
        previous = first[0, 0].diagonal(-1).mean()
        successor = second[0, 0].diagonal(1 - LENGTH)[starts + 1 :].mean()
        shares.append((previous, successor))
    return tuple(torch.tensor(shares).mean(0).tolist())


@pytest.mark.parametrize("starts", [0, 100])
def test_the_heads_form_an_induction_head_at_any_position(starts):
    decoder = make_decoder()
    assert max(attention_of_heads(decoder, starts)) < 0.1
    initialise_heads(decoder)
    previous, successor = attention_of_heads(decoder, starts)
    assert previous > 0.6 and successor > 0.3


def test_a_word_attends_to_the_image_tokens_that_match_it():
    decoder = make_decoder()
    initialise_heads(decoder)
    decoder.set_attn_implementation("eager")
    words = decoder.embed_tokens.weight.detach()
    red, star, blue, ring = words[:4] - words.mean(0)
    picture = torch.stack([red + star, blue + ring, blue + star, torch.zeros(192)] * 16)
    with torch.no_grad():
        states = torch.cat((picture, words[[7, 8, 3]]))[None]  # a text that ends in "ring"
        attention = decoder(inputs_embeds=states, output_attentions=True).attentions[1][0, 1, -1]
    assert attention[1:64:4].sum() > 0.8 and attention[64:].sum() < 0.01


def test_all_other_weights_are_unchanged():
    decoder, untouched = make_decoder(), make_decoder().state_dict()
    initialise_heads(decoder)
    changed = {name for name, weight in decoder.state_dict().items() if not torch.equal(weight, untouched[name])}
    parts = [f"layers.{layer}.self_attn.{part}_proj.weight" for layer in (0, 1) for part in "qkvo"]
    assert changed == {"embed_tokens.weight", *parts}
    for name in parts:
        dim, first = 1 if "o_proj" in name else 0, 64 if ".0." in name else 128
        others = [weights[name].narrow(dim, first, 192 - first) for weights in (decoder.state_dict(), untouched)]
        assert torch.equal(*others)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_hidden_layers": 1}, "has 1 layers, and the heads need two"),
        ({"num_key_value_heads": 1}, "has 3 heads and 1 heads of keys: give every head its own keys"),
    ],
)
def test_a_decoder_without_room_for_the_heads_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        initialise_heads(make_decoder(**settings))


def test_a_narrow_decoder_gets_the_heads_that_fit():
    decoder = make_decoder(hidden_size=64, num_attention_heads=1, num_key_value_heads=1)
    initialise_heads(decoder)
    assert attention_of_heads(decoder, 0)[0] > 0.5
