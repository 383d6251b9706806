"""Tables of cost, made from the JSON files of dpvr.benchmarks.latency and from nothing else.

results/latency/SHAPE.json             all methods at 576 + 128 tokens      Tables 1, 6 and 7; the front page
results/latency/peaks/SHAPE.json       the same prompts, --rounds 0: peak memory alone
results/latency/text/SHAPE.json        text tokens from 64 to 1024          Table 8 and a figure
results/latency/batch/SHAPE.json       batches of 1 and 4
results/latency/images/SHAPE.json      prompts of 1 to 8 pictures
results/latency/models/NAME.json       shapes of real models of any family
results/latency/models_tokens, models_batch     two of them with 256 to 4,096 image tokens, in batches of 1 to 8
results/latency/models_peaks/NAME.json          peak memory of a prefill at these shapes
results/DEVICE/latency/...             the same from a GPU; takes the place of what was only counted
    |
README.md, docs/performance.md       `python -m dpvr.reports`; figures: latency_figures.py

A column of the paper's own numbers says "paper". What has no number in the files is "not measured".
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpvr.reports.documents import read, table

NAMES = {
    "vanilla": "vanilla LLaVA",
    "vanilla_flash": "vanilla, flash attention",
    "late_fusion": "late fusion, K = 1",
    "late_fusion_k2": "late fusion, K = 2",
    "early_reading_4": "early split, 4 reading layers",
    "early_reading_8": "early split, 8 reading layers",
    "persistent_context": "DPVR-PC",
    "kv_substitution": "DPVR-KV",
    "text_only": "text only (VTW)",
    "fastv": "FastV, K = 3, half kept",
    "random_pruning": "random pruning, same cut",
}
FAMILY_NAMES = NAMES | {
    "vanilla": "vanilla",
    "read_everywhere": "split at an eighth, read everywhere",
    "latent": "latent, a quarter as wide",
}
PAPER_TABLE_1 = {
    "vanilla": "14",
    "persistent_context": "14",
    "kv_substitution": "about 4.2",
    "late_fusion": "1",
    "text_only": "0",
}
UNMEASURED = "not measured"
TOWERLESS = "prefill_without_tower_ms"  # the time of models whose image features are given
CLOCKS = {"wall": "wall", "cpu": "processor"}  # older records say which; since then it is wall time
Row = dict[str, Any]


def render_latency(results: Path) -> str:
    """One row per method on a CPU."""
    record = read(results / "latency" / "512x32.json")
    header = [
        "",
        "prefill, ratio to vanilla",
        "its FLOPs",
        "a token, ratio to vanilla",
        "keys and values",
        "peak memory",
    ]
    rows = [
        [
            NAMES[row["method"]],
            _time(row, "prefill_ms"),
            f"{row['ratio_to_vanilla']['prefill_flops']:.3f}",
            _time(row, "decode_ms_per_token"),
            _bytes(row, "kv_bytes"),
            _peak(record, row, results),
        ]
        for row in record["rows"]
        if row["prefill_ms"] is not None
    ]
    peaks = read(results / "latency" / "peaks" / "512x32.json")
    return _text(table(header, rows), _protocol(record), _protocol(peaks))


def render_table_1(results: Path) -> str:
    """The paper's Table 1, counted: FLOPs that images cost past the split."""
    records = [read(results / "latency" / f"{shape}.json") for shape in ("llava-1.5-7b", "llava-1.5-13b")]
    columns = [{row["method"]: row for row in record["rows"]} for record in records]
    rows = [
        [
            NAMES[method],
            paper,
            *(f"{column[method]['deep_image_layers']:.2f}" for column in columns),
            *(f"{column[method]['ratio_to_vanilla']['prefill_flops']:.4f}" for column in columns),
        ]
        for method, paper in PAPER_TABLE_1.items()
    ]
    header = ["", "paper, 7B, s = 18", "7B, s = 18", "13B, s = 24", "7B, whole prefill", "13B, whole prefill"]
    return _text(table(header, rows), _made_by(records))


