"""The ways through a model between which the chat switches: routings on the same weights, and what each costs.

DpvrLlavaForConditionalGeneration   every routing that its config allows, "none" is vanilla     Ways
a stock model under an adapter      the adapter's routing, and "none": the adapter disabled     AdapterWays
a stock model                       "none" alone                                                StockWays
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from adapter_dpvr import DpvrConfig
from configuration_dpvr import ROUTINGS, check_choice, make_plan
from costs_dpvr import DecoderCosts, prefill_flops
from decoders_dpvr import owner_of, recurrent_layers
from modeling_dpvr import DpvrLlavaForConditionalGeneration

VANILLA = "none"
NAMES = {
    VANILLA: "vanilla",
    "late_fusion": "late fusion",
    "kv_substitution": "DPVR-KV",
    "persistent_context": "DPVR-PC",
    "text_only": "text only",
    "latent": "latent",
}


@dataclass
class SharedVision:
    """What vision tower and projector made of the pictures of a prompt, for further prefills of the same prompt.

    Attributes:
        milliseconds: that it took.
        seconds: that the last prefill spent on it.
    """

    outputs: list[Any] = field(default_factory=list)
    milliseconds: float = 0.0
    seconds: float = 0.0


class StockWays:
    """The one way through a stock model.

    Attributes:
        own: the routing that is taken unless another is asked for.
        now: the routing that the model has.
    """

    own = now = VANILLA
    choices: tuple[str, ...] = (VANILLA,)

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        self.model = model
        self.stock = model.get_base_model() if isinstance(model, PeftModel) else model

    def choose(self, routing: str) -> None:
        """Switch the model to a routing.

        Raises:
            ValueError: if there is no such way through this model; the routing then stays as it was.
        """
        check_choice("routing", routing, self.choices)

    def prefill_flops(self, num_image_tokens: int, num_text_tokens: int) -> int:
        """FLOPs of the language model in the prefill of V image and X text tokens, on the way that is chosen."""
        text = self.stock.config.get_text_config()
        plan = make_plan(text.num_hidden_layers, routing=VANILLA, split_layer=1, recurrent=recurrent_layers(text))
        return prefill_flops(DecoderCosts.of(text), plan, num_image_tokens, num_text_tokens)

    @contextmanager
    def timed_vision(self, now: Callable[[], float]) -> Iterator[list[float]]:
        """Collect the seconds that each pass through vision tower and projector takes, by the clock `now`."""
        seconds: list[float] = []

        def timed(encode: Callable[..., Any], *args: Any, **settings: Any) -> Any:
            begun = now()
            features = encode(*args, **settings)
            seconds.append(now() - begun)
            return features

        with self._around_vision(timed):
            yield seconds

    @contextmanager
    def shared_vision(self, vision: "SharedVision", now: Callable[[], float]) -> Iterator[None]:
        """Encode the pictures in the first prefill, and give later ones what came out then."""
        vision.seconds, passed = 0.0, iter([*vision.outputs])

        def shared(encode: Callable[..., Any], *args: Any, **settings: Any) -> Any:
            begun = now()
            features = next(passed, None)
            if features is None:
                features = encode(*args, **settings)
                vision.outputs.append(features)
                vision.milliseconds += 1e3 * (now() - begun)
            vision.seconds += now() - begun
            return features

        with self._around_vision(shared):
            yield

    @contextmanager
    def _around_vision(self, around: Callable[..., Any]) -> Iterator[None]:
        """Let `around` call vision tower and projector, which it is given as its first argument."""
        owner = owner_of(self.stock)
        encode = owner.get_image_features
        owner.get_image_features = wraps(encode)(partial(around, encode))  # generate reads its signature
        try:
            yield
        finally:
            del owner.get_image_features


class AdapterWays(StockWays):
    """An adapter's routing, and without the adapter vanilla."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__(model)
        self.config: DpvrConfig = model.peft_config[model.active_adapter]
        self.own = self.now = self.config.routing
        self.choices = (VANILLA, self.own)

    def choose(self, routing: str) -> None:
        super().choose(routing)
        if routing == VANILLA:
            self.model.base_model.disable_adapter_layers()
        else:
            self.model.base_model.enable_adapter_layers()
        self.now = routing

    def prefill_flops(self, num_image_tokens: int, num_text_tokens: int) -> int:
        if self.now == VANILLA:
            return super().prefill_flops(num_image_tokens, num_text_tokens)
        config, text = self.config, self.stock.config.get_text_config()
        plan, size = config.plan_for(self.stock.config), (num_image_tokens, num_text_tokens)
        return prefill_flops(DecoderCosts.of(text), plan, *size, branch=config.branch_for(plan))


class Ways(StockWays):
    """The routings of a DPVR-LLaVA."""

    choices = ROUTINGS

    def __init__(self, model: DpvrLlavaForConditionalGeneration) -> None:
        super().__init__(model)
        self.own = model.config.routing

    @property
    def now(self) -> str:
        return self.model.config.routing

    def choose(self, routing: str) -> None:
        self.model.set_routing(routing)

    def prefill_flops(self, num_image_tokens: int, num_text_tokens: int) -> int:
        return self.model.prefill_flops(num_image_tokens, num_text_tokens)


def ways_of(model: PreTrainedModel | PeftModel) -> StockWays:
    if isinstance(model, PeftModel):
        return AdapterWays(model)
    return Ways(model) if is_dpvr_llava(model) else StockWays(model)


def is_dpvr_llava(model: PreTrainedModel | PeftModel) -> bool:
    """Whether it is a DPVR-LLaVA, be it of the class in its own repository."""
    return model.config.model_type == DpvrLlavaForConditionalGeneration.config_class.model_type
