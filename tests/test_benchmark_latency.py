"""benchmark_latency.py: what it counts, on a small shape; no test asks how fast anything was."""

import json

from benchmark_latency import CACHES, METHODS, main, parse_args

SMALL = ["--shape", "64x4", "--rounds", "2", "--warmup", "1", "--new_tokens", "3", "--text_tokens", "16"]


def test_it_prints_a_row_per_method_and_cache_and_a_json_document_last(capsys, tmp_path):
    main(parse_args([*SMALL, "--output", str(tmp_path / "out.json")]))
    lines = capsys.readouterr().out.splitlines()
    document = json.loads(lines[-1])
    assert document == json.loads((tmp_path / "out.json").read_text()) and document["versions"]["torch"]
    rows = {(row["method"], row["cache"]): row for row in document["rows"]}
    assert list(rows) == [(method, cache) for method in METHODS for cache in CACHES]
    assert len(lines) >= len(rows) + 2
    width, image, text, room = 64, 576, 16, 16 + 3
    for (method, cache), row in rows.items():
        entries = {
            "vanilla": lambda n: 4 * (image + n),
            "late_fusion": lambda n: 3 * (image + n) + n + image,
            "kv_substitution": lambda n: 4 * (image + n) + image,
            "text_only": lambda n: 2 * (image + n) + 2 * n,
        }[method](room if cache == "static" else text)
        assert row["kv_bytes"] == entries * 2 * width * 4
        assert row["prefill_ms"] > 0 and row["decode_ms_per_token"] > 0 and row["tower_ms"] > 0
    vanilla = rows["vanilla", "growing"]["ratio_to_vanilla"]
    assert all(value in (1, [1, 1]) for value in vanilla.values())


def test_vanilla_is_always_measured_with_the_others():
    assert parse_args(["--methods", "text_only"]).methods == ["vanilla", "text_only"]
