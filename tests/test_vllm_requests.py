"""Requests to vLLM with dpvr-mini under its latent: refused, sampled and streamed ones; and CUDA graphs."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: it has an environment of its own, requirements-vllm.txt")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from vllm import LLM, SamplingParams, envs  # noqa: E402
from vllm.config import CUDAGraphMode  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.exceptions import VLLMValidationError  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.sampling_params import RequestOutputKind  # noqa: E402

from dpvr.serving.check_run import (  # noqa: E402
    as_prompt,
    conversations,
    engine,
    make_requests,
    transformers_answers,
)
from dpvr.serving.plans import check_graphs  # noqa: E402
from modeling_dpvr import DpvrLlavaForConditionalGeneration  # noqa: E402
from processors_dpvr import load_processor  # noqa: E402

ROOT = Path(__file__).parent.parent
NEW_TOKENS = 8
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
LATENT = {"routing": "latent"}


@pytest.fixture(scope="module")
def asked() -> list:
    return conversations(12)


@pytest.fixture(scope="module")
def requests(asked) -> list:
    return make_requests(load_processor(str(ROOT)), asked)


@pytest.fixture(scope="module")
def expected(asked) -> list[list[int]]:
    processor = load_processor(str(ROOT))
    return transformers_answers(str(ROOT), "latent", processor, asked, NEW_TOKENS)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with engine(str(ROOT), LATENT) as started:
        yield started


def answers(llm: LLM, requests: list, sampling: SamplingParams) -> list[list[int]]:
    """The tokens of each answer, without the one that ends it."""
    end = llm.get_tokenizer().eos_token_id
    outputs = llm.generate(requests, sampling, use_tqdm=False)
    return [[token for token in each.outputs[0].token_ids if token != end] for each in outputs]


@pytest.mark.parametrize(
    "prompt, pictures, message",
    [
        ("USER: What is <image> here? ASSISTANT:", 0, "has 1 marks for pictures, such as <image>, and 0 pictures"),
        ("USER: <image>\nWhat is <image> here? ASSISTANT:", 1, "has 2 marks for pictures.* and 1 pictures came"),
        ("USER: <image>\nWhat is here? ASSISTANT:", 2, "has 1 marks for pictures.* and 2 pictures came"),
        ("USER: What is here? ASSISTANT:", 1, "has 0 marks for pictures.* and 1 pictures came"),
        ("USER: What is here? <image>", 1, "The prompt ends in an image"),
    ],
)
def test_a_prompt_whose_marks_and_pictures_do_not_fit_is_refused(prompt, pictures, message, llm, asked):
    """As by transformers; and its pictures can be asked about at once, for nothing of it was kept."""
    given = (asked[-1].pictures * 2)[:pictures]
    request = {"prompt": prompt, "multi_modal_data": {"image": given}} if pictures else prompt
    with pytest.raises(VLLMValidationError, match=message):
        llm.generate([request], GREEDY, use_tqdm=False)
    processor, model = load_processor(str(ROOT)), DpvrLlavaForConditionalGeneration.from_pretrained(str(ROOT))
    with pytest.raises((ValueError, StopIteration)):  # the latter by the processor, if it has too few pictures
        model.generate(**processor(images=given or None, text=prompt, return_tensors="pt"), max_new_tokens=1)


def test_a_mark_typed_beside_a_picture_of_a_message_is_its_place_or_refused(llm, asked):
    """The first is vLLM's rule for templates that it takes for ones of plain strings, as dpvr-mini's."""
    picture = next(each.pictures[0] for each in asked if each.pictures)
    content = [{"type": "text", "text": "What is <image> here?"}, {"type": "image_pil", "image_pil": picture}]
    messages = [{"role": "user", "content": content}]
    (answer,) = llm.chat(messages, GREEDY, use_tqdm=False)
    prompt = {"prompt": "USER: What is <image> here? ASSISTANT:", "multi_modal_data": {"image": [picture]}}
    (expected,) = llm.generate([prompt], GREEDY, use_tqdm=False)
    begin = len(expected.prompt_token_ids) - len(answer.prompt_token_ids)  # a chat has no begin token unless asked to
    assert answer.prompt_token_ids == expected.prompt_token_ids[begin:] and begin in (0, 1)
    with pytest.raises(VLLMValidationError, match="has 2 marks for pictures.* and 1 pictures came"):
        llm.chat(messages, GREEDY, use_tqdm=False, chat_template_content_format="openai")


def test_after_refused_requests_all_others_are_answered_right(llm, requests, expected):
    assert answers(llm, requests, GREEDY) == expected
    assert len({tuple(answer) for answer in expected}) > 3


def test_a_sampled_answer_is_that_of_its_seed_alone_or_in_a_batch(llm, requests):
    def sampling(seed: int) -> SamplingParams:  # past its end an answer is anything but sure
        return SamplingParams(temperature=2.0, seed=seed, max_tokens=2 * NEW_TOKENS, ignore_eos=True)

    together = answers(llm, requests, sampling(11))
    assert together == [answers(llm, [request], sampling(11))[0] for request in requests]
    assert together != answers(llm, requests, sampling(12)), "the seed changed nothing"


def test_at_a_low_temperature_sampled_answers_are_the_greedy_ones(llm, requests, expected):
    assert answers(llm, requests, SamplingParams(temperature=0.01, seed=3, max_tokens=NEW_TOKENS)) == expected


@torch.no_grad()
def test_what_is_sampled_from_is_the_distribution_of_transformers(llm, requests, asked):
    """The log-probabilities of an answer's first token, of the likeliest ones."""
    model = DpvrLlavaForConditionalGeneration.from_pretrained(str(ROOT), dtype=torch.float32)
    model.set_routing("latent")
    processor = load_processor(str(ROOT))
    with torch.compiler.set_stance("force_eager"):  # vLLM compiles how it ranks tokens, for minutes
        outputs = llm.generate(requests, SamplingParams(temperature=0, max_tokens=1, logprobs=5), use_tqdm=False)
    for output, conversation in zip(outputs, asked, strict=True):
        text, pictures = as_prompt(processor, conversation), list(conversation.pictures) or None
        inputs = processor(images=pictures, text=text, return_tensors="pt")
        logits = model(**inputs).logits[0, -1].float()
        logits[model.config.image_token_id] = -torch.inf  # which vLLM's never samples
        wanted = logits.log_softmax(-1)
        (found,) = output.outputs[0].logprobs
        assert len(found) >= 5
        for token, each in found.items():
            assert each.logprob == pytest.approx(wanted[token].item(), abs=2e-3)


