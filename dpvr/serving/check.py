"""Answers of vLLM under a DPVR routing, held to those of transformers, token for token.

    MiniBench conversations of 0 to 4 pictures, growing turn by turn
        transformers, one by one                           the expected greedy tokens
        vLLM's engine, all at once                         prefix caching off and on, prefill chunks of several sizes
        `vllm serve`, asked by many clients at once        beside a vanilla server that is asked as well; with faults

It wants vLLM and the plugin (requirements-vllm.txt) and no GPU. It ends with status 1 if an answer differs.

    VLLM_CPU_KVCACHE_SPACE=1 python -m dpvr.serving.check --output results/serving/check.json
    python -m dpvr.serving.check --prompts 20 --routings latent --parts engine
"""

import argparse
from pathlib import Path

from dpvr.command_line import Parser, at_least, run

ROUTINGS = ("latent", "kv_substitution", "persistent_context", "none")
PARTS = ("engine", "server")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser, count = Parser(__doc__), at_least(1)
    parser.add_argument("--model", default=".", help="a DPVR repository with all weights and a processor")
    parser.add_argument("--prompts", type=count, default=200, help="conversations to ask")
    parser.add_argument("--new_tokens", type=count, default=16, help="tokens of each answer at most")
    parser.add_argument("--routings", nargs="+", choices=ROUTINGS, default=list(ROUTINGS[:2]))
    parser.add_argument(
        "--chunks", nargs="+", type=at_least(32), default=[2048, 96, 40], help="tokens of a prefill step at most"
    )
    parser.add_argument("--clients", type=count, default=16, help="requests at a time to a server")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is asked")
    parser.add_argument("--output", type=Path, help="a JSON file for what was found")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    from dpvr.serving.check_run import check

    if not check(args):
        raise SystemExit(1)


if __name__ == "__main__":
    run(main, parse_args())
