"""Tiny random models of every family that the method is tested on, and prompts for them.

A family is a row of `FAMILIES`: the fields of its config, what a picture is to it, and a split that it allows. Nothing
else of it is written down, here or in the product.

Axes: B batch, T tokens, N images.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from images_dpvr import mark_ids
from versions_dpvr import LINE_4

PAD, IMAGE, VIDEO, VISION_START, VISION_END, VOCABULARY = 0, 60, 61, 62, 63, 64
MARKED = [IMAGE, VIDEO, VISION_START, VISION_END]  # never sampled
DEPTH = 6
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP = {**TOWER, "image_size": 8, "patch_size": 4, "model_type": "clip_vision_model"}
SIGLIP = {**TOWER, "image_size": 8, "patch_size": 4, "model_type": "siglip_vision_model"}
PATCHES = {**TOWER, "image_size": 16, "patch_size": 4}
PIXTRAL = {**PATCHES, "model_type": "pixtral", "head_dim": 8}
WINDOWS = ["sliding_attention", "sliding_attention", "full_attention"] * 2 + ["sliding_attention", "full_attention"]
ANYRES = {"image_grid_pinpoints": [[16, 8], [8, 16]], "vision_feature_layer": -1}
QWEN_TOWER = {"depth": 2, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
GRIDS = [(1, 4, 4), (1, 4, 6)]  # patches of a picture: time, height, width; four of them are a token
SIZES = [(8, 16), (16, 8)]  # height and width of a picture in pixels, for models that tile it


def text(model_type: str, **fields: Any) -> dict[str, Any]:
    return {**TEXT, "model_type": model_type, **fields}


def qwen(vision: dict, rotary: dict | None = None, **fields: Any) -> dict[str, Any]:
    rotary = {"rope_type": "default", "mrope_section": [2, 1, 1], **(rotary or {})}
    rope = (
        {"rope_scaling": rotary, "rope_theta": 10000.0}
        if LINE_4
        else {"rope_parameters": {**rotary, "rope_theta": 10000.0}}
    )
    return {
        "text_config": {**TEXT, **rope, **fields},
        "vision_config": {**QWEN_TOWER, **vision},
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }


QWEN3_TOWER = {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32, "num_position_embeddings": 16}
DEEPSTACK = {**QWEN3_TOWER, "depth": 3, "deepstack_visual_indexes": [0, 1]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {
    "num_hidden_layers": 12,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


@dataclass
class Family:
    """A family of models.

    Attributes:
        model_type: its name in transformers.
        config: the fields of a tiny config of it.
        picture: what its processor makes of a picture: "pixels", "sized" (with image_sizes), "tiled" (image_sizes, and
            as many tokens as the model says), "rows" (one tensor per row) or "patches" (with a grid of them).
        split: the lowest split that it allows.
        tokens: of a picture, where this is always the same.
        size: height and width of the tower's pictures.
        recurrent: whether it has layers without attention.
        line_4: whether transformers 4 has it in a form that the method runs on. Its PaliGemma has other masks in
            training than in use, and a prompt's tokens see the answer.
        video: whether prompts may have videos.
        turns: whether a prompt in chunks is the same to the stock model as a prompt in one; PaliGemma's is one block
            whose tokens all see each other.
    """

    model_type: str
    config: dict[str, Any]
    picture: str = "pixels"
    split: int = 1
    tokens: int = 4
    size: int = 16
    recurrent: bool = False
    line_4: bool = True
    video: bool = False
    turns: bool = True
    extra: dict[str, Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=dict)

    @property
    def exists(self) -> bool:
        """Whether the installed transformers has the family, in a form that the method runs on."""
        return self.model_type in CONFIG_MAPPING and (self.line_4 or not LINE_4)

    @property
    def depth(self) -> int:
        return self.config["text_config"]["num_hidden_layers"]


def is_image(ids: torch.Tensor) -> torch.Tensor:
    return (ids == IMAGE).long()


QWEN = {} if LINE_4 else {"mm_token_type_ids": lambda ids: (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}
PATCH = {"picture": "patches", "extra": QWEN, "video": True}

FAMILIES = {
    "llava": Family("llava", {"text_config": text("llama"), "vision_config": CLIP}, size=8),
    "llava_next": Family(
        "llava_next",
        {"text_config": text("mistral", sliding_window=None), "vision_config": CLIP, **ANYRES},
        picture="tiled",
        size=8,
    ),
    "llava_onevision": Family(
        "llava_onevision",
        {"text_config": text("qwen2"), "vision_config": SIGLIP, "video_token_id": VIDEO, **ANYRES},
        picture="tiled",
        size=8,
    ),
    "internvl": Family(
        "internvl",
        {
            "text_config": text("qwen3", head_dim=8),
            "vision_config": {**PATCHES, "image_size": [16, 16], "patch_size": [4, 4]},
            "downsample_ratio": 0.5,
        },
    ),
    "idefics3": Family(
        "idefics3",
        {"text_config": text("llama"), "vision_config": PATCHES, "scale_factor": 2, "pad_token_id": PAD},
        picture="rows",
    ),
    "smolvlm": Family(
        "smolvlm",
        {"text_config": text("llama"), "vision_config": PATCHES, "scale_factor": 2, "pad_token_id": PAD},
        picture="rows",
    ),
    "qwen2_vl": Family("qwen2_vl", qwen({"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}), **PATCH),
    "qwen2_5_vl": Family(
        "qwen2_5_vl",
        qwen(
            {
                "hidden_size": 16,
                "intermediate_size": 32,
                "out_hidden_size": 32,
                "fullatt_block_indexes": [1],
                "window_size": 16,
            }
        ),
        **PATCH,
    ),
    "qwen3_vl": Family("qwen3_vl", qwen(DEEPSTACK, head_dim=8), split=2, **PATCH),
    "qwen3_vl_moe": Family("qwen3_vl_moe", qwen(DEEPSTACK, head_dim=8, **EXPERTS), split=2, **PATCH),
    "qwen3_5": Family(
        "qwen3_5",
        qwen(QWEN3_TOWER, rotary={"partial_rotary_factor": 0.5}, **LINEAR),
        split=4,
        recurrent=True,
        **PATCH,
    ),
    "mistral3": Family(
        "mistral3",
        {
            "text_config": text("mistral", head_dim=8, sliding_window=None),
            "vision_config": PIXTRAL,
            "spatial_merge_size": 2,
            "vision_feature_layer": -1,
        },
        picture="sized",
    ),
    "paligemma": Family(
        "paligemma",
        {
            "text_config": text("gemma", head_dim=8),
            "vision_config": {**SIGLIP, "vision_use_head": False, "projection_dim": 32},
            "projection_dim": 32,
        },
        size=8,
        turns=False,
        line_4=False,
        extra={"token_type_ids": torch.zeros_like},
    ),
    "gemma3": Family(
        "gemma3",
        {
            "text_config": {
                **TEXT,
                "num_hidden_layers": 8,
                "head_dim": 8,
                "query_pre_attn_scalar": 8,
                "sliding_window": 9,
                "layer_types": WINDOWS,
            },
            "vision_config": {**SIGLIP, "image_size": 16, "vision_use_head": False},
            "mm_tokens_per_image": 4,
        },
        split=3,
        extra={"token_type_ids": is_image},
    ),
    "cohere2_vision": Family(
        "cohere2_vision",
        {
            "text_config": text(
                "cohere2",
                head_dim=8,
                sliding_window=9,
                layer_types=["sliding_attention", "full_attention"] * 3,
            ),
            "vision_config": {**SIGLIP, "image_size": 16},
            "downsample_factor": 2,
            "alignment_intermediate_size": 16,
        },
        split=2,
    ),
}
PRESENT = [name for name, family in FAMILIES.items() if family.exists]


def make(name: str, dtype: torch.dtype = torch.float64, attention: str = "sdpa", seed: int = 0) -> nn.Module:
    """A tiny random model of a family, in evaluation mode, without a token that ends an answer."""
    model = make_from(name, FAMILIES[name].config, dtype, attention, seed)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, PAD
    return model


def make_from(name: str, fields: dict[str, Any], dtype: torch.dtype, attention: str, seed: int) -> nn.Module:
    """A random model of a family with these fields of its config."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[FAMILIES[name].model_type](
        **{"image_token_id": IMAGE, "tie_word_embeddings": False} | fields
    )
    experts = {"experts_implementation": "eager"} if "moe" in name and not LINE_4 else {}
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention, **experts)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "embed_tokens" in key:
                weight.normal_()
            elif weight.ndim > 1:
                weight.normal_(0, 0.15)
            elif "norm" in key or "bias" in key:
                weight.add_(0.2 * torch.randn_like(weight))
    return model.to(dtype).eval()


