"""Image chat with a DPVR model: streamed answers and where their time went, vanilla beside DPVR, a look inside.

    python app.py                                                     dpvr-mini, nothing downloaded
    python app.py --model me/x --port 7861                            a DPVR repository, or a stock model
    python app.py --model my-adapter --base llava-hf/llava-1.5-7b-hf  a PEFT adapter and its base

A Hugging Face Space as it stands. docs/chat.md says how to call it from Python.
"""

import argparse
from pathlib import Path

from dpvr.command_line import Parser, run

ROOT = str(Path(__file__).parent)
MINI = """\
This is **dpvr-mini**, a LLaVA of 6 million parameters. It was trained on pictures of three to six coloured shapes and
handwritten digits, and on nothing else. It can answer short questions about those, in English and Chinese: *What
colour is the star? Which digit is at the top left? How many squares are there? Is there a red circle?*, or with
options, as in the examples. **It cannot answer anything about photographs**, people or text, and will name shapes all
the same. Of its own kind of pictures it does not know everything either: the README has its scores."""
OTHER = "This is **{name}**. Ask about one picture or several."


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--model",
        default=ROOT,
        help="a DPVR repository, a PEFT adapter or a stock vision-language model, by Hub id or folder",
    )
    parser.add_argument("--base", help="the model under an adapter; default: the one that the adapter names")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of the model on the Hub")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run the code in the model's repository; else none of it runs"
    )
    parser.add_argument("--host", help="default: GRADIO_SERVER_NAME, else this machine alone, 127.0.0.1")
    parser.add_argument("--port", type=int, help="default: GRADIO_SERVER_PORT, else the first free one from 7860 on")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    from dpvr.inference.chat import Answerer, load_any
    from dpvr.inference.page import build, launch, write_examples
    from dpvr.inference.uploads import own_folder

    model, processor = load_any(args.model, args.base, args.revision, trust_remote_code=args.trust_remote_code)
    about = MINI if args.model == ROOT else OTHER.format(name=args.model)
    with own_folder() as folder:
        launch(build(Answerer(model, processor), about, write_examples(folder)), args.host, args.port)


if __name__ == "__main__":
    run(main, parse_args())