def render_table_6(results: Path) -> str:
    """The paper's Table 6: forward latency and peak memory, sizes by methods."""
    records = _records(results)
    header = ["size", "", "forward", "without the tower", "its FLOPs", "peak memory"]
    rows = [
        [
            _size(record, row),
            NAMES[row["method"]],
            _time(row, "prefill_ms"),
            _time(row, "prefill_without_tower_ms"),
            f"{row['ratio_to_vanilla']['prefill_flops']:.3f}",
            _peak(record, row, results),
        ]
        for record in records
        for row in record["rows"]
    ]
    return _text(table(header, rows), *map(_protocol, records + _records(results, "peaks")))


def render_table_7(results: Path) -> str:
    """The paper's Table 7: prefill, a decoded token, and whether the cache is reused."""
    records = _records(results)
    header = ["size", "", "prefill", "a token", "K/V reuse", "keys and values"]
    rows = [
        [
            _size(record, row),
            NAMES[row["method"]],
            _time(row, "prefill_ms"),
            _time(row, "decode_ms_per_token"),
            {True: "✓", False: "×", None: UNMEASURED}[row["kv_reuse"]],
            _bytes(row, "kv_bytes"),
        ]
        for record in records
        for row in record["rows"]
    ]
    return _text(table(header, rows), _made_by(records))


def render_table_8(results: Path) -> str:
    """The paper's Table 8: the prefill against the length of the text."""
    return _sweep(results, "text", "text_tokens", "{} text tokens")


def render_batch(results: Path) -> str:
    return _sweep(results, "batch", "batch_size", "batch {}")


def render_images(results: Path) -> str:
    return _sweep(results, "images", "num_images", "pictures: {}")


def render_models_tokens(results: Path) -> str:
    """The language model's prefill at the shape of a real model, against the number of image tokens."""
    return _sweep(results, "models_tokens", "image_tokens", "{:,} image tokens", TOWERLESS)


def render_models_batch(results: Path) -> str:
    return _sweep(results, "models_batch", "batch_size", "batch {}", TOWERLESS)


def _sweep(results: Path, folder: str, field: str, heading: str, time: str = "prefill_ms") -> str:
    """A row per shape and method, and in each cell the time of a prefill with its ratio and the FLOPs' ratio.

    Batches are of one prompt in each shape's records: the row names it. What takes long was measured in a run of its
    own, whose record is in a folder within this one.
    """
    records, names = _records(results, f"{folder}/**"), FAMILY_NAMES if time == TOWERLESS else NAMES
    points = sorted({row[field] for record in records for row in record["rows"]})
    rows = []
    for size in dict.fromkeys(map(_size, records)):
        measured = [row for record in records if _size(record) == size for row in record["rows"]]
        prompt = f", {measured[0]['image_tokens']:,} image tokens" if field == "batch_size" else ""
        for method in dict.fromkeys(row["method"] for row in measured):
            found = {row[field]: row for row in measured if row["method"] == method}
            cells = [_with_flops(found[point], time) if point in found else UNMEASURED for point in points]
            rows.append([size + prompt, names[method], *cells])
    return _text(table(["size", "", *map(heading.format, points)], rows), *map(_protocol, records))


def _with_flops(row: Row, time: str) -> str:
    flops = f"FLOPs {row['ratio_to_vanilla']['prefill_flops']:.4f}"
    return f"{UNMEASURED}; {flops}" if row[time] is None else f"{_time(row, time, digits=0)}; {flops}"


