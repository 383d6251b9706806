"""latency_families.py: real models' shapes of any family in the bench; no test asks how fast anything was."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from families import FAMILIES, PRESENT, make
from peft import get_peft_model

from adapter_dpvr import DpvrConfig
from dpvr.benchmarks import latency_families, latency_rounds, time_and_memory
from dpvr.benchmarks.latency import main, parse_args
from dpvr.benchmarks.latency_families import FamilyBench, FamilySize, machine_for, make_random, plan_fields
from dpvr.benchmarks.latency_rounds import TIMES, peak_in_a_process_of_its_own
from dpvr.benchmarks.pruning import prune
from dpvr.benchmarks.setups import FAMILY_METHODS, PRUNING, PRUNINGS
from dpvr.cost_table import load_config
from dpvr.reports.latency import render_models
from versions_dpvr import LINE_4

ROOT = Path(__file__).parent.parent
TINY = [name for name in ("llava_onevision", "smolvlm", "qwen2_5_vl", "qwen3_vl", "internvl") if name in PRESENT]
WINDOWED = [name for name in ("gemma3", "cohere2_vision") if name in PRESENT]
SIZE = FamilySize(batch_size=2, text_tokens=6, image_tokens=8)
SHORT = ["--rounds", "2", "--warmup", "0", "--new_tokens", "2", "--image_tokens", "8", "12", "--text_tokens", "6"]
SHORT.append("--skip_peaks")
timed = pytest.mark.skipif(LINE_4, reason="transformers 4 takes no image features that were made before")


@pytest.fixture(autouse=True)
def small_square(monkeypatch) -> None:
    monkeypatch.setattr(latency_rounds, "SQUARE", 64)  # the machine's speed is not what is tested


@pytest.fixture
def saved(tmp_path):
    """Writes the config of a tiny model of a family, and returns its path."""

    def save(name: str) -> str:
        make(name, torch.float32).config.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


def document_of(capsys, *options: str) -> dict:
    main(parse_args([*options, "--json"]))
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def asked(model: str, *more: str) -> Namespace:
    return parse_args(["--model", model, "--device", "cpu", "--dtype", "float32", *more])


@torch.inference_mode()
def logits_of(model: torch.nn.Module, prompt: dict) -> torch.Tensor:
    return model(**prompt, logits_to_keep=1).logits


@timed
@pytest.mark.parametrize("name", TINY)
def test_every_method_answers_as_a_fresh_adapter_or_a_fresh_pruned_model_does(name, saved):
    bench = FamilyBench(asked(saved(name)))
    bench.load()
    prompt, found = bench.prompt(SIZE), {}
    for method in (*FAMILY_METHODS, *reversed(FAMILY_METHODS)):  # switched to from another each time
        with bench.running(method) as model:
            got = logits_of(model, prompt)
        assert torch.equal(found.setdefault(method, got), got)
    for method, got in found.items():
        model, fields = make_random(bench.config, bench.machine), plan_fields(bench.config).get(method)
        if method in PRUNINGS:
            model = prune(model, **PRUNING, rank=PRUNINGS[method])
        elif fields:
            model = get_peft_model(model, DpvrConfig(**fields)).eval()
        assert torch.equal(logits_of(model, prompt), got), method
    several = list(found.values())
    assert not any(torch.equal(one, other) for index, one in enumerate(several) for other in several[:index])


@timed
@pytest.mark.parametrize("name", TINY)
def test_the_given_features_are_what_every_method_sees_of_the_image(name, saved):
    bench = FamilyBench(asked(saved(name)))
    bench.load()
    prompt, other = bench.prompt(SIZE), bench.prompt(SIZE)
    other["input_ids"] = prompt["input_ids"]
    for method in FAMILY_METHODS:
        if method == "latent":  # its maps start at zero, so only the layers below its split see the image
            continue
        with bench.running(method) as model:
            assert not torch.equal(logits_of(model, prompt), logits_of(model, other)), method


@timed
@pytest.mark.parametrize("name", TINY)
def test_the_table_has_a_row_per_method_and_size_with_counted_flops_and_the_counted_cache(name, saved, capsys):
    path = saved(name)
    document = document_of(capsys, "--model", path, "--device", "cpu", "--batch_sizes", "2", *SHORT)
    bench = FamilyBench(asked(path, "--dtype", document["dtype"], "--batch_sizes", "2", *SHORT))
    rows = {(row["image_tokens"], row["method"]): row for row in document["rows"]}
    assert list(rows) == [(image, method) for image in (8, 12) for method in FAMILY_METHODS]
    for (image, method), row in rows.items():
        counted, vanilla = (bench.count(each, FamilySize(2, 6, image)) for each in (method, "vanilla"))
        assert {key: row[key] for key in counted} == counted
        assert row["ratio_to_vanilla"]["prefill_flops"] == counted["prefill_flops"] / vanilla["prefill_flops"]
        assert row["prefill_ms"] is None and row["note"] is None and row["kv_reuse"] is True
        assert row["prefill_without_tower_ms"] > 0 and row["decode_ms_per_token"] > 0
        assert len(row["ratio_to_vanilla"]["prefill_without_tower_ms_spread"]) == 2
    assert document["shape"] == name and document["tried_ms"].keys() == {"bfloat16", "float32"}


@timed
def test_the_peak_of_a_prefill_is_that_of_this_prompt_beyond_the_weights(saved):
    bench = FamilyBench(asked(saved("smolvlm"), "--image_tokens", "1024", "--text_tokens", "6", "--threads", "1"))
    (size,) = bench.sizes()
    kept = bench.count("latent", size)["kv_bytes"]
    assert kept < peak_in_a_process_of_its_own("latent", size, bench) < 20 * kept


def test_the_process_for_the_peak_is_given_the_same_work(saved, monkeypatch):
    started = []
    monkeypatch.setattr(time_and_memory, "peak_in_a_process_of_its_own", lambda _, name, flags: started.append(flags))
    bench = FamilyBench(parse_args(["--model", saved("internvl"), "--device", "meta", "--dtype", "float32", *SHORT]))
    for size in bench.sizes():
        peak_in_a_process_of_its_own("fastv", size, bench)
        again = FamilyBench(parse_args([*started[-1], "--peak_of", "fastv"]))
        assert list(again.sizes()) == [size] and again.names == ["vanilla", "fastv"]
        assert (again.args.model, again.machine) == (bench.args.model, bench.machine)


@pytest.mark.parametrize("name", WINDOWED)
def test_a_method_that_a_family_cannot_run_has_a_row_that_names_the_family_and_the_reason(name, saved, capsys):
    device = "meta" if LINE_4 else "cpu"
    rows = document_of(capsys, "--model", saved(name), "--device", device, *SHORT)["rows"]
    assert [row["method"] for row in rows] == 2 * list(FAMILY_METHODS)
    for row in rows:
        if row["method"] in PRUNINGS:
            assert row["note"].startswith("not supported: FastV and random pruning need full attention in every layer")
            assert f"{name!r} has layers of sliding_attention" in row["note"]
            empty = (*TIMES, "plan", "prefill_flops", "kv_bytes")
            assert all(row[key] is None for key in empty) and row["ratio_to_vanilla"]["prefill_flops"] is None
        else:
            assert row["prefill_flops"] > 0 and (row["prefill_without_tower_ms"] is None) == LINE_4


@pytest.mark.parametrize("times, faster", [((2.0, 1.0), "float32"), ((1.0, 2.0), "bfloat16")])
@timed
def test_the_number_format_whose_prefill_is_faster_is_used(times, faster, saved, monkeypatch, capsys):
    took = dict(zip(("bfloat16", "float32"), times, strict=True))
    monkeypatch.setattr(FamilyBench, "_one_prefill", lambda self, model, dtype, size: took[dtype])
    bench = FamilyBench(parse_args(["--model", saved("internvl"), "--device", "cpu"]))
    bench.load()
    weights = {weight.dtype for model in (bench.model, bench.adapted) for weight in model.parameters()}
    assert weights == {bench.machine.dtype} == {getattr(torch, faster)} and bench.tried_ms == took


def test_transformers_4_counts_and_refuses_to_time(saved, monkeypatch):
    monkeypatch.setattr(latency_families, "LINE_4", True)
    path = saved("internvl")
    with pytest.raises(ValueError, match="transformers 4 does not take: pip install .* --device meta"):
        FamilyBench(asked(path))
    bench = FamilyBench(parse_args(["--model", path, "--device", "meta"]))
    bench.load()
    assert bench.count("late_fusion", SIZE)["prefill_flops"] < bench.count("vanilla", SIZE)["prefill_flops"]


SPLITS = {  # of late fusion, reading everywhere and the latent, and the latent's rank
    "llava-onevision-0.5b": (14, 3, 1, 224),
    "smolvlm2-500m": (18, 4, 1, 240),
    "qwen3-vl-2b": (16, 4, 3, 512),
    "gemma-3-4b": (19, 6, 6, 640),
}


@pytest.mark.parametrize("shape", SPLITS)
def test_plans_of_real_shapes_split_where_they_should(shape):
    fields = plan_fields(load_config(str(ROOT / "configs" / "shapes" / f"{shape}.json")))
    splits = [fields[name]["split_layer"] for name in ("late_fusion", "read_everywhere", "latent")]
    assert (*splits, fields["latent"]["latent_rank"]) == SPLITS[shape] and fields["vanilla"] == {}


def test_a_large_model_is_counted_where_there_is_no_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine_for(2_100_000_000, None, None).device == "cpu"
    path = str(ROOT / "configs" / "shapes" / "qwen2.5-vl-7b.json")
    document = document_of(capsys, "--model", path, "--image_tokens", "576")
    rows = {row["method"]: row for row in document["rows"]}
    assert document["device"] == "meta" and document["shape"] == "qwen2.5-vl-7b"
    assert all(row[name] is None for row in rows.values() for name in TIMES)
    assert all(row["note"] == "not measured: no GPU" for row in rows.values())
    shares = {method: row["ratio_to_vanilla"]["prefill_flops"] for method, row in rows.items()}
    assert shares["latent"] < shares["read_everywhere"] < shares["fastv"] < shares["late_fusion"] < 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert machine_for(8_000_000_000, None, None) == ("cuda", torch.bfloat16)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--model x --num_images 2", "--num_images is not for --model: give --image_tokens"),
        ("--image_tokens 2", "--image_tokens is not for --shape: give --num_images"),
        ("--model x --methods text_only", "'text_only' is no method for --model: choose from vanilla, late_fusion"),
        ("--methods latent", "'latent' is no method for --shape: choose from vanilla"),
        ("--model x --shape 64x4", "not allowed with argument"),
    ],
)
def test_options_that_belong_to_the_other_kind_of_model_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(flags.split())
    assert message in capsys.readouterr().err


def test_the_report_has_every_method_of_every_model_and_flops_beside_times(saved, capsys, tmp_path):
    folder = tmp_path / "latency" / "models"
    counted = document_of(capsys, "--model", saved("internvl"), "--device", "meta", *SHORT)
    windowed = document_of(capsys, "--model", saved("gemma3"), "--device", "meta", *SHORT)
    measured = json.loads(json.dumps(counted)) | {"device": "cpu", "tried_ms": {"bfloat16": 2.0, "float32": 1.0}}
    for row in measured["rows"]:
        row["shape"], row["prefill_without_tower_ms"] = "timed", 40.0
        row["ratio_to_vanilla"] |= {"prefill_without_tower_ms": 0.5, "prefill_without_tower_ms_spread": [0.4, 0.6]}
    folder.mkdir(parents=True)
    for name, document in (("internvl", counted), ("gemma3", windowed), ("timed", measured)):
        (folder / f"{name}.json").write_text(json.dumps(document))
    text = render_models(tmp_path)
    lines = [line for line in text.splitlines() if line.startswith("| ")][2:]
    cells = {tuple(cell.strip() for cell in line.split("|")[1:3]): line.split(" | ") for line in lines}
    assert len(lines) == len(cells) == 3 * len(FAMILY_METHODS)
    flops = {row["method"]: row["ratio_to_vanilla"]["prefill_flops"] for row in counted["rows"][:6]}
    depth = FAMILIES["internvl"].depth
    late = cells["internvl", "late fusion, K = 1"]
    assert late[2:5] == [str(round(depth * 18 / 32)), "not measured", f"{flops['late_fusion']:.3f}"]
    assert cells["timed", "late fusion, K = 1"][3] == "40 ms, 0.500 (0.400 to 0.600)"
    assert cells["timed", "late fusion, K = 1"][4] == f"{flops['late_fusion']:.3f}"
    assert cells["gemma3", "FastV, K = 3, half kept"][3:] == ["not supported"] * 5 + ["not supported |"]
    assert "Not supported: FastV and random pruning need full attention in every layer" in text
    assert " (the faster: one prefill took 2 ms in bfloat16 and 1 ms in float32), " in text
