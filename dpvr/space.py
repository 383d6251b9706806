"""Push the chat to the Hugging Face Hub as a Space, in one commit; on ZeroGPU hardware it runs as it is.

    app.py, *_dpvr.py, dpvr/, minibench/, what the page reads of results/     as they are here
    spaces/README.md, spaces/requirements.txt                                 the Space's settings and pins
    space.py                                                                  starts app.py with the model named here
    dpvr-mini's own files                                                     unless another model is named

Log in first with `hf auth login`. Then choose the hardware in the Space's settings; ZeroGPU needs a PRO account.

    python -m dpvr.space me/dpvr-chat
    python -m dpvr.space me/dpvr-chat --model Qwen/Qwen3-VL-2B-Instruct --adapter me/my-adapter
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from dpvr.command_line import Parser, run

ROOT = Path(__file__).parents[1]
CODE = ("app.py", "*_dpvr.py", "dpvr/**/*.py", "dpvr/inference/*.css", "minibench/*.py", "LICENSE")
RECORDS = (
    "results/dpvr_mini/accuracy.json",
    "results/dpvr_mini/latent/accuracy.json",
    "results/dpvr_mini/pictures.safetensors",
)
MINI = ("model.safetensors", "*config.json", "tokenizer.json", "special_tokens_map.json", "chat_template.jinja")
START = """\
from app import main, parse_args

main(parse_args({arguments!r}))
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("repo_id", help="the Space, such as me/dpvr-chat; created if it does not exist")
    parser.add_argument("--model", help="a model on the Hub, as app.py takes it; default: dpvr-mini, which is pushed")
    parser.add_argument("--adapter", help="a PEFT adapter of this method on --model, on the Hub")
    parser.add_argument("--private", action="store_true", help="make the Space private, if it is new")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    from hub_dpvr import require_hub_base, upload_space

    if args.adapter and not args.model:
        raise ValueError("An adapter needs its base: name it with --model.")
    named = {"--model": args.model, "--adapter": args.adapter}
    arguments = [part for option, value in named.items() if value for part in (option, value)]
    for value in filter(None, named.values()):
        require_hub_base(value, "name one on the Hub")
    contents = dict(files(with_model=args.model is None))
    contents["space.py"] = START.format(arguments=arguments).encode()
    url = upload_space(args.repo_id, contents, private=args.private or None)
    print(f"Pushed {len(contents)} files to the Space {args.repo_id}: {url}")


def files(*, with_model: bool) -> Iterator[tuple[str, bytes]]:
    """The files of the Space by their names in it."""
    for pattern in (*CODE, *RECORDS, *(MINI if with_model else ())):
        for path in sorted(ROOT.glob(pattern)):
            yield path.relative_to(ROOT).as_posix(), path.read_bytes()
    for name in ("README.md", "requirements.txt"):
        yield name, (ROOT / "spaces" / name).read_bytes()


if __name__ == "__main__":
    run(main, parse_args())
