"""What fitting a latent takes at the shape of a real model, on random weights: seconds a picture, and the solution.

    prefill of the base, and the same with moments taken     in turn, one picture each: what the fit adds to inference
    solution in closed form                                  once, whatever the number of pictures
    bytes                                                    of the moments, counted; and the process's peak

The image's features are given and no tower runs, as in `dpvr.benchmarks.latency --model`; needs transformers 5.18.

    python -m dpvr.benchmarks.fit_time --model configs/shapes/smolvlm2-500m.json --threads 1
"""

import argparse
from pathlib import Path
from typing import Any

from dpvr.benchmarks.setups import IMAGE_TOKENS
from dpvr.command_line import Parser, at_least, run


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser, count = Parser(__doc__), at_least(1)
    parser.add_argument("--model", required=True, help="a file of configs/shapes, a folder or a name on the Hub")
    parser.add_argument("--pictures", type=count, default=8, help="that are timed")
    parser.add_argument("--warmup", type=at_least(0), default=1, help="pictures before them")
    parser.add_argument("--image_tokens", type=count, default=IMAGE_TOKENS, help="of each picture")
    parser.add_argument("--text_tokens", type=count, default=128, help="beside each")
    parser.add_argument("--latent_rank", type=count, help="default: a quarter of the decoder's width")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the base's weights")
    parser.add_argument("--threads", type=count, help="threads of a CPU; default: what torch takes")
    parser.add_argument("--output", type=Path, help="write the JSON document to this file")
    parser.add_argument("--json", action="store_true", help="print the JSON document as the last line")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from dpvr.benchmarks.fit_costs import measure
    from dpvr.record import publish, run_record

    if args.threads:
        torch.set_num_threads(args.threads)
    names = ("model", "image_tokens", "text_tokens", "device", "dtype", "warmup")
    document = {
        **run_record("-m dpvr.benchmarks.fit_time"),
        **{name: vars(args)[name] for name in names},
        "threads": torch.get_num_threads(),
        **measure(args),
    }
    base, fitted, ratio = (document[name] for name in ("prefill_seconds", "fit_seconds", "ratio"))
    print(
        f"{document['shape']}, plan {document['plan']}, rank {document['latent_rank']}: a picture takes {base:.2f} s "
        f"to prefill and {fitted:.2f} s to fit on, {ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f}) times as long; "
        f"the solution {document['solve_seconds']:.1f} s. Moments hold {document['moments_bytes'] / 1e9:.2f} GB."
    )
    publish(document, args.output, args.json)
    return document


if __name__ == "__main__":
    run(main, parse_args())
