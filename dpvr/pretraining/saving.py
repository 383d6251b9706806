"""The small LLaVA, and dpvr-mini with its side branch, as repositories that load by themselves."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, LlavaForConditionalGeneration, LlavaProcessor

from dpvr.pretraining.processor import save_processor
from modeling_dpvr import DpvrLlavaForConditionalGeneration
from processors_dpvr import load_processor

VISION_NAME = re.compile(r"vision_tower\.(?!vision_model\.)")


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Save float16 weights with a config that asks for float32: half the file size, computation as in training.

    The tower's weights are named as in LLaVA's published checkpoints, which transformers 4.57 and 5 both read. Version
    5 itself writes them without `vision_model`; version 4 would not find them and leave the tower random.
    """
    model.to(torch.float16).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights = {VISION_NAME.sub(r"vision_tower.vision_model.", name): weight for name, weight in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("use_cache", None)  # Trainer turns it off
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_processor(processor, folder)


def assemble(side_branch: str, folder: Path) -> DpvrLlavaForConditionalGeneration:
    """Join a side branch and the base that it names in one repository, and return the model.

    Args:
        side_branch: the folder that train_sft.py wrote.
        folder: where config, code, weights and processor go.
    """
    model = DpvrLlavaForConditionalGeneration.from_pretrained(side_branch, dtype=torch.float32)
    tokens = {name: vars(model.generation_config)[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    # An answer never holds a picture, so sampling must not draw the token that stands for one.
    model.generation_config = GenerationConfig(**tokens, suppress_tokens=[model.config.image_token_id])
    save(model, load_processor(side_branch), folder)
    return model
