"""Make every table and figure of the documents from the records in results/.

results/ --> README.md and docs/*.md     the blocks between marks such as <!-- accuracy --> and <!-- /accuracy -->
         --> docs/*.png, the figures of results/minibench and results/saturation
         --> results/minibench/table2.json     the rows of the paper's Table 2
claims.json --> printed                what does not hold of the numbers in the documents' sentences

python -m dpvr.reports                   in the repository's root, after a measurement
"""

import argparse
from pathlib import Path

from dpvr.command_line import Parser, run


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    return Parser(__doc__).parse_args(argv)


def main(args: argparse.Namespace) -> None:
    from dpvr.record import publish, run_record
    from dpvr.reports.accuracy import table2
    from dpvr.reports.blocks import DOCS, RESULTS, blocks, draw
    from dpvr.reports.documents import fill
    from dpvr.reports.grid_results import Results
    from dpvr.reports.kept import problems

    grid = Results(RESULTS / "minibench")
    documents = blocks(RESULTS)
    for path, texts in documents.items():
        fill(Path(path), texts)
    record = run_record("-m dpvr.reports")
    publish({"rows": table2(grid), "settings": grid.settings, **record}, RESULTS / "minibench" / "table2.json")
    figures = draw(RESULTS, DOCS)
    print(f"{sum(map(len, documents.values()))} blocks of {len(documents)} documents were filled:")
    for path, texts in documents.items():
        print(f"{path:<24}{', '.join(texts)}")
    print(f"{'figures':<24}{', '.join(map(str, figures))}")
    found = problems(Path())
    print("\n".join([f"{len(found)} numbers or claims in sentences do not hold.", *found]))


if __name__ == "__main__":
    run(main, parse_args())
