"""Answers of a vision-language model, streamed; the same question the other way; and a look at its attention.

    turns, pictures --checked, written as the model's template writes them--> inputs --Run--> text, piece by piece
                                                                                    --> readout: where the time went
One answer is made at a time, since the routing is the model's: whoever asks while another answer is being made waits
for it.
"""

import statistics
import threading
import time
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from dpvr.analysis.attention import TextToImage, text_to_image_attention
from dpvr.data.prompts import Conversation, prompt_inputs
from dpvr.data.texts import fault_of_text, special_tokens
from dpvr.inference.comparison import PATIENCE, WARM_UP, Comparison, is_decided, ratio_of
from dpvr.inference.runs import Readout, Run, of_the_model
from dpvr.inference.unlike import criterion_for, features_of
from dpvr.inference.ways import VANILLA, SharedVision, is_dpvr_llava, ways_of

MAX_CHARACTERS = 20_000
COOLEST, HOTTEST = 0.05, 2.0
ONE_WAY = "this is a stock model without an adapter, so vanilla is its only way: train one with train_sft.py."
VANILLA_CHOSEN = "vanilla is the chosen method: choose another in the settings."
FIRST_WORDS = 3  # under either routing, of which the medians stand under an answer
TO_FIRST_WORD = ("prepare", "vision", "prefill", "first_token")


@dataclass(frozen=True)
class Turn:
    """A question, the pictures that come with it, and the answer, None until there is one."""

    question: str
    pictures: tuple[Image.Image, ...] = ()
    answer: str | None = None


class Partial(NamedTuple):
    """An answer as far as it has come; the readout comes with the last one."""

    text: str
    readout: Readout | None = None


class Beside(NamedTuple):
    """Vanilla's answer to the same question, and both readouts; times to the first word are medians of a few."""

    text: str
    vanilla: Readout
    own: Readout


