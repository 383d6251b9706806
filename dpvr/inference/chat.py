"""Answers of a vision-language model, streamed, with the time that every stage took.

    turns, pictures -> processor -> vision tower, projector -> prefill -> first token -> ... -> last token
                       prepare      vision                    prefill     decode                            seconds

Times are taken between the moments at which the stages hand over, each once the device has done all it was given;
nothing is estimated but the FLOPs, which are the model's cost formula. One answer is made at a time, since the routing
is the model's: whoever asks while another answer is being made waits for it.
"""

import queue
import statistics
import threading
import time
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    StoppingCriteria,
)
from transformers.cache_utils import CacheLayerMixin
from transformers.generation.streamers import BaseStreamer
from transformers.utils import cached_file

from adapter_dpvr import DpvrConfig, find_weights
from dpvr.analysis.attention import TextToImage, text_to_image_attention
from dpvr.data.prompts import Conversation, prompt_inputs
from dpvr.data.texts import fault_of_text, special_tokens
from dpvr.inference.ways import VANILLA, StockWays, is_dpvr_llava, ways_of
from dpvr.models import load_model, load_stock
from hub_dpvr import ADAPTER_CONFIG_NAME, ADAPTER_KEY_PREFIX
from images_dpvr import mark_ids
from modeling_dpvr import DpvrLlavaForConditionalGeneration
from processors_dpvr import load_processor
from versions_dpvr import cache_in

MAX_CHARACTERS = 20_000
COOLEST, HOTTEST = 0.05, 2.0
MIB = 2**20
ONE_WAY = "this is a stock model without an adapter, so vanilla is its only way: train one with train_sft.py."


@dataclass(frozen=True)
class Turn:
    """A question, the pictures that come with it, and the answer, None until there is one."""

    question: str
    pictures: tuple[Image.Image, ...] = ()
    answer: str | None = None


@dataclass(frozen=True)
class Readout:
    """Where the time of one answer went; milliseconds unless said.

    Attributes:
        prepare: template, tokenizer and picture preprocessing; pictures have been opened before.
        vision: vision tower and projector, 0 without a picture.
        prefill: the rest of the time to the first token, with what `generate` sets up.
        first_token: prepare, vision and prefill together: the time to first token.
        decode: from the first token to the last.
        decode_per_token: of each token after the first, None if there was none.
        tokens_per_second: after the first, None if there was none.
        kv_mib: keys and values in the cache at the end of the answer, MiB.
        prefill_gflops: of the language model, by the model's cost formula.
    """

    routing: str
    prepare: float
    vision: float
    prefill: float
    first_token: float
    decode: float
    decode_per_token: float | None
    tokens_per_second: float | None
    kv_mib: float
    prefill_gflops: float
    image_tokens: int
    text_tokens: int
    new_tokens: int


class Partial(NamedTuple):
    """An answer as far as it has come; the readout comes with the last one."""

    text: str
    readout: Readout | None = None


class Comparison(NamedTuple):
    """The same question under vanilla and the model's own routing: answers, and medians over warm repetitions."""

    texts: tuple[str, str]
    medians: tuple[Readout, Readout]
    repetitions: int


