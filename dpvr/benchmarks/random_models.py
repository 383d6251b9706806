"""A LLaVA of random weights in one of the shapes of setups.py: what an answer or a training step costs depends on the
shape alone, so nothing is downloaded.
"""

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from dpvr.benchmarks.setups import IMAGE_TOKEN_ID, IMAGE_TOKENS, LARGE, Shape

SEED = 0  # of the weights


def make_llava(shape: Shape, device: str, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    """A LLaVA that takes pictures of 336 pixels in patches of 14, as LLaVA-1.5 does; on "meta" it has no weights."""
    text = LlamaConfig(
        vocab_size=32064 if shape.width >= LARGE else 1000,
        hidden_size=shape.width,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
    )
    vision = CLIPVisionConfig(
        hidden_size=shape.vision_width,
        intermediate_size=4 * shape.vision_width,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=max(1, shape.vision_width // 64),
        image_size=336,
        patch_size=14,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN_ID, image_seq_length=IMAGE_TOKENS
    )
    torch.manual_seed(SEED)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # built in it at once: a conversion would be the peak of all memory
    try:
        with torch.device(device):
            return LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(usual)
