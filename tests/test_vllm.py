"""vLLM answers as transformers does, token for token, under every routing it can serve; skipped where it is missing.

`python -m dpvr.serving.check` asks dpvr-mini more, and a server; this asks tiny random models of each family.
"""

import copy
import os
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from family_processors import make_with_processor
from peft import get_peft_model
from PIL import Image
from torch import nn

pytest.importorskip("vllm", reason="vLLM is not installed: it has an environment of its own, requirements-vllm.txt")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from adapter_dpvr import DpvrConfig  # noqa: E402
from dpvr.serving.check_run import engine_answers  # noqa: E402
from modeling_dpvr import DpvrLlavaForConditionalGeneration  # noqa: E402

SIDE = {"llava": 8, "qwen2_5_vl": 24, "qwen3_vl": 24}  # of a picture, in pixels
ARCHITECTURES = {
    "llava": "DpvrLlavaForConditionalGeneration",
    "qwen2_5_vl": "DpvrQwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "DpvrQwen3VLForConditionalGeneration",
}
LATENT = {"routing": "latent", "latent_rank": 12}
PLANS = {
    "latent": LATENT,
    "latent behind two side layers": LATENT | {"latent_side_layers": 2},
    "kv_substitution": {"routing": "kv_substitution"},
    "persistent_context with two side layers": {"routing": "persistent_context", "num_side_layers": 2},
}
NEW_TOKENS = 8
ROOT = Path(__file__).parent.parent


@pytest.fixture
def wide(monkeypatch) -> None:
    """Heads of 32 channels: vLLM's kernels for CPUs have none that are narrower."""
    for name in SIDE:
        fields = copy.deepcopy(FAMILIES[name].config)
        fields["text_config"] |= {"hidden_size": 128, "head_dim": 32, "max_position_embeddings": 1024}
        if name != "llava":
            rotary = {"mrope_section": [8, 4, 4], "mrope_interleaved": name == "qwen3_vl"}  # as the published configs
            fields["text_config"]["rope_parameters"] = fields["text_config"]["rope_parameters"] | rotary
            fields["vision_config"]["out_hidden_size"] = 128
        monkeypatch.setattr(FAMILIES[name], "config", fields)


def make_adapter(name: str, folder: Path, plan: dict) -> tuple[nn.Module, object, int]:
    """A tiny base saved in a folder, a random adapter on it beside; the model, its processor, the token that ends."""
    base, processor = make_with_processor(name)
    base.save_pretrained(folder / "base", save_original_format=True)
    processor.save_pretrained(folder / "base")
    model = get_peft_model(base, DpvrConfig(split_layer=max(2, FAMILIES[name].split), **plan))
    torch.manual_seed(7)
    with torch.no_grad():
        for weight in (weight for weight in model.parameters() if weight.requires_grad and weight.ndim > 1):
            weight.normal_(0, 0.15)
    model.save_pretrained(folder / "adapter")
    return model.eval(), processor, processor.tokenizer.eos_token_id


