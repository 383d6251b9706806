"""What layer plans cost on any vision-language model, from its config alone: prefill FLOPs, K/V bytes, parameters.

    config.json of a model on the Hub, of a folder, or a file --layers without weights, counted-->
        a row per plan: vanilla; late fusion, kv_substitution and text_only at the split; the latent if a rank is
        given; and a split at an eighth of the depth that reads in every layer of attention

No weights are downloaded and no code of a repository is run. FLOPs are the language model's, for the logits of the
last token. With --budget the cheapest of the plans that read the image and cost no more is named. Plans that the
decoder cannot run are left out with the reason.

    python -m dpvr.costs Qwen/Qwen3-VL-8B-Instruct --split_layer 4 --image_tokens 2048
    python -m dpvr.costs configs/shapes/qwen3-vl-8b.json --split_layer 4 --image_tokens 2048 --latent_rank 512
"""

import argparse

from dpvr.command_line import Parser, at_least, run


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("model", help="a name on the Hub, a folder with a config.json, or the path of such a file")
    parser.add_argument("--split_layer", type=at_least(0), required=True, help="layers that image and text share")
    parser.add_argument("--image_tokens", type=at_least(1), required=True, help="image tokens of a prompt")
    parser.add_argument("--text_tokens", type=at_least(1), default=128, help="text tokens of a prompt")
    parser.add_argument("--latent_rank", type=at_least(1), help="width of the latent; without it the plan is left out")
    parser.add_argument("--budget", type=share, help="prefill FLOPs as a share of vanilla's, such as 0.4")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of K/V")
    parser.add_argument("--revision", default="main", help="of the model on the Hub")
    parser.add_argument(
        "--short_vanilla",
        action="store_true",
        help="count vanilla's last layer for the last token alone, as that of the plans; stock decoders run all",
    )
    parser.add_argument("--json", action="store_true", help="print the document instead of the table")
    return parser.parse_args(argv)


def share(text: str) -> float:
    """The type of an option that is a share above 0 and at most 1."""
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share of vanilla's FLOPs: give a number above 0 and up to 1")
    return float(text)


def main(args: argparse.Namespace) -> None:
    import json

    from dpvr.cost_table import count, table

    document = count(args)
    print(json.dumps(document, indent=1) if args.json else table(document))


if __name__ == "__main__":
    run(main, parse_args())