class Answerer:
    """A model, its processor, and one place in front of it."""

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin) -> None:
        self.model = model
        self.processor = processor
        self.ways = ways_of(model)
        self.routing = self.ways.own
        self.criterion = criterion_for(model)
        self.place = threading.Lock()
        self.worker = ThreadPoolExecutor(1)  # one for all answers: a new thread would warm up its own kernels

    def inputs(self, turns: Sequence[Turn], max_new_tokens: int) -> dict[str, torch.Tensor]:
        """Return what the model takes for a conversation, whose last question waits for its answer; as `prompt`."""
        return self.prompt(turns, max_new_tokens).to(self.model.device, self.model.dtype)

    def prompt(self, turns: Sequence[Turn], max_new_tokens: int) -> BatchFeature:
        """Return the same where the processor makes it.

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
        return inputs

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
        run = Run(self.model, self.ways, prepare=time.perf_counter() - start)
        with self.place, self.ways.timed_vision(run.now) as run.vision:
            self.ways.choose(routing or self.routing)
            sampling = {"temperature": float(temperature)} if temperature > 0 else {}
            job = run.begin(self.worker, inputs, max_new_tokens=max_new_tokens, do_sample=temperature > 0, **sampling)
            try:
                for tokens in run.growing():
                    yield Partial(self._text(tokens))
                with of_the_model():
                    output = job.result()
                whole = Partial(self._text(run.tokens), run.readout(inputs, output))
            finally:
                run.stop.set()
                job.exception()  # wait for the end
                self.ways.choose(self.routing)
        yield whole  # whoever takes it may ask again, as the place is free

    def _text(self, tokens: list[int]) -> str:
        return self.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip().rstrip("\ufffd")

    def answer(self, turns: Sequence[Turn], **settings: Any) -> Partial:
        """Return the whole answer at once; arguments as `stream`."""
        *_, last = self.stream(turns, **settings)
        return last

    def beside(
        self, turns: Sequence[Turn], own: Partial, *, routing: str | None = None, max_new_tokens: int = 64
    ) -> Beside:
        """Return vanilla's answer to a question that was just answered, and the times to the first words.

        Args:
            own: the whole answer that was given, with its readout.
            routing: under which it was given, if not the model's own.

        Raises:
            ValueError: as `stream`.
        """
        vanilla = self.answer(turns, routing=VANILLA, max_new_tokens=max_new_tokens)
        readouts = ([vanilla.readout], [own.readout])
        for _ in range(FIRST_WORDS - 1):
            for found, way in zip(readouts, (VANILLA, routing), strict=True):
                found.append(self.answer(turns, routing=way, max_new_tokens=1).readout)
        times = [{name: _median(found, name) for name in TO_FIRST_WORD} for found in readouts]
        both = [replace(found[0], **medians) for found, medians in zip(readouts, times, strict=True)]
        return Beside(vanilla.text, both[0], both[1])

    def compare(
        self,
        turns: Sequence[Turn],
        *,
        routing: str | None = None,
        max_new_tokens: int = 64,
        patience: float = PATIENCE,
    ) -> Iterator[tuple[float, Comparison | None]]:
        """Answer under vanilla and another routing, and time both prefills; yield the share done, then the result.

        The prefills run in turn, on one output of the vision tower, until `comparison.is_decided` or `patience`
        seconds are over. Between them other askers have their turn. Likeliest tokens only: the answers do not vary.

        Raises:
            ValueError: as `stream`, and if there is nothing but vanilla to compare.
        """
        own = routing or self.routing
        if own == VANILLA:
            reason = ONE_WAY if self.ways.own == VANILLA else VANILLA_CHOSEN
            raise ValueError(f"There is nothing to compare: {reason}")
        ways = (VANILLA, own)
        answers = []
        for way in ways:
            yield len(answers) / 4, None
            answers.append(self.answer(turns, routing=way, max_new_tokens=max_new_tokens))
        inputs, vision, times = self.inputs(turns, max_new_tokens), SharedVision(), ([], [])
        end, rounds = time.perf_counter() + patience, 0
        while not is_decided(*times) and (time.perf_counter() < end or len(times[0]) < 6):
            for number in (0, 1) if rounds % 2 else (1, 0):
                spent = self._prefill(inputs, ways[number], vision)
                if rounds >= WARM_UP:
                    times[number].append(spent)
            rounds += 1
            spent_share = 1 - max(0.0, end - time.perf_counter()) / patience if patience else 1.0
            yield 0.5 + 0.5 * min(0.95, spent_share), None
        medians = [
            _with_times(found.readout, vision.milliseconds, statistics.median(spent))
            for found, spent in zip(answers, times, strict=True)
        ]
        texts = tuple(found.text for found in answers)
        yield 1.0, Comparison(texts, tuple(medians), ratio_of(*times), len(times[0]))

    def _prefill(self, inputs: dict[str, torch.Tensor], routing: str, vision: SharedVision) -> float:
        """Milliseconds to the first token, after pictures and prompt have been prepared and the pictures encoded."""
        run = Run(self.model, self.ways, prepare=0.0)
        with self.place, self.ways.shared_vision(vision, run.now):
            self.ways.choose(routing)
            try:
                job = run.begin(self.worker, inputs, max_new_tokens=1, do_sample=False)
                with of_the_model():
                    job.result()
                return 1e3 * (run.moments[0] - run.start - vision.seconds)
            finally:
                self.ways.choose(self.routing)

    def look_inside(
        self, turns: Sequence[Turn], routing: str | None = None
    ) -> tuple[TextToImage, TextToImage, torch.Tensor]:
        """Return the text's attention to the pictures under vanilla and another routing, and the pictures.

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
            for way in (VANILLA, routing or self.routing):
                self.ways.choose(way)
                try:
                    with of_the_model():
                        found.append(text_to_image_attention(self.model, inputs))
                finally:
                    self.ways.choose(self.routing)
        own = self.processor.image_processor
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (own.image_mean, own.image_std))
        pictures = inputs["pixel_values"].float().cpu() * std + mean
        return found[0], found[1], pictures.clamp(0, 1)

    def unlike(self, pictures: Sequence[Image.Image]) -> list[bool]:
        """Return for each picture whether it is unlike those that the model was trained on; empty if nobody knows."""
        if self.criterion is None or not pictures:
            return []
        with self.place:
            features = self.worker.submit(features_of, self.model, self.processor, pictures).result()
        return self.criterion.are_unlike(features)


def _median(readouts: Sequence[Readout], name: str) -> float:
    return statistics.median(vars(readout)[name] for readout in readouts)


def _with_times(readout: Readout, vision: float, prefill: float) -> Readout:
    return replace(readout, vision=vision, prefill=prefill, first_token=readout.prepare + vision + prefill)


def _is_control(character: str) -> bool:
    """Whether it is a control character or half of a surrogate pair, and not a line break or a tab."""
    return unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\r\t"