def test_streamed_tokens_are_those_of_the_whole_answer(llm, requests, expected):
    """Requests that join while others are answered; each step hands on what it made."""
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, output_kind=RequestOutputKind.DELTA)
    streams, waiting, steps = {}, dict(enumerate(requests)), 0
    while waiting or llm.llm_engine.has_unfinished_requests():
        for name in list(waiting)[:2]:
            llm.llm_engine.add_request(str(name), waiting.pop(name), sampling)
            streams[name] = []
        for output in llm.llm_engine.step():
            streams[int(output.request_id)].append(list(output.outputs[0].token_ids))
        steps += 1
    end = llm.get_tokenizer().eos_token_id
    whole = [[token for part in streams[name] for token in part if token != end] for name in range(len(requests))]
    assert whole == expected
    assert max(map(len, streams.values())) > 1, "nothing came in parts"


@pytest.mark.parametrize("wanted", [None, "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"])
def test_full_graphs_are_off_under_a_routing_where_vanilla_has_them(wanted, monkeypatch):
    """On a platform that has graphs, of which this makes the CPU one; by default and if they are asked for."""
    monkeypatch.setattr(type(current_platform), "support_static_graph_mode", classmethod(lambda _: True))
    has_full = {}
    for routing in ("latent", "none"):
        options = {} if wanted is None else {"compilation_config": {"cudagraph_mode": wanted}}
        arguments = EngineArgs(str(ROOT), max_model_len=512, hf_overrides={"routing": routing}, **options)
        has_full[routing] = arguments.create_engine_config().compilation_config.cudagraph_mode.has_full_cudagraphs()
    assert has_full == {"latent": False, "none": True}


@pytest.mark.parametrize(
    "mode, breakable, refused",
    [
        ("NONE", True, False),
        ("PIECEWISE", False, False),
        ("PIECEWISE", True, True),
        ("FULL_AND_PIECEWISE", False, True),
        ("FULL_DECODE_ONLY", False, True),
    ],
)
def test_graphs_of_a_whole_step_are_refused_when_the_model_is_built(mode, breakable, refused, monkeypatch):
    monkeypatch.setattr(envs, "VLLM_USE_BREAKABLE_CUDAGRAPH", breakable, raising=False)
    config = SimpleNamespace(compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode[mode]))
    if refused:
        with pytest.raises(ValueError, match="a graph does not ask which tokens are images"):
            check_graphs(config)
    else:
        check_graphs(config)
