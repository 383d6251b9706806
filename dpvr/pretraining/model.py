"""The small LLaVA before its training: CLIP ViT, GELU projector, Llama decoder, with random weights.

    picture -> ViT, read at its last layer but one -> projector --.
                                                                  +-> decoder -> next token
    text    -> embeddings ----------------------------------------'   three heads are initialised by hand

The linear layers train in bfloat16 by autocast and the attention in float32: on a CPU with instructions for bfloat16
that is the fastest combination.
"""

import argparse
from typing import Any

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dpvr.pretraining.head_initialisation import initialise_heads
from dpvr.pretraining.processor import PATCH
from minibench.scenes import SIDE


def attention_in_float32(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """SDPA outside autocast: on a CPU its backward is several times faster in float32 than in bfloat16."""
    with torch.autocast(query.device.type, enabled=False):
        return sdpa_attention_forward(module, query.float(), key.float(), value.float(), *args, **kwargs)


AttentionInterface.register("sdpa_float32", attention_in_float32)
AttentionMaskInterface.register("sdpa_float32", sdpa_mask)


def make_model(processor: LlavaProcessor, args: argparse.Namespace) -> LlavaForConditionalGeneration:
    """Return a LLaVA to be trained; all weights are random but for three heads, see `initialise_heads`.

    Args:
        processor: whose vocabulary and pictures it is for.
        args: `vision_layers`, `vision_width`, `text_layers` and `text_width`.
    """
    tokenizer = processor.tokenizer
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlavaConfig(
        vision_config=_vision_config(args.vision_layers, args.vision_width),
        text_config=_text_config(args.text_layers, args.text_width, vocab_size=len(tokenizer), **special),
        image_token_index=processor.image_token_id,
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        **special,
    )
    config._attn_implementation = "sdpa_float32"
    model = LlavaForConditionalGeneration(config)
    initialise_heads(model.model.language_model)
    return model


def _vision_config(layers: int, width: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        image_size=SIDE,
        patch_size=PATCH,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        projection_dim=width,
    )


def _text_config(layers: int, width: int, **vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=5 * width // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        **vocabulary,
    )