def load(name: str, *args: Any, **settings: Any) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a DPVR-LLaVA, or an adapter for one and its base, as `load_any`.

    Raises:
        ValueError: as `load_any`, and for another model.
    """
    model, *where = _load(name, *args, **settings)
    if not is_dpvr_llava(model):
        raise ValueError(
            f"{name!r} holds a model of type {model.config.model_type!r}, neither a DPVR model nor an adapter: train "
            "a side branch on it with train_sft.py first."
        )
    return model, load_processor(*where)


def load_any(name: str, *args: Any, **settings: Any) -> tuple[PreTrainedModel | PeftModel, ProcessorMixin]:
    """Load a DPVR repository, an adapter and its base, or a stock vision-language model, with its own processor.

    Args:
        base: for an adapter, where its base lies, if not where its config says.
        revision: of what is loaded by its name.
        device: where to put it; the GPU if there is one, unless said.
        trust_remote_code: load a repository with its own code; unless said, none of it is run.
        **loading: as `from_pretrained` takes it: dtype (that of the weights, unless said), attn_implementation, ...

    Raises:
        ValueError: if it is none of these, if it needs code that is not trusted, or if a base is given for what
            names its own.
    """
    model, *where = _load(name, *args, **settings)
    return model, load_processor(*where)


def _load(
    name: str,
    base: str | None = None,
    revision: str = "main",
    device: str | None = None,
    *,
    trust_remote_code: bool = False,
    **loading: Any,
) -> tuple[PreTrainedModel | PeftModel, str, str]:
    """Load a model; returns it, and the name and revision under which its processor lies."""
    home, loading = name, {"dtype": "auto", **loading}
    if _find(name, ADAPTER_CONFIG_NAME, revision) and not _find(name, "config.json", revision):
        config = DpvrConfig.from_pretrained(name, revision=revision)
        home = base or config.base_model_name_or_path
        model = _on_base(config, home, name, revision, **loading)
        revision = "main"
    elif base is not None:
        raise ValueError(f"{name!r} is not a PEFT adapter, so it brings its own base: leave the base {base!r} out.")
    else:
        model = load_model(name, revision=revision, trust_remote_code=trust_remote_code, **loading)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), home, revision


def _on_base(config: DpvrConfig, base: str, name: str, revision: str, **loading: Any) -> PreTrainedModel | PeftModel:
    """Put an adapter's side branch on its base; no code of a base that a mere adapter names is run."""
    stock, info = load_stock(base, output_loading_info=True, **loading)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"The base {base!r} lacks {len(missing)} weights, such as {missing[0]!r}: name the model that the adapter "
            "was trained on."
        )
    config.plan_for(stock.config)
    if not isinstance(stock, LlavaForConditionalGeneration):
        return PeftModel.from_pretrained(stock, name, revision=revision)
    model = DpvrLlavaForConditionalGeneration.from_llava(stock, **config.dpvr_fields())
    branch = load_file(find_weights(name, revision=revision))
    model.load_side_branch({key.removeprefix(ADAPTER_KEY_PREFIX): tensor for key, tensor in branch.items()})
    return model


def _find(name: str, file: str, revision: str) -> str | None:
    return cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)


