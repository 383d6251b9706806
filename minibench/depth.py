"""How deep each task uses the picture: scores when the text stops seeing it after layer s, nothing trained.

    routing text_only, split_layer s = 1 .. L - 1        layers 0 .. s-1 image and text together, the others text alone
    routing none                                         vanilla

This is the causal side of the paper's saturation (section 3.1; LF-ideal without its side branch). It uses the
validation split, so that a split layer may be chosen by it.

    python -m minibench.depth --output results/dpvr_mini/depth.json
"""

import argparse
import json
from pathlib import Path
from typing import Any

from modeling_dpvr import DpvrLlavaForConditionalGeneration

from .evaluate import evaluate
from .processor import load_processor
from .record import run_record


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Scores by the layer after which the text no longer sees the picture."
    )
    parser.add_argument("--model_name_or_path", default=".", help="a DPVR repository (id or path)")
    parser.add_argument("--limit", type=int, default=100, help="validation questions per task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> dict[str, Any]:
    model = DpvrLlavaForConditionalGeneration.from_pretrained(args.model_name_or_path)
    processor = load_processor(args.model_name_or_path)
    num_layers = model.config.text_config.num_hidden_layers
    rows = []
    for split_layer in range(1, num_layers + 1):
        if split_layer < num_layers:
            model.config.split_layer = split_layer
            model.set_routing("text_only")
        else:
            model.set_routing("none")
        name = f"{split_layer} layers"
        options = {"split": "validation", "num_questions": args.limit, "seed": args.seed}
        scores = evaluate(model, processor, description=name, **options)
        rows.append({"layers_with_image": split_layer, **scores})
    document = {**run_record("-m minibench.depth"), "limit": args.limit, "seed": args.seed, "rows": rows}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return document


if __name__ == "__main__":
    main(parse_args())