def make_requests(name: str, processor: object) -> list[dict]:
    """Prompts of no, one and three pictures, in the first turn and in a later one."""
    side, requests = SIDE[name], []
    for layout in ([0], [1], [2, 1], [0, 1], [1, 0, 2]):
        messages, pictures = [], []
        for turn, count in enumerate(layout):
            pictures += [Image.effect_noise((side, side), 90 + 20 * turn + at).convert("RGB") for at in range(count)]
            text = {"type": "text", "text": "Is the red circle left of the blue square? " * (1 + turn)}
            messages.append({"role": "user", "content": [*[{"type": "image"}] * count, text]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": "yes"}]})
        prompt = processor.apply_chat_template(messages[:-1], add_generation_prompt=True)
        requests.append(
            {"prompt": prompt, "multi_modal_data": {"image": pictures}} if pictures else {"prompt": prompt}
        )
    return requests


@torch.no_grad()
def expected_answers(model: nn.Module, processor: object, requests: list[dict], end: int) -> list[list[int]]:
    answers, marks = [], [model.config.image_token_id]
    for request in requests:
        pictures = request.get("multi_modal_data", {}).get("image")
        inputs = processor(images=pictures, text=request["prompt"], return_tensors="pt")
        reply = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, suppress_tokens=marks)
        answers.append([token for token in reply[0, inputs["input_ids"].shape[1] :].tolist() if token != end])
    return answers


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("name", SIDE)
def test_an_adapter_on_its_base_answers_as_in_transformers(name, plan, wide, tmp_path):
    """With chunks that end within a picture, and again from the prefix cache."""
    model, processor, end = make_adapter(name, tmp_path, plan)
    requests = make_requests(name, processor)
    expected = expected_answers(model, processor, requests, end)
    overrides = {"architectures": [ARCHITECTURES[name]], "dpvr_adapter": str(tmp_path / "adapter")}
    rounds = engine_answers(
        str(tmp_path / "base"), requests, overrides, NEW_TOKENS, 2, max_num_batched_tokens=37, block_size=32
    )
    assert [answers for answers, _ in rounds] == [expected, expected]
    assert rounds[1][1] > rounds[0][1], "the second round found nothing in the prefix cache"


@pytest.mark.parametrize(
    "name, plan",
    [("llava", "latent behind two side layers"), ("qwen3_vl", "kv_substitution"), ("qwen2_5_vl", "latent")],
)
def test_two_processes_answer_as_one(name, plan, wide, tmp_path):
    """Tensor parallelism: each process holds half of the heads and of the MLPs' channels."""
    model, processor, end = make_adapter(name, tmp_path, PLANS[plan])
    requests = make_requests(name, processor)
    overrides = {"architectures": [ARCHITECTURES[name]], "dpvr_adapter": str(tmp_path / "adapter")}
    options = {"tensor_parallel_size": 2, "max_num_batched_tokens": 37, "block_size": 32}
    ((answers, _),) = engine_answers(str(tmp_path / "base"), requests, overrides, NEW_TOKENS, **options)
    assert answers == expected_answers(model, processor, requests, end)


def test_a_repository_of_a_side_branch_alone_is_served_with_its_base(wide, tmp_path):
    """And vanilla, on the same weights, if the overrides say so."""
    base, processor = make_with_processor("llava")
    base.save_pretrained(tmp_path / "base")
    fields = {"split_layer": 2, "routing": "kv_substitution", "side_branch_init": "random"}
    model = DpvrLlavaForConditionalGeneration.from_pretrained(str(tmp_path / "base"), dtype=torch.float32, **fields)
    model.save_pretrained(tmp_path / "own", side_branch_only=True)
    processor.save_pretrained(tmp_path / "own")
    requests = make_requests("llava", processor)
    for routing in ("kv_substitution", "none"):
        model.set_routing(routing)
        expected = expected_answers(model, processor, requests, processor.tokenizer.eos_token_id)
        ((answers, _),) = engine_answers(str(tmp_path / "own"), requests, {"routing": routing}, NEW_TOKENS)
        assert answers == expected


@pytest.mark.parametrize(
    "overrides, options, message",
    [
        ({"routing": "late_fusion"}, {}, "in layer 8 text must not see the image"),
        ({"latent_stride": 2}, {}, "latent_stride is 2"),
        ({}, {"enable_lora": True}, "--enable-lora is not supported under a DPVR routing"),
        ({}, {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "--speculative-config"),
        ({"routing": "kv_substitution"}, {"kv_cache_dtype": "fp8"}, "--kv-cache-dtype"),
        ({"routing": "none"}, {"enable_lora": True}, None),
    ],
)
def test_what_is_not_supported_is_refused_before_weights_are_loaded(overrides, options, message):
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(str(ROOT), dtype="float32", max_model_len=512, hf_overrides=overrides, **options)
    if message is None:
        arguments.create_engine_config()
        return
    with pytest.raises(ValueError, match=message):
        arguments.create_engine_config()
