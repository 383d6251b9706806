"""latency.py and its two modules: what they count and how they are switched; no test asks how fast anything was."""

import json
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaForConditionalGeneration

import forward_dpvr
from dpvr.benchmarks import latency_methods, latency_rounds, pruning, time_and_memory
from dpvr.benchmarks.latency import main, parse_args
from dpvr.benchmarks.latency_methods import Machine, make_base, make_method, plan_of
from dpvr.benchmarks.latency_rounds import PARTS, TIMES, sizes
from dpvr.benchmarks.setups import CACHES, FLASH, METHODS
from dpvr.reports.latency import render_table_6
from streams_dpvr import Streams
from two_stream_dpvr import TwoStreamPass
from versions_dpvr import LINE_4

SMALL = ["--shape", "64x4", "--rounds", "1", "--warmup", "0", "--new_tokens", "2", "--text_tokens", "16"]
WIDTH, IMAGE = 64, 576
CPU = Machine("cpu", torch.float32)


@pytest.fixture(autouse=True)
def small_square(monkeypatch) -> None:
    monkeypatch.setattr(latency_rounds, "SQUARE", 64)  # the machine's speed is not what is tested


def document_of(capsys, *options: str) -> dict:
    main(parse_args([*options, "--json"]))
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_it_prints_a_row_per_method_and_a_json_document_last(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(latency_rounds, "peak_in_a_process_of_its_own", lambda name, *_: 7)
    document = document_of(capsys, *SMALL, "--output_dir", str(tmp_path))
    assert document == json.loads((tmp_path / "64x4.json").read_text()) and document["versions"]["torch"]
    rows = {row["method"]: row for row in document["rows"]}
    assert tuple(rows) == METHODS
    entries = {
        "vanilla": 4 * (IMAGE + 16),
        "late_fusion": 3 * (IMAGE + 16) + 16 + IMAGE,
        "kv_substitution": 4 * (IMAGE + 16) + IMAGE,
        "text_only": 2 * (IMAGE + 16) + 2 * 16,
        "fastv": 3 * (IMAGE + 16) + IMAGE // 2 + 16,
    }
    assert {name: rows[name]["kv_bytes"] for name in entries} == {n: 2 * 4 * WIDTH * e for n, e in entries.items()}
    base = make_base("64x4", CPU)
    for name, row in rows.items():
        if name == FLASH:
            assert "not installed" in row["note"] and row["prefill_ms"] is None and row["peak_bytes"] is None
            continue
        assert row["kv_reuse"] is True and row["peak_bytes"] == 7 and row["note"] is None
        assert 0 < row["prefill_without_tower_ms"] < row["prefill_ms"] and row["decode_ms_per_token"] > 0
        assert tuple(row["phases_ms"]) == PARTS and row["phases_ms"]["tower"] > 0
        reads = plan_of(make_method(name, *base)).reads_side_branch
        assert (row["phases_ms"]["side_branch"] > 0) == reads
    ratios = rows["vanilla"]["ratio_to_vanilla"]
    assert ratios.pop("prefill_peak_bytes") is None and all(value in (1, [1, 1]) for value in ratios.values())


def test_every_size_of_prompt_and_kind_of_cache_gets_its_rows(capsys):
    lists = ["--batch_sizes", "1", "2", "--text_tokens", "4", "--num_images", "2", "--caches", *CACHES]
    rows = document_of(capsys, *SMALL, "--skip_peaks", "--methods", "fastv", *lists)["rows"]
    found = {(row["batch_size"], row["cache"], row["method"]) for row in rows}
    assert len(found) == len(rows) == 2 * 2 * 2
    for row in rows:
        tokens = 2 * IMAGE + row["text_tokens"] + (2 if row["cache"] == "static" else 0)
        left = tokens - (IMAGE if row["method"] == "fastv" else 0)
        assert row["kv_bytes"] == row["batch_size"] * 2 * 4 * WIDTH * (3 * tokens + left)


def test_the_embedded_model_is_a_shape_too(capsys):
    options = ["--shape", "dpvr-mini", "--skip_peaks", "--rounds", "1", "--warmup", "0", "--new_tokens", "1"]
    rows = document_of(capsys, *options, "--text_tokens", "8", "--methods", "late_fusion")["rows"]
    assert [row["plan"] for row in rows] == ["oooooooooooo|", "oooooooo|...c"]


@pytest.fixture(scope="module")
def of_7b() -> tuple[LlavaForConditionalGeneration, int]:
    return make_base("llava-1.5-7b", Machine("meta", torch.bfloat16))


def flops_ratio(base: tuple[LlavaForConditionalGeneration, int], method: str, num_text_tokens: int) -> float:
    one, vanilla = (make_method(name, *base).prefill_flops(576, num_text_tokens) for name in (method, "vanilla"))
    return one / vanilla


def test_late_fusion_and_the_early_plan_reach_their_floors_in_7b(of_7b):
    for text, ratio in ((64, 0.6354), (128, 0.6652), (1024, 0.8325)):
        assert flops_ratio(of_7b, "late_fusion", text) == pytest.approx(ratio, abs=5e-5)
    assert flops_ratio(of_7b, "early_reading_4", 128) == pytest.approx(0.4211, abs=5e-5)


def test_13b_is_counted_and_not_run(capsys):
    rows = document_of(capsys, "--shape", "llava-1.5-13b", "--device", "meta", "--methods", "late_fusion")["rows"]
    assert rows[1]["ratio_to_vanilla"]["prefill_flops"] == pytest.approx(0.6914, abs=5e-5)
    for row in rows:
        assert all(row[name] is None for name in (*TIMES, "peak_bytes", "phases_ms")) and "no GPU" in row["note"]


@pytest.mark.skipif(LINE_4, reason="no line of transformers changes what is counted")
@pytest.mark.parametrize("method", [method for method in METHODS if method != FLASH])
@torch.no_grad()
def test_the_formula_is_what_torch_counts_in_7b_on_the_meta_device(method, of_7b, monkeypatch):
    """Weights and states have no storage, so the image tokens, and those that FastV keeps, are given."""
    llava, split = of_7b
    llava.set_attn_implementation("eager")  # whose products are counted
    model, sort = make_method(method, llava, split), TwoStreamPass.sort
    image = torch.zeros(1, 704, dtype=torch.bool)
    image[:, 1:577] = True

    def sort_on_meta(this: TwoStreamPass, second: torch.Tensor) -> None:
        sort(this, second)
        slots = (this.streams.text, this.streams.image, this.streams.merge_index)
        this.streams = Streams(*(tensor.to("meta") for tensor in slots), this.streams.first)
        this.all_slots, this.read_slots = this.all_slots.to("meta"), this.read_slots.to("meta")

    monkeypatch.setattr(TwoStreamPass, "sort", sort_on_meta)
    monkeypatch.setattr(forward_dpvr, "find_images", lambda owner, arguments: image)
    monkeypatch.setattr(pruning, "best_image_tokens", lambda scores, mask, keep: mask & (torch.arange(704) < 289))
    states = torch.empty(1, 704, 4096, dtype=torch.bfloat16, device="meta")
    with FlopCounterMode(display=False) as counter:
        output = model.model(inputs_embeds=states, kept_logits=0 if method == "vanilla" else 1)
        llava.lm_head(output.last_hidden_state[:, -1:])
    assert model.prefill_flops(576, 128) == counter.get_total_flops()


def test_the_process_for_the_peak_is_given_the_same_work(monkeypatch):
    """That such a process has nothing else in it is tested in test_training_step.py."""
    args, started = parse_args([*SMALL, "--batch_sizes", "1", "2", "--num_images", "3", "--dtype", "bfloat16"]), []
    bench = latency_rounds.make_bench(args)
    monkeypatch.setattr(time_and_memory, "peak_in_a_process_of_its_own", lambda _, name, flags: started.append(flags))
    for size in sizes(args):
        latency_rounds.peak_in_a_process_of_its_own("fastv", size, bench)
        again = parse_args([*started[-1], "--peak_of", "fastv"])
        assert list(sizes(again)) == [size] and again.shape == "64x4"
        assert Machine.of(again.shape, again.device, again.dtype) == bench.machine


def test_the_paths_for_a_gpu_synchronise_and_ask_its_allocator(capsys, monkeypatch):
    """On a device that is a CPU by another name."""
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", calls.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", {"cpu:0": 11}.get)
    options = [*SMALL, "--device", "cpu:0", "--dtype", "float32", "--rounds", "1", "--methods", "late_fusion"]
    document_of(capsys, *options, "--skip_peaks")
    assert len(calls) > 2 * 2 * (2 + len(PARTS)) and set(calls) == {"cpu:0"}
    assert document_of(capsys, *options, "--peak_of", "late_fusion") == 11


