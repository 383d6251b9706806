"""Put dpvr-mini together: the vanilla base and a trained side branch in one repository that loads by itself.

dpvr.pretraining.train  ->  DIR/final                vanilla LLaVA and processor
train_sft.py            ->  outputs/dpvr-mini-sft    the side branch, trained on it
this command            ->  a folder with config, code, weights (base and side branch) and processor

python -m dpvr.pretraining.assemble --side_branch outputs/dpvr-mini-sft --output_dir outputs/dpvr-mini
"""

import argparse
from pathlib import Path

from dpvr.command_line import Parser, run


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--side_branch", required=True, help="folder that train_sft.py wrote")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the new repository")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    from dpvr.pretraining.saving import assemble

    model = assemble(args.side_branch, args.output_dir)
    total = model.num_parameters()
    branch = sum(parameter.numel() for parameter in model.model.side_branch.parameters())
    print(f"Written to {args.output_dir}: {total:,} parameters, {branch:,} of them in the side branch.")


if __name__ == "__main__":
    run(main, parse_args())
