"""Image chat with a DPVR model: streamed answers and where their time went, vanilla beside DPVR, a look inside.

    python app.py                                                           dpvr-mini, nothing downloaded
    python app.py --model me/x --port 7861                                  a DPVR repository, or a stock model
    python app.py --model Qwen/Qwen3-VL-2B-Instruct --adapter my-adapter    a stock model with a PEFT adapter

A Hugging Face Space as it stands. docs/chat.md says how to call it from Python.
"""

import argparse
from pathlib import Path

from dpvr.command_line import Parser, run

ROOT = str(Path(__file__).parent)
MINI = """\
Ask **dpvr-mini** (6 million parameters) about small pictures of coloured shapes and digits, the only ones it knows. \
Picture tokens leave its decoder early, which spares most of the work before the first word."""
OTHER = "Ask **{name}** about one picture or several."


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--model",
        default=ROOT,
        help="a DPVR repository, a PEFT adapter or a stock vision-language model, by Hub id or folder",
    )
    parser.add_argument("--adapter", help="a PEFT adapter of this method on --model, by Hub id or folder")
    parser.add_argument("--base", help="the model under an adapter given as --model; default: the one that it names")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of the model on the Hub")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run the code in the model's repository; else none of it runs"
    )
    parser.add_argument("--host", help="default: GRADIO_SERVER_NAME, else this machine alone, 127.0.0.1")
    parser.add_argument("--port", type=int, help="default: GRADIO_SERVER_PORT, else the first free one from 7860 on")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    from dpvr.inference.chat import Answerer
    from dpvr.inference.loading import load_any
    from dpvr.inference.page import build, launch, write_examples
    from dpvr.inference.uploads import own_folder

    if args.adapter and args.base:
        raise ValueError("--adapter lies on --model, and --base under an adapter given as --model: give one of both.")
    name, base = (args.adapter, args.model) if args.adapter else (args.model, args.base)
    model, processor = load_any(name, base, args.revision, trust_remote_code=args.trust_remote_code)
    is_mini = args.model == ROOT and args.adapter is None
    about = MINI if is_mini else OTHER.format(name=args.model)
    with own_folder() as folder:
        examples = write_examples(folder, photographs=not is_mini)
        launch(build(Answerer(model, processor), about, examples), args.host, args.port)


if __name__ == "__main__":
    run(main, parse_args())
