"""Put dpvr-mini together: the vanilla base and a trained side branch in one repository that loads by itself.

minibench.pretrain  ->  DIR/final                vanilla LLaVA and processor
train_sft.py        ->  outputs/dpvr-mini-sft    the side branch, trained on it
this                ->  a folder with config, code, weights (base and side branch) and processor

python -m dpvr.pretraining.assemble --side_branch outputs/dpvr-mini-sft --output_dir .
"""

import argparse
from pathlib import Path

import torch
from transformers import GenerationConfig

from dpvr.pretraining.train import save
from loading_dpvr import load_processor
from modeling_dpvr import DpvrLlavaForConditionalGeneration


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Join a side branch and its base in one repository.")
    parser.add_argument("--side_branch", required=True, help="what train_sft.py wrote; it names its base")
    parser.add_argument("--output_dir", type=Path, required=True)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    model = DpvrLlavaForConditionalGeneration.from_pretrained(args.side_branch, dtype=torch.float32)
    tokens = {name: vars(model.generation_config)[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    # an answer never holds a picture; suppressing its mark keeps sampling from ever drawing one
    model.generation_config = GenerationConfig(**tokens, suppress_tokens=[model.config.image_token_id])
    save(model, load_processor(args.side_branch), args.output_dir)


if __name__ == "__main__":
    main(parse_args())
