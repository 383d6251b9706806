"""What the chat's comparison finds on dpvr-mini for one question about one, two, four and eight pictures.

    MiniBench scenes, "Is there a red cross?" --Answerer.compare--> both answers, the ratio of the prefill times and
                                                                    its 95% interval, first words, FLOPs

The machine has to be quiet: where an interval stays wide the record says so. Written to results/dpvr_mini/chat.json.

    python -m dpvr.benchmarks.chat
"""

import argparse
from pathlib import Path
from typing import Any

from dpvr.command_line import Parser, at_least, run

ROOT = Path(__file__).parents[2]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model", default=str(ROOT), help="a DPVR repository (id or path); default: dpvr-mini")
    parser.add_argument("--pictures", type=at_least(1), nargs="+", default=[1, 2, 4, 8], help="of the question")
    parser.add_argument("--patience", type=at_least(1), default=60, help="seconds for each comparison's rounds")
    parser.add_argument("--output", default=str(ROOT / "results" / "dpvr_mini" / "chat.json"))
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> dict[str, Any]:
    from dpvr.inference.chat import Answerer
    from dpvr.inference.loading import load
    from dpvr.record import publish, run_record

    answerer = Answerer(*load(args.model))
    found = {
        **run_record("-m dpvr.benchmarks.chat"),
        "question": "Is there a red cross?",
        "rows": [measure(answerer, "Is there a red cross?", number, args.patience) for number in args.pictures],
    }
    publish(found, args.output)
    return found


def measure(answerer: Any, question: str, pictures: int, patience: float) -> dict[str, Any]:
    """One comparison, about MiniBench's first test scenes."""
    from dpvr.inference.chat import Turn
    from minibench.scenes import make_scene

    scenes = tuple(make_scene("test", 0, index).draw() for index in range(pictures))
    *_, (_, found) = answerer.compare([Turn(question, scenes)], patience=patience)
    vanilla, own = found.medians
    return {
        "pictures": pictures,
        "image_tokens": own.image_tokens,
        "text_tokens": own.text_tokens,
        "answers": list(found.texts),
        "prefill_ratio": {**found.ratio._asdict(), "conclusive": found.ratio.is_narrow, "rounds": found.repetitions},
        "prefill_ms": [vanilla.prefill, own.prefill],
        "first_word_ms": [vanilla.first_token, own.first_token],
        "prefill_flops": own.prefill_gflops / vanilla.prefill_gflops,
        "keys_and_values": own.kv_mib / vanilla.kv_mib,
    }


if __name__ == "__main__":
    run(lambda: main(parse_args()))