class Answerer:
    """A model, its processor, and one place in front of it."""

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin) -> None:
        self.model = model
        self.processor = processor
        self.ways = ways_of(model)
        self.routing = self.ways.own
        self.place = threading.Lock()
        self.worker = ThreadPoolExecutor(1)  # one for all answers: a new thread would warm up its own kernels

    def inputs(self, turns: Sequence[Turn], max_new_tokens: int) -> dict[str, torch.Tensor]:
        """Return what the model takes for a conversation, whose last question waits for its answer.

        Raises:
            ValueError: if the last question is empty, too long, or holds control characters or the model's own marks.
        """
        self._check_question(turns[-1].question)
        messages = []
        for turn in turns:
            content = [{"type": "image"}] * len(turn.pictures) + [{"type": "text", "text": turn.question}]
            messages.append({"role": "user", "content": content})
            if turn.answer is not None:
                answer = self._without_marks(turn.answer)
                messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        pictures = [picture for turn in turns for picture in turn.pictures]
        inputs = prompt_inputs(self.processor, [Conversation(messages, pictures)])
        length, room = inputs["input_ids"].shape[1], self.model.config.get_text_config().max_position_embeddings
        if length + max_new_tokens > room:
            raise ValueError(
                f"The conversation has {length} tokens; with {max_new_tokens} for the answer the model has room for "
                f"{room - max_new_tokens}: ask a shorter question, or start a new chat."
            )
        return inputs.to(self.model.device, self.model.dtype)

    def _without_marks(self, answer: str) -> str:
        """A model may spell its own marks, letter by letter; read again they would be marks."""
        for mark in self.processor.tokenizer.all_special_tokens:
            answer = answer.replace(mark, f"{mark[0]} {mark[1:]}")
        return answer

    def _check_question(self, question: str) -> None:
        if not question.strip():
            raise ValueError("The question is empty: type one.")
        if len(question) > MAX_CHARACTERS:
            raise ValueError(
                f"The question has {len(question):,} characters, and at most {MAX_CHARACTERS:,} are taken: shorten it."
            )
        if control := sorted({character for character in question if _is_control(character)}):
            raise ValueError(
                f"The question holds control characters, such as {control[0]!r}, which no one types: take them out."
            )
        if (fault := fault_of_text(question, special_tokens(self.processor))) is not None:
            raise ValueError(f"The question cannot be asked: {fault}: take it out. Pictures are put in by themselves.")

    def stream(
        self,
        turns: Sequence[Turn],
        *,
        routing: str | None = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
    ) -> Iterator[Partial]:
        """Yield the answer to the last question as it grows; closing the iterator stops the model.

        Args:
            turns: the conversation; pictures stand before the questions they came with.
            routing: another than the model's own; "none" is vanilla.
            max_new_tokens: at least 1.
            temperature: 0 takes the likeliest token each time, else from 0.05 to 2.

        Raises:
            ValueError: as `inputs`, and for another routing or temperature.
            RuntimeError: if the model fails.
        """
        if not (temperature == 0 or COOLEST <= temperature <= HOTTEST):
            raise ValueError(
                f"The temperature is {temperature}: use 0, for the likeliest answer, or {COOLEST} to {HOTTEST}."
            )
        start = time.perf_counter()
        inputs = self.inputs(turns, max_new_tokens)
        run = _Run(self.model, self.ways, prepare=time.perf_counter() - start)
        with self.place, self.ways.timed_vision(run.now) as run.vision:
            self.ways.choose(routing or self.routing)
            sampling = {"temperature": float(temperature)} if temperature > 0 else {}
            job = run.begin(self.worker, inputs, max_new_tokens=max_new_tokens, do_sample=temperature > 0, **sampling)
            try:
                for tokens in run.growing():
                    yield Partial(self._text(tokens))
                with of_the_model():
                    output = job.result()
                yield Partial(self._text(run.tokens), run.readout(inputs, output))
            finally:
                run.stop.set()
                job.exception()  # wait for the end
                self.ways.choose(self.routing)

    def _text(self, tokens: list[int]) -> str:
        return self.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip().rstrip("\ufffd")

    def answer(self, turns: Sequence[Turn], **settings: Any) -> Partial:
        """Return the whole answer at once; arguments as `stream`."""
        *_, last = self.stream(turns, **settings)
        return last

    def compare(
        self, turns: Sequence[Turn], *, repetitions: int = 5, max_new_tokens: int = 64
    ) -> Iterator[tuple[float, Comparison | None]]:
        """Answer under vanilla and under the model's own routing in turn; yield the share done, at last the result.

        The first of each is a warm-up and not counted. Likeliest tokens only, so the answers do not vary.

        Raises:
            ValueError: as `inputs`, and for a stock model.
        """
        if self.ways.own == VANILLA:
            raise ValueError(f"There is nothing to compare: {ONE_WAY}")
        routings, results = ("none", self.routing), ([], [])
        total = 2 * (repetitions + 1)
        for count in range(total):
            yield count / total, None
            results[count % 2].append(self.answer(turns, routing=routings[count % 2], max_new_tokens=max_new_tokens))
        texts = tuple(answers[-1].text for answers in results)
        medians = tuple(_median([answer.readout for answer in answers[1:]]) for answers in results)
        yield 1.0, Comparison(texts, medians, repetitions)

    def look_inside(self, turns: Sequence[Turn]) -> tuple[TextToImage, TextToImage, torch.Tensor]:
        """Return the text's attention to the pictures under vanilla and the model's own routing, and the pictures.

        The pictures, float32 (N, 3, height, width) from 0 to 1, are what the vision tower sees.

        Raises:
            ValueError: as `inputs`, without a picture, and for a model that is no DPVR-LLaVA.
        """
        if not is_dpvr_llava(self.model):
            raise ValueError(
                f"This model is of type {self.model.config.model_type!r}, and only the attention of a DPVR-LLaVA can "
                "be looked at: serve one, such as dpvr-mini."
            )
        if not any(turn.pictures for turn in turns):
            raise ValueError("There is no picture to look at: send one with the question.")
        inputs = self.inputs(turns, max_new_tokens=0)
        with self.place:
            found = []
            for routing in ("none", self.routing):
                self.ways.choose(routing)
                try:
                    with of_the_model():
                        found.append(text_to_image_attention(self.model, inputs))
                finally:
                    self.ways.choose(self.routing)
        own = self.processor.image_processor
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (own.image_mean, own.image_std))
        pictures = inputs["pixel_values"].float().cpu() * std + mean
        return found[0], found[1], pictures.clamp(0, 1)


