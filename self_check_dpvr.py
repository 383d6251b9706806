"""A model that nobody has tried the method on is tried before its first answer, on a few random tokens.

Two layer plans change nothing for text, whatever the weights are:

    all layers joint                              tokens are sorted into streams and merged again
    ... and in the last layer text reads the      image keys come from the stock layer, masks and positions are picked,
    image's own states as context                 and the cache's place is taken

So the decoder under these plans must give what the stock decoder gives.
"""

import torch
from torch import nn

try:
    from .configuration_dpvr import CONTEXT, JOINT, LayerPlan
    from .decoders_dpvr import RECURRENT, decoder_of, layer_kinds
    from .twins_dpvr import routed_decoder
    from .two_stream_dpvr import TwoStreamPass
except ImportError:
    from configuration_dpvr import CONTEXT, JOINT, LayerPlan
    from decoders_dpvr import RECURRENT, decoder_of, layer_kinds
    from twins_dpvr import routed_decoder
    from two_stream_dpvr import TwoStreamPass

TESTED_MODELS = (  # of tests/families.py
    "cohere2_vision",
    "dpvr_llava",
    "gemma3",
    "idefics3",
    "internvl",
    "llava",
    "llava_next",
    "llava_onevision",
    "mistral3",
    "paligemma",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_vl",
    "qwen3_vl_moe",
    "smolvlm",
)
TEXTS, IMAGES = 3, 4  # tokens of text, of an image, and of text again
SEED = 0


@torch.no_grad()
def check_untested(owner: nn.Module) -> None:
    """Try the method on a model that is not in `TESTED_MODELS`; once per model, at the cost of three short forwards.

    Args:
        owner: the vision-language model without its head.

    Raises:
        ValueError: if its decoder gives something else than the stock decoder under a plan that changes nothing.
    """
    if owner.config.model_type in TESTED_MODELS or "_routing_was_checked" in vars(owner):
        return
    decoder = decoder_of(owner)[1]
    kinds = layer_kinds(decoder.config)
    embed = owner.get_input_embeddings()
    generator, length = torch.Generator().manual_seed(SEED), 2 * TEXTS + IMAGES
    tokens = embed(torch.randint(0, embed.num_embeddings, (1, length), generator=generator).to(embed.weight.device))
    image_mask = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    image_mask[:, TEXTS:-TEXTS] = True
    stock = decoder(inputs_embeds=tokens, use_cache=False).last_hidden_state[~image_mask]
    joint = (JOINT,) * (len(kinds) - 1)
    for last in (JOINT, CONTEXT) if kinds[-1] != RECURRENT else (JOINT,):
        two_stream_pass = TwoStreamPass(nn.ModuleList(), LayerPlan(len(joint), (*joint, last)), image_mask)
        states = routed_decoder(decoder, two_stream_pass)(inputs_embeds=tokens, use_cache=False).last_hidden_state
        difference = (states[~image_mask] - stock).abs().max().item()
        allowed = 100 * torch.finfo(stock.dtype).eps * stock.abs().max().item()
        if not difference <= allowed:  # nor NaN
            raise ValueError(
                f"The method does not run on {type(owner).__name__}: under a layer plan that changes nothing its "
                f"states differ by {difference:.2g} from the stock decoder's, and {allowed:.2g} is allowed. Use a "
                f"model of a tested type ({', '.join(TESTED_MODELS)}), or report this model."
            )
    vars(owner)["_routing_was_checked"] = True
