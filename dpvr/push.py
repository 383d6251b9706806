"""Push a saved model to the Hugging Face Hub, with a model card made from the record of its training.

    outputs/my-run --side branch or all weights, config, code, processor, training.json--> one commit --> me/x

Log in first with `hf auth login`. A push that fails leaves the repository as it was: run the command again.

    python -m dpvr.push outputs/my-run me/x
    python -m dpvr.push my-adapter me/x          # a PEFT adapter on any vision-language model
    python -m dpvr.push outputs/my-run me/x --private
"""

import argparse

from dpvr.command_line import Parser, run


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "folder", help="the --output_dir of train_sft.py, or a model or adapter that save_pretrained wrote"
    )
    parser.add_argument("repo_id", help="the repository, such as me/x; created if it does not exist")
    parser.add_argument(
        "--private", action="store_true", help="make the repository private, if it is new; else the account decides"
    )
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    from hub_dpvr import upload

    url = upload(args.folder, args.repo_id, private=args.private or None)
    print(f"Pushed {args.folder} to {args.repo_id}: {url}")


if __name__ == "__main__":
    run(main, parse_args())
