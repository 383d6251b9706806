"""Train with TRL's SFTTrainer: a DPVR side branch (paper section 3.4) or a latent; or LoRA or all weights, to compare.

    rows            MiniBench, or conversations of your own
      |
    --method dpvr   base, frozen --> shared stack --> side branch or latent, trained --> deep layers, frozen --> loss
             lora   the vanilla model with LoRA in the decoder's linear layers      the same rows in the same order
             full   the vanilla model, projector and decoder trained                the same rows in the same order
      |
    --objective     sft: replies     distil: the base's own predictions     match: the base's own keys and values
      |
    output_dir      the side branch alone, its config and code, the processor, training.json; adapter/ for PEFT
      |
    --push_to_hub   all of this and a card in one commit

Nothing is stored for backward below the side branch and in text-only layers, so gradient checkpointing is not wanted.
A run that was killed goes on with --resume_from_checkpoint last, if it saved checkpoints. Of several processes each
takes its share of a step's rows; FSDP and ZeRO-3 spread the weights too.

    python train_sft.py                                          # dpvr-mini adapts to other pictures, on a CPU
    python train_sft.py --compare late_fusion lora               # and so do the paper's method and LoRA
    python train_sft.py --data minibench --routing late_fusion   # the paper's method on ordinary pictures
    python train_sft.py --data minibench --routing late_fusion --split_layer 4 --fusion_layers 5 6 7
    python train_sft.py --data minibench --routing late_fusion --split_layer auto     # where the probe would split
    python train_sft.py --plan results/saturation/plan_0.45.yaml # what dpvr.analysis.probe --find_plan has found
    python train_sft.py --routing kv_substitution --objective sft --learning_rate 5e-4 --max_steps 100 --seed 1
    python train_sft.py --method lora --lora_r 16 --learning_rate 2e-4
    python train_sft.py --model_name_or_path me/dpvr-mini --push_to_hub --hub_model_id me/x
    python train_sft.py --config configs/llava_1.5_7b.yaml --data llava_v1_5_mix665k.json --image_folder images
    accelerate launch --config_file configs/accelerate_ddp.yaml train_sft.py --config configs/llava_1.5_7b.yaml ...
"""

import sys
from typing import TYPE_CHECKING, Any

from dpvr.command_line import run
from dpvr.training.options import DpvrArguments, make_help

if TYPE_CHECKING:
    from dpvr.training.arguments import BaseArguments, SideBranchSFTConfig


def parse_args(argv: list[str] | None = None) -> "tuple[DpvrArguments, SideBranchSFTConfig, BaseArguments]":
    """What to train, how, and on which base; `--help` ends here, before anything heavy is imported."""
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        make_help(__doc__).parse_args(["--help"])
    from dpvr.training.arguments import parse

    return parse(argv)


def main(args: DpvrArguments, training: "SideBranchSFTConfig", base: "BaseArguments") -> dict[str, Any]:
    """Train; returns what training.json holds."""
    from dpvr.training.run import train

    return train(args, training, base)


if __name__ == "__main__":
    run(lambda: main(*parse_args()))
