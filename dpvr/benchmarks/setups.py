"""What the cost benchmarks measure, by name: shapes of a LLaVA, and the methods that are compared on them.

Nothing heavy is imported here: the commands read the names for their options.
"""

from typing import NamedTuple

IMAGE_TOKENS, IMAGE_TOKEN_ID = 576, 3
MINI = "dpvr-mini"  # the model in the repository's root, beside the shapes below, whose weights are random
LARGE = 4096  # from this width on a shape is only measured on a GPU, and counted without one


class Shape(NamedTuple):
    """Width and depth of the decoder and of a vision tower of 576 patches, and where late fusion splits."""

    width: int
    mlp_width: int
    layers: int
    heads: int
    split_layer: int
    vision_width: int
    vision_layers: int


SHAPES = {
    "512x32": Shape(512, 1376, 32, 8, 18, 64, 2),
    "1024x32": Shape(1024, 2752, 32, 16, 18, 64, 2),
    "llava-1.5-7b": Shape(4096, 11008, 32, 32, 18, 1024, 24),
    "llava-1.5-13b": Shape(5120, 13824, 40, 40, 24, 1024, 24),
    "64x4": Shape(64, 128, 4, 4, 2, 32, 2),
}

FLASH = "vanilla_flash"
ROUTINGS = {
    "vanilla": {"routing": "none", "num_side_layers": 0},
    "late_fusion": {},
    "late_fusion_k2": {"num_fusion_layers": 2},
    "persistent_context": {"routing": "persistent_context"},
    "kv_substitution": {"routing": "kv_substitution"},
    "text_only": {"routing": "text_only", "num_side_layers": 0},  # VTW
}
EARLY_READING = {"early_reading_4": (10, 12, 14, 16), "early_reading_8": range(10, 18)}  # of 32 layers, split at 8
PRUNING = {"layer": 3, "keep": 0.5}
PRUNINGS = {"fastv": "attention", "random_pruning": "random"}
METHODS = (
    "vanilla",
    FLASH,
    "late_fusion",
    "late_fusion_k2",
    *EARLY_READING,
    *("persistent_context", "kv_substitution", "text_only"),
    *PRUNINGS,
)
FAMILY_METHODS = ("vanilla", "late_fusion", "read_everywhere", "latent", *PRUNINGS)  # on a model of any family
CACHES = ("growing", "static")
TRAINED_METHODS = ("late_fusion", "lora_r16", "lora_r64", "full")
FAMILY_TRAINED_METHODS = ("late_fusion", "read_everywhere", "latent", "lora_r16", "lora_r64", "full")
