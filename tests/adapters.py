"""Adapters on the tiny LLaVA whose side branches are far from where they started, and what is compared of them."""

from pathlib import Path

import torch
from conftest import IMAGE_TOKEN_ID, make_llava
from peft import get_peft_model
from safetensors.torch import load_file
from test_loading import SIDE_BRANCH_KEYS

from adapter_dpvr import DpvrConfig

SAVED_KEYS = {f"base_model.model.{key}" for key in SIDE_BRANCH_KEYS}


def save_trained(folder: Path, seed: int, **fields: object) -> None:
    shaken(get_peft_model(make_llava(), DpvrConfig(**{"split_layer": 2, **fields})), seed).save_pretrained(folder)


def shaken(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Move everything that can be trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.add_(0.3 * noise)
    return model


@torch.no_grad()
def logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs).logits[inputs["attention_mask"].bool() & (inputs["input_ids"] != IMAGE_TOKEN_ID)]


def generate(model: torch.nn.Module, inputs: dict[str, torch.Tensor], **options: object) -> list[list[int]]:
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "suppress_tokens": [IMAGE_TOKEN_ID]}
    return model.generate(**inputs, **settings | options).tolist()


def without_prefix(folder: Path) -> dict[str, torch.Tensor]:
    weights = load_file(folder / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): weight for name, weight in weights.items()}