def make_prompts(
    name: str, model: nn.Module, layout: list[list[int]], seed: int = 1
) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Random prompts, left padded.

    Args:
        layout: for each row the lengths of its texts; an image stands between each two.

    Returns:
        The inputs of the batch, and those of each row alone.
    """
    family, generator = FAMILIES[name], torch.Generator().manual_seed(seed)
    rows, pictures, count = [], [], 0
    for lengths in layout:
        ids, of_row = [], []
        for place, length in enumerate(lengths):
            if place:
                picture, tokens = make_picture(family, model, count, generator)
                ids += [VISION_START, *[IMAGE] * tokens, VISION_END]
                of_row.append(picture)
                count += 1
            ids += torch.randint(3, 58, (length,), generator=generator).tolist()
        rows.append(ids)
        pictures.append(of_row)
    dtype = model.dtype
    alone = [collate(family, [ids], [of_row], dtype) for ids, of_row in zip(rows, pictures, strict=True)]
    return collate(family, rows, pictures, dtype), alone


def make_picture(
    family: Family, model: nn.Module, count: int, generator: torch.Generator
) -> tuple[tuple[torch.Tensor, tuple], int]:
    """The pixels and the size of the `count`-th picture, and the number of its tokens."""
    if family.picture == "patches":
        grid = GRIDS[count % 2]
        patch = 3 * 2 * 4 * 4  # colours, frames, height, width
        return (torch.randn(grid[1] * grid[2], patch, generator=generator), grid), grid[1] * grid[2] // 4
    if family.picture == "tiled":
        pixels, size = torch.randn(3, 3, family.size, family.size, generator=generator), SIZES[count % 2]
        features = model.model.get_image_features(
            pixel_values=pixels[None].to(model.dtype), image_sizes=torch.tensor([size])
        )
        features = features if isinstance(features, list | tuple) else features.pooler_output
        return (pixels, size), len(features[0])
    size = (family.size, family.size)
    return (torch.randn(3, *size, generator=generator), size), family.tokens


def collate(
    family: Family, rows: list[list[int]], pictures: list[list], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Inputs as the family's processor makes them."""
    length = max(map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask}
    inputs |= {name: make_ids(ids) for name, make_ids in family.extra.items()}
    if not any(pictures):
        return inputs
    pixels = [picture.to(dtype) for row in pictures for picture, _ in row]
    sizes = torch.tensor([size for row in pictures for _, size in row])
    if family.picture == "patches":
        return inputs | {"pixel_values": torch.cat(pixels), "image_grid_thw": sizes}
    if family.picture == "rows":
        most = max(map(len, pictures))
        padded = torch.zeros(len(rows), most, *pixels[0].shape, dtype=dtype)
        for row, of_row in zip(padded, pictures, strict=True):
            for place, (picture, _) in zip(row, of_row, strict=False):
                place.copy_(picture)
        return inputs | {"pixel_values": padded}
    inputs["pixel_values"] = torch.stack(pixels)
    if family.picture in ("tiled", "sized"):
        inputs["image_sizes"] = sizes
    if family.model_type == "llava_onevision":
        inputs["batch_num_images"] = torch.ones(len(pixels), dtype=torch.long)
    return inputs


def text_places(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """bool (B, T), True at text tokens that are no padding."""
    marks = torch.isin(inputs["input_ids"], torch.tensor(mark_ids(model.config)))
    return inputs["attention_mask"].bool() & ~marks


def forget(model: nn.Module) -> None:
    """Forget what a forward noted for the next one, as M-RoPE's `rope_deltas`."""
    for module in model.modules():
        if "rope_deltas" in vars(module):
            module.rope_deltas = None
