"""Write MiniBench as files, for other training and evaluation code.

    --format datasets    DIR/data/train-00000-of-00001.parquet    columns images and messages, pictures inside;
                         datasets.load_dataset(DIR) reads it, TRL's SFTTrainer takes it as it is
    --format llava       DIR/train.json and DIR/images/           the JSON of LLaVA-665k, pictures as PNG
    --format questions   DIR/existence.parquet, DIR/perception.parquet, ...   one row per question

    python -m minibench.export --output_dir outputs/train --format datasets --split train --size 5000

The first two hold the rows of `MiniBench(split, size, questions_per_row, seed)`. In LLaVA's JSON a row of two pictures
has a list of names as its "image", and one "<image>" per picture at the start of its first question. "questions" are
the `size` test questions of each task that the accuracy benchmark asks with `--limit size --seed seed`, if the split
is test; a row is question number "turn" of the "turns" questions of item number "item".
"""

import argparse
import sys
from pathlib import Path
from typing import NoReturn, get_args

from .scenes import Split

FORMATS = ("datasets", "llava", "questions")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that shows the module's docstring as it is, and answers an error in one line."""

    def __init__(self) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__("python -m minibench.export", None, __doc__, formatter_class=formatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help lists the options\n")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser()
    parser.add_argument("--output_dir", type=Path, required=True, help="a new or empty folder")
    parser.add_argument("--format", choices=FORMATS, required=True, help="which files to write, see above")
    parser.add_argument(
        "--split", choices=get_args(Split), required=True, help="the splits share no handwritten digit"
    )
    parser.add_argument(
        "--size", type=int, required=True, help="number of rows, or with --format questions of questions of each task"
    )
    parser.add_argument(
        "--questions_per_row",
        type=int,
        default=9,
        help="questions about the pictures of a row; not used with --format questions (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="another seed draws other pictures and questions (default: %(default)s)"
    )
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Write the files.

    Raises:
        ValueError: output_dir holds something, or size is below 1. Nothing is written then.
    """
    if args.size < 1:
        raise ValueError(f"--size is {args.size}: ask for at least 1.")
    if args.output_dir.is_file() or (args.output_dir.is_dir() and any(args.output_dir.iterdir())):
        raise ValueError(f"--output_dir {args.output_dir} is not empty: name another folder, or empty this one.")
    from .data import MiniBench
    from .files import write_datasets, write_llava, write_questions

    rows = MiniBench(args.split, args.size, args.questions_per_row, args.seed)
    if args.format == "questions":
        what, path = "questions of each task", write_questions(args.output_dir, args.split, args.size, args.seed)
    else:
        what, path = "rows", {"datasets": write_datasets, "llava": write_llava}[args.format](args.output_dir, rows)
    print(f"{args.size} {what} of the {args.split} split, seed {args.seed}, written to {path}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError, ImportError) as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
