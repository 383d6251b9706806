"""What vLLM gains from a plan: time to the first token and requests per second, vanilla and routed in turn.

a LLaVA of random weights in the shape of a real decoder, its latent too
    one engine; between two requests only the plan is exchanged
        one request at a time     time to the first token
        several at once           requests per second
        hooks on every layer      tokens that its projections and MLP ran: they equal the plan's, or status 1

VLLM_CPU_KVCACHE_SPACE=2 python -m dpvr.serving.benchmark --output results/serving/benchmark.json
VLLM_CPU_KVCACHE_SPACE=1 python -m dpvr.serving.benchmark --layers 3 --rounds 6       # a minute; another shape
"""

import argparse
from pathlib import Path

from dpvr.command_line import Parser, at_least, run


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser, count = Parser(__doc__), at_least(1)
    parser.add_argument("--shape", default="configs/shapes/llava-onevision-0.5b.json", help="its decoder is taken")
    parser.add_argument("--layers", type=at_least(2), help="of the decoder, in place of the shape's")
    parser.add_argument("--split_layer", type=count, help="of the latent; default: an eighth of the layers")
    parser.add_argument("--latent_rank", type=count, default=192)
    parser.add_argument("--text_words", type=count, default=100, help="of each prompt, beside a picture of 576 tokens")
    parser.add_argument("--requests", type=count, default=4, help="at once, for requests per second")
    parser.add_argument("--new_tokens", type=count, default=8, help="of each answer, for requests per second")
    parser.add_argument("--rounds", type=at_least(6), default=10, help="of both in turn; an interval wants six")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--output", type=Path, help="a JSON file for what was found")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    from dpvr.serving.benchmark_run import benchmark

    if not benchmark(args):
        raise SystemExit(1)


if __name__ == "__main__":
    run(main, parse_args())