def render_models(results: Path) -> str:
    """A row per model and method; for every number of image tokens the language model's prefill and its FLOPs."""
    records = _records(results, "models")
    points = sorted({(row["image_tokens"], row["text_tokens"]) for record in records for row in record["rows"]})
    rows = []
    for record in records:
        for method in dict.fromkeys(row["method"] for row in record["rows"]):
            of_method = [row for row in record["rows"] if row["method"] == method]
            found = {(row["image_tokens"], row["text_tokens"]): row for row in of_method}
            first = found[points[0]]
            if _is_refused(first):
                cells = ["not supported"] * (2 * len(points) + 2)
            else:
                cells = [cell for point in points for cell in _prefill_and_flops(found[point])]
                cells += [_time(first, "decode_ms_per_token"), _bytes(first, "kv_bytes")]
            rows.append([_size(record), FAMILY_NAMES[method], _split(first), *cells])
    header = ["model", "", "split", *(name for point in points for name in ("{} + {}".format(*point), "its FLOPs"))]
    reasons = dict.fromkeys(row["note"] for record in records for row in record["rows"] if _is_refused(row))
    return _text(
        table([*header, "a token", "keys and values"], rows), *map(_protocol, records), *map(_sentence, reasons)
    )


def render_models_memory(results: Path) -> str:
    """A row per model and method; for every prompt what its prefill takes beyond the weights."""
    records = _records(results, "models_peaks")
    sizes = {(row["batch_size"], row["image_tokens"]) for record in records for row in record["rows"]}
    rows = []
    for record in records:
        for method in dict.fromkeys(row["method"] for row in record["rows"]):
            found = {
                (row["batch_size"], row["image_tokens"]): row for row in record["rows"] if row["method"] == method
            }
            cells = [_bytes(found[size], "prefill_peak_bytes") if size in found else "" for size in sorted(sizes)]
            rows.append([record["shape"], FAMILY_NAMES[method], *cells])
    heads = [f"{image:,} image tokens" + (f", batch {batch}" if batch > 1 else "") for batch, image in sorted(sizes)]
    return _text(table(["model", "", *heads], rows), *map(_protocol, records))


def _prefill_and_flops(row: Row) -> tuple[str, str]:
    return _time(row, "prefill_without_tower_ms", digits=0), f"{row['ratio_to_vanilla']['prefill_flops']:.3f}"


def _is_refused(row: Row) -> bool:
    return row["prefill_flops"] is None


def _sentence(note: str) -> str:
    return note[0].upper() + note[1:]


def _split(row: Row) -> str:
    """The number of layers before the split or the cut; none of vanilla."""
    shared, deep = (row["plan"] or "|").split("|")
    return str(len(shared)) if deep else ""


def render_phases(results: Path) -> str:
    """Where the time of a prefill goes, part by part; a layer of the shared stack, and arithmetic a second."""
    record = read(results / "latency" / "512x32.json")
    rows = [row for row in record["rows"] if row["prefill_ms"] is not None]
    parts = list(rows[0]["phases_ms"])
    header = ["", *(part.replace("_", " ") for part in parts), "sum", "a shared layer", "GFLOP/s"]
    cells = [
        [
            NAMES[row["method"]],
            *(f"{row['phases_ms'][part]:.1f}" for part in parts),
            f"{sum(row['phases_ms'].values()):.1f}",
            f"{row['phases_ms']['shared_stack'] / _shared_layers(row):.1f}",
            f"{row['prefill_flops'] / row['prefill_without_tower_ms'] / 1e6:.1f}",
        ]
        for row in rows
    ]
    return _text(table(header, cells), "Milliseconds. " + _protocol(record, has_ratios=False))


def _shared_layers(row: Row) -> int:
    """Layers before the split; without one, all but the last, which is a part of its own."""
    shared, deep = row["plan"].split("|")
    return len(shared) if deep else len(shared) - 1


PERFORMANCE: dict[str, Callable[[Path], str]] = {
    "latency": render_latency,
    "table1": render_table_1,
    "table6": render_table_6,
    "table7": render_table_7,
    "table8": render_table_8,
    "batch": render_batch,
    "images": render_images,
    "models": render_models,
    "models_tokens": render_models_tokens,
    "models_batch": render_models_batch,
    "models_memory": render_models_memory,
    "phases": render_phases,
}


def _time(row: Row, name: str, digits: int = 1) -> str:
    """Its ratio is left out where vanilla itself does not fit."""
    if row[name] is None:
        return UNMEASURED
    time, ratio = f"{row[name]:,.{digits}f} ms", row["ratio_to_vanilla"]
    if ratio[name] is None:
        return time
    low, high = ratio[f"{name}_spread"]
    return f"{time}, {ratio[name]:.3f} ({low:.3f} to {high:.3f})"


