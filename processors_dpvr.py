"""Loading the processor of a vision-language model: its tokenizer, chat template and picture settings, without code.

processor_config.json, tokenizer.json, ...  -->  the processor of the model's type, in transformers
                                                 without torchvision: one that takes pictures and no videos
"""

import inspect
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    LlavaProcessor,
    PretrainedConfig,
    ProcessorMixin,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import PushToHubMixin, cached_file, is_torchvision_available

try:
    from .configuration_dpvr import DpvrLlavaConfig
except ImportError:
    from configuration_dpvr import DpvrLlavaConfig

VIDEO_SETTINGS, IMAGE_SETTINGS = "video_preprocessor_config.json", "preprocessor_config.json"


def load_processor(name_or_path: str, revision: str = "main", token: str | bool | None = None) -> ProcessorMixin:
    """Load the processor of a vision-language model; code beside it is not run, as a processor needs none.

    Where torchvision is missing, which many video processors need, the processor takes pictures alone.
    """
    AutoConfig.register(DpvrLlavaConfig.model_type, DpvrLlavaConfig, exist_ok=True)
    AutoProcessor.register(DpvrLlavaConfig, LlavaProcessor, exist_ok=True)
    where = {"revision": revision, "token": token, "trust_remote_code": False}
    kind = _processor_class(name_or_path, **where)
    if kind is None or not has_videos(kind) or is_torchvision_available():
        return AutoProcessor.from_pretrained(name_or_path, **where)
    fields, _ = kind.get_processor_dict(name_or_path, **where)
    image_processor = AutoImageProcessor.from_pretrained(name_or_path, **where)
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, **where)
    videos = NoVideos(_video_settings(name_or_path, fields, **where))
    return for_pictures_alone(kind).from_args_and_dict([image_processor, tokenizer, videos], fields)


def _processor_class(name_or_path: str, **where: Any) -> type | None:
    """The class of a repository's processor, by the type of its model; None for a type that transformers lacks."""
    kind = PretrainedConfig.get_config_dict(name_or_path, **where)[0].get("model_type")
    return PROCESSOR_MAPPING.get(CONFIG_MAPPING[kind], None) if kind in CONFIG_MAPPING else None


def has_videos(processor: type) -> bool:
    """Whether a class of processors takes videos."""
    return "video_processor" in inspect.signature(processor.__init__).parameters


@lru_cache
def for_pictures_alone(processor: type) -> type:
    """A subclass of a processor's class, with the same name, which takes `NoVideos` for its video processor."""

    def check(self, argument_name: str, argument: Any) -> type:
        if isinstance(argument, NoVideos):
            return NoVideos
        return processor.check_argument_for_proper_class(self, argument_name, argument)

    own = {"check_argument_for_proper_class": check, "__module__": processor.__module__}
    return type(processor.__name__, (processor,), own)


class NoVideos(PushToHubMixin):
    """Stands in for a video processor where torchvision is missing: keeps the settings, and takes no video."""

    model_input_names: list[str] = []
    num_frames = fps = None  # SmolVLM's processor reads them for every prompt
    _auto_class = None

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def __call__(self, *_: Any, **__: Any) -> None:
        raise ValueError("Videos need torchvision, which is not installed: pip install torchvision, or give pictures.")

    def to_dict(self) -> dict[str, Any]:
        return self.settings

    def save_pretrained(self, folder: str | os.PathLike, **_: Any) -> None:
        """Write the settings to a file of their own, as transformers 4 does."""
        Path(folder, VIDEO_SETTINGS).write_text(json.dumps(self.settings, indent=2), encoding="utf-8")


def _video_settings(name_or_path: str, fields: dict[str, Any], **where: Any) -> dict[str, Any]:
    """The settings of a video processor: in processor_config.json, `fields`, a file of their own, or the pictures'."""
    if "video_processor" in fields:
        return fields["video_processor"]
    where["_raise_exceptions_for_missing_entries"] = False
    paths = (cached_file(name_or_path, name, **where) for name in (VIDEO_SETTINGS, IMAGE_SETTINGS))
    path = next((path for path in paths if path is not None), None)
    return {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