class _Run(BaseStreamer):
    """One call of `generate`, in the worker's thread: its tokens as they come, and the moments between its stages."""

    def __init__(self, model: PreTrainedModel | PeftModel, ways: StockWays, prepare: float) -> None:
        self.model = model
        self.ways = ways
        self.stop = threading.Event()
        self.prepare = prepare
        self.vision: list[float] = []
        self.tokens: list[int] = []
        self.moments: list[float] = []  # one per token
        self.arrived: queue.Queue[int | None] = queue.Queue()
        self.knows_prompt = False

    def now(self) -> float:
        """Seconds, once the device has done all that it was given."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def begin(self, pool: ThreadPoolExecutor, inputs: dict[str, torch.Tensor], **settings: Any) -> Future:
        self.start = self.now()
        settings |= {"streamer": self, "return_dict_in_generate": True, "stopping_criteria": [_Stop(self.stop)]}
        job = pool.submit(self.model.generate, **inputs, **settings)
        job.add_done_callback(lambda _: self.arrived.put(None))
        return job

    def put(self, value: torch.Tensor) -> None:
        if not self.knows_prompt:  # which comes first
            self.knows_prompt = True
            return
        self.moments.append(self.now())
        self.tokens += value.flatten().tolist()
        self.arrived.put(len(self.tokens))

    def end(self) -> None:
        """Nothing: the job's own end is what counts, as it may also fail."""

    def growing(self) -> Iterator[list[int]]:
        """Yield the tokens so far each time one has come, or several while nobody asked, until the job is done."""
        while (count := self.arrived.get()) is not None:
            if self.arrived.empty():
                yield self.tokens[:count]

    def readout(self, inputs: dict[str, torch.Tensor], output: Any) -> Readout:
        total, image = inputs["input_ids"].shape[1], num_image_tokens(self.model.config, inputs["input_ids"])
        vision = sum(self.vision)
        decode, later = self.moments[-1] - self.moments[0], len(self.tokens) - 1
        to_first = self.moments[0] - self.start
        kept = [layer for layer in cache_in(output).layers if isinstance(layer, CacheLayerMixin)]  # others: recurrent
        keys = [layer.keys.nbytes + layer.values.nbytes for layer in kept if layer.keys is not None]
        return Readout(
            routing=self.ways.now,
            prepare=1e3 * self.prepare,
            vision=1e3 * vision,
            prefill=1e3 * (to_first - vision),
            first_token=1e3 * (self.prepare + to_first),
            decode=1e3 * decode,
            decode_per_token=1e3 * decode / later if later else None,
            tokens_per_second=later / decode if later else None,
            kv_mib=sum(keys) / MIB,
            prefill_gflops=self.ways.prefill_flops(image, total - image) / 1e9,
            image_tokens=image,
            text_tokens=total - image,
            new_tokens=len(self.tokens),
        )


def num_image_tokens(config: PretrainedConfig, input_ids: torch.Tensor) -> int:
    return int(torch.isin(input_ids, torch.tensor(mark_ids(config), device=input_ids.device)).sum())


class _Stop(StoppingCriteria):
    def __init__(self, stop: threading.Event) -> None:
        self.stop = stop

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.stop.is_set(), dtype=torch.bool, device=input_ids.device)


@contextmanager
def of_the_model() -> Iterator[None]:
    """Tell an error of the model, whose input has been checked, from one of the person who asks: a ValueError."""
    try:
        yield
    except ValueError as error:
        raise RuntimeError("The model failed at an input that had been checked.") from error


def _median(readouts: Sequence[Readout]) -> Readout:
    """Return the median of each figure; what is the same in all stays."""
    columns = {field.name: [vars(readout)[field.name] for readout in readouts] for field in fields(Readout)}
    return Readout(
        **{
            name: statistics.median(column) if isinstance(column[0], float) else column[0]
            for name, column in columns.items()
        }
    )


def _is_control(character: str) -> bool:
    """Whether it is a control character or half of a surrogate pair, and not a line break or a tab."""
    return unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\r\t"