def _bytes(row: Row, name: str) -> str:
    ratio = row["ratio_to_vanilla"][name]
    if row[name] is None:
        return row["note"] if row["note"] == "does not fit" else UNMEASURED
    return f"{row[name] / 1e6:,.1f} MB" + ("" if ratio is None else f", {ratio:.3f}")


def _records(results: Path, folder: str = "") -> list[Row]:
    """What was measured and, of shapes that were not measured anywhere, what was counted; by shape."""
    paths = [*results.glob(f"latency/{folder}/*.json"), *results.glob(f"*/latency/{folder}/*.json")]
    records = sorted(map(read, sorted(paths)), key=_size)
    measured = {record["rows"][0]["shape"] for record in records if _is_measured(record)}
    return [record for record in records if _is_measured(record) or record["rows"][0]["shape"] not in measured]


def _is_measured(record: Row) -> bool:
    names = ("prefill_without_tower_ms", "peak_bytes", "prefill_peak_bytes")
    return any(row.get(name) is not None for row in record["rows"] for name in names)


def _size(record: Row, row: Row | None = None) -> str:
    """The shape; where it ran, if not on a CPU; and a row's batch, if larger than 1."""
    parts = [record["rows"][0]["shape"]]
    if record["device"] not in ("cpu", "meta"):
        parts.append(record["hardware"])
    if row and row["batch_size"] > 1:
        parts.append(f"batch {row['batch_size']}")
    return ", ".join(parts)


def _peak(record: Row, row: Row, results: Path) -> str:
    """A row's own, or that of the same prompt on the same device in peaks/."""
    path = results / "latency" / "peaks" / f"{row['shape']}.json"
    if row["peak_bytes"] is None and path.exists():
        peaks, same = read(path), ("method", "batch_size", "text_tokens", "num_images")
        if peaks["device"] == record["device"]:
            row = next((other for other in peaks["rows"] if all(other[name] == row[name] for name in same)), row)
    return _bytes(row, "peak_bytes")


def _protocol(record: Row, has_ratios: bool = True) -> str:
    """How one file was measured."""
    first = record["rows"][0]
    time = first["prefill_without_tower_ms"]
    if first.get("prefill_peak_bytes") is not None and time is None:
        return f"{first['shape']}: {record['dtype']}. {_machine(record)}"
    if first["peak_bytes"] is not None and time is None:
        return f"{first['shape']}, peak memory: {record['dtype']}. {_machine(record)}"
    if time is None:
        return f"{first['shape']}: counted on the meta device, {record['dtype']}; {_machine(record)}"
    ratios = "; ratios are taken within a round, in brackets their 10th and 90th percentiles"
    threads = f"{record['threads']} thread{'s' * (record['threads'] > 1)}"
    return (
        f"{first['shape']}: {record['dtype']}{_trial(record)}, {threads}, "
        f"{CLOCKS[record.get('clock', 'wall')]} time, medians of "
        f"{record['rounds']} interleaved rounds after {record['warmup']} to warm up, {record['new_tokens']} tokens "
        f"decoded in each{ratios * has_ratios}. {_machine(record)}"
    )


def _trial(record: Row) -> str:
    """What a prefill took in each number format, if the faster was chosen."""
    tried = record.get("tried_ms")
    if not tried:
        return ""
    each = " and ".join(f"{milliseconds:,.0f} ms in {name}" for name, milliseconds in tried.items())
    return f" (the faster: one prefill took {each})"


def _machine(record: Row) -> str:
    versions = record["versions"]
    return (
        f"Made by `{record['command']}` on {record['hardware']}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}."
    )


def _made_by(records: list[Row]) -> str:
    return "\n\n".join(map(_machine, records))


def _text(lines: list[str], *notes: str) -> str:
    return "\n".join(lines) + "\n\n" + "\n\n".join(notes) + "\n"