def test_flash_attention_serves_vanilla_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(latency_methods, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(
        LlavaForConditionalGeneration, "set_attn_implementation", lambda self, name: asked.append(name)
    )
    llava, split = make_base("64x4", CPU)
    assert latency_methods.why_not(FLASH, CPU) is None and make_method(FLASH, llava, split) is llava
    for name in (FLASH, "late_fusion"):
        with latency_methods.kernels_of(name, llava):
            asked.append(name)
    assert asked == ["flash_attention_2", FLASH, "sdpa", "late_fusion"]


def test_vanilla_is_always_measured_first():
    assert parse_args(["--methods", "text_only"]).methods == ["vanilla", "text_only"]


def test_a_large_shape_is_counted_where_there_is_no_gpu_and_a_device_that_is_not_here_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Machine.of("llava-1.5-7b", None, None) == Machine("meta", torch.bfloat16)
    assert Machine.of("512x32", None, None) == Machine("cpu", torch.float32)
    with pytest.raises(ValueError, match="--device cuda needs a GPU, .*: choose cpu"):
        Machine.of("512x32", "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Machine.of("llava-1.5-7b", None, "float32") == Machine("cuda", torch.float32)


def test_in_the_tables_a_gpus_times_take_the_place_of_what_was_counted(capsys, tmp_path):
    options = [*SMALL, "--methods", "fastv", "--batch_sizes", "1", "2", "--skip_peaks"]
    counted = document_of(capsys, *options, "--device", "meta")
    measured = document_of(capsys, *options, "--text_tokens", "17") | {"device": "cuda", "hardware": "NVIDIA A100"}
    for row in measured["rows"]:
        row["peak_bytes"], row["ratio_to_vanilla"]["peak_bytes"] = 7e6, 1.0
    other = document_of(capsys, *options, "--device", "meta", "--shape", "llava-1.5-7b")
    for folder, document in (("", counted), ("a100/", measured), ("", other)):
        path = tmp_path / f"{folder}latency" / f"{document['shape']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document))
    lines = render_table_6(tmp_path).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")][2:]
    sizes = ["64x4, NVIDIA A100", "64x4, NVIDIA A100, batch 2", "llava-1.5-7b", "llava-1.5-7b, batch 2"]
    assert [(row[0], row[1] == "vanilla LLaVA") for row in cells] == [(s, v) for s in sizes for v in (True, False)]
    assert all(row[2].split()[1] == "ms," and row[-1] == "7.0 MB, 1.000" for row in cells[:4])
    assert all(row[2] == row[-1] == "not measured" for row in cells[4:])


def test_peak_memory_stands_beside_the_same_prompt_on_the_same_device_alone(capsys, tmp_path):
    options = [*SMALL, "--methods", "fastv", "--skip_peaks"]
    document = document_of(capsys, *options, "--batch_sizes", "1", "2")
    peaks = document_of(capsys, *options, "--rounds", "0")
    for row in peaks["rows"]:
        row["peak_bytes"], row["ratio_to_vanilla"]["peak_bytes"] = 7e6, 1.0
    (tmp_path / "latency" / "peaks").mkdir(parents=True)
    (tmp_path / "latency" / "64x4.json").write_text(json.dumps(document))
    for device, expected in (("cpu", ["7.0 MB, 1.000"] * 2 + ["not measured"] * 2), ("cuda", ["not measured"] * 4)):
        (tmp_path / "latency" / "peaks" / "64x4.json").write_text(json.dumps(peaks | {"device": device}))
        lines = [line for line in render_table_6(tmp_path).splitlines() if line.startswith("| 64x4 |")]
        lines += [line for line in render_table_6(tmp_path).splitlines() if line.startswith("| 64x4, batch 2 |")]
        assert [line.split(" | ")[-1].removesuffix(" |") for line in lines] == expected


def test_what_does_not_fit_is_not_timed_and_the_others_have_no_ratio_to_it(capsys, monkeypatch, tmp_path):
    peaks = {"vanilla": None, "fastv": 7_000_000}
    monkeypatch.setattr(latency_rounds, "peak_in_a_process_of_its_own", lambda name, *_: peaks[name])
    vanilla, fastv = document_of(capsys, *SMALL, "--methods", "fastv", "--output_dir", str(tmp_path / "latency"))[
        "rows"
    ]
    assert (vanilla["note"], vanilla["prefill_ms"]) == ("does not fit", None) and fastv["prefill_ms"] > 0
    assert fastv["ratio_to_vanilla"]["prefill_ms"] is None and fastv["ratio_to_vanilla"]["peak_bytes"] is None
    first, second = [line for line in render_table_6(tmp_path).splitlines() if line.startswith("| 64x4 |")]
    assert first.endswith("| does not fit |") and second.endswith(" ms | 0.759 | 7.0 MB |")


@pytest.mark.parametrize("flags", ["--num_images 0", "--new_tokens 0", "--rounds -1", "--batch_sizes 1 0"])
def test_numbers_that_make_no_run_are_refused(flags, capsys):
    with pytest.raises(SystemExit):
        parse_args(flags.split())
    assert re.search(r"(-1|0) is too small: give [01] or more", capsys.readouterr().err)


def test_every_method_begins_a_round_in_turn(capsys, monkeypatch):
    order, answer = [], latency_rounds.answer

    def noted(model, *args):
        order.append(plan_of(model).split_layer)
        return answer(model, *args)

    monkeypatch.setattr(latency_rounds, "answer", noted)
    methods = ["--methods", "late_fusion", "fastv", "--rounds", "3", "--skip_peaks"]
    document_of(capsys, *SMALL, *methods)
    assert order == [4, 2, 3, 2, 3, 4, 3, 4, 2]
