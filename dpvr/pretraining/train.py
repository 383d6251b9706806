"""Train a small vanilla LLaVA from scratch on MiniBench.

    vision tower    PatchNamer on pictures alone (tower.py)                        in place of CLIP's training
    decoder         auxiliary tasks without pictures (auxiliary_tasks.py)          in place of Vicuna's training
    projector       Aligner: patches to the embeddings of their names (tower.py)   in place of LLaVA's first stage
    both            captions, auxiliary tasks, questions; a second round           in place of LLaVA's second stage

    python -m dpvr.pretraining.train --output_dir outputs/pretrain

writes DIR/final (model and processor), DIR/log.jsonl (a JSON line per start, logging step and validation) and
checkpoints; after an interruption the same command resumes at the last checkpoint. It computes in bfloat16 where the
hardware does, else in float32. The final weights are stored in float16, and load in float32.
"""

import argparse
from pathlib import Path

from dpvr.command_line import Parser, run


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of a new run, or of one to resume")
    model = parser.add_argument_group("model")
    model.add_argument("--text_layers", type=int, default=12, help="decoder layers")
    model.add_argument("--text_width", type=int, default=192, help="decoder's hidden size, a multiple of 64")
    model.add_argument("--vision_layers", type=int, default=6, help="layers of the vision tower")
    model.add_argument("--vision_width", type=int, default=192, help="vision tower's hidden size, a multiple of 32")
    data = parser.add_argument_group("data")
    data.add_argument("--tower_pictures", type=int, default=60_000, help="pictures to train the vision tower on")
    data.add_argument("--texts", type=int, default=9_600, help="texts to train the decoder on")
    data.add_argument("--aligned_pictures", type=int, default=12_000, help="pictures to train the projector on")
    data.add_argument("--pictures", type=int, default=82_000, help="rows to train projector and decoder on")
    data.add_argument("--further_pictures", type=int, default=64_000, help="rows to train both on again")
    data.add_argument("--questions_per_row", type=int, default=8, help="questions about the pictures of one row")
    steps = parser.add_argument_group("run")
    steps.add_argument("--batch_size", type=int, default=24, help="rows of a training step")
    steps.add_argument("--num_workers", type=int, default=1, help="processes that draw pictures")
    steps.add_argument("--logging_steps", type=int, default=20, help="training steps between two lines in the log")
    steps.add_argument("--save_steps", type=int, default=100, help="training steps between two checkpoints")
    steps.add_argument("--validation_steps", type=int, default=250, help="training steps between two validations")
    steps.add_argument("--validation_questions", type=int, default=40, help="validation questions of each task")
    steps.add_argument("--compile", action="store_true", help="compile the decoder layers; needs a C++ compiler")
    steps.add_argument("--seed", type=int, default=0, help="seed of the weights and of the rows")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    from dpvr.pretraining.stages import pretrain

    pretrain(args)


if __name__ == "__main__":
    run(main, parse_args())
