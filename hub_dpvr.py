"""Sharing a side branch on the Hub: all files in one commit, with a model card made from the record of the run.

    save_pretrained(side_branch_only=True)    side branch, config, code
    the base's processor                      tokenizer, image processor, chat template
    save_adapter                              adapter/: the same side branch for PEFT
    training.json, if a run wrote one         recipe, data, versions, loss curve, scores
        |
      upload         adds a card, and makes one commit: a push that fails leaves the repository as it was
        |
    me/x             from_pretrained("me/x", trust_remote_code=True); the base is loaded from its own repository

The command `python -m dpvr.push` does the same for the folder of a saved model, or of a PEFT adapter on any
vision-language model, whose two files go to the top of the repository (dpvr/push.py).
"""

import inspect
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import save_file
from transformers import ProcessorMixin

try:
    from .configuration_dpvr import DpvrLlavaConfig, fields_that_run
    from .loading_dpvr import LATENT, is_side_branch
    from .processors_dpvr import load_processor
except ImportError:
    from configuration_dpvr import DpvrLlavaConfig, fields_that_run
    from loading_dpvr import LATENT, is_side_branch
    from processors_dpvr import load_processor

CONFIG_NAME, RECORD_NAME, CARD_NAME = "config.json", "training.json", "README.md"
ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_KEY_PREFIX = "base_model.model."  # PEFT's, before the names of a model's weights
SUFFIXES = (".py", ".json", ".jinja", ".model", ".txt", ".safetensors")
WEIGHTS_SUFFIXES = (".safetensors", ".index.json")
ADAPTER_FOLDER = "adapter"
# The bases of HfHubHTTPError are the error of the HTTP client that this release uses: requests, httpx or httpx2.
HUB_ERRORS = (OSError, RuntimeError, HFValidationError, *HfHubHTTPError.__bases__)

CARD = """\
# {name}

{holds} It was made with DPVR, late-layer fusion for LLaVA
([Late-Layer Fusion is Enough](https://arxiv.org/abs/2606.09131)). {plan}

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{name}")
```

## Training

{training}

## Scores

{scores}

## Limits

This model has the limits of its base and of the data it was trained on. {limits}What is not listed under Scores was
not measured.

{mark}
"""
ADAPTER_CARD = """\
# {name}

A side branch for [{base}](https://huggingface.co/{base}), as a PEFT adapter. It was made with DPVR
([Late-Layer Fusion is Enough](https://arxiv.org/abs/2606.09131)): image tokens leave the decoder after {split} of its
{depth} layers for a side branch of {side}, and text reads its output under the routing `{routing}`{layers}.

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

from dpvr import DpvrConfig  # importing it registers the method with PEFT

base = AutoModelForImageTextToText.from_pretrained("{base}")
processor = AutoProcessor.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{name}")
```

## Training

{training}

## Scores

{scores}

## Limits

This adapter has the limits of its base and of the data it was trained on. Logits at image tokens mean nothing under
its routing. What is not listed under Scores was not measured.

{mark}
"""
UNWRITTEN = "[More Information Needed]"  # in the card that PEFT saves beside an adapter
SIDE_BRANCH_ONLY = """\
A side branch for [{base}](https://huggingface.co/{base}), which is loaded from its own repository. `adapter/` holds
the same side branch for PEFT."""
ALL_WEIGHTS = "A LLaVA with all its weights."
ROUTED = """\
Image tokens leave the decoder after {split} of its {depth} layers for a side branch of {side}, and text attends to
its output as the layer plan `{plan}` says (`o` image and text together, `.` text alone, `c` and `r` text attends to
the side branch)."""
NOT_ROUTED = "Its routing is `{routing}`: the side branch is not used."
MARK = "<!-- made by hub_dpvr.py; remove this line from a card that you edit, and the next push keeps the card -->"
OUR_CARD = re.compile(r"<!-- made by (hub|sharing)_dpvr\.py;")  # cards on the Hub may bear the file's former name


SHARE_ALL = "share all weights with model.push_to_hub(..., side_branch_only=False)"
NAME_BASE = f"put its id into base_model_name_or_path of {ADAPTER_CONFIG_NAME}"


class Sharing:
    """Adds `push_to_hub` to a model; a mixin that stands before the stock class."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        side_branch_only: bool = True,
        processor: ProcessorMixin | None = None,
        record: dict[str, Any] | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Push the model to the Hub in one commit, for `from_pretrained(..., trust_remote_code=True)`.

        Args:
            repo_id: such as "me/x"; created if it does not exist.
            side_branch_only: push the side branch without the base's weights; the config then names the base.
            processor: pushed with the model; None: the base's.
            record: the content of a run's `training.json`, for the card; None: the card says that there is none.
            private: whether a new repository is private; None: the default of the account.
            token: None: the token of `hf auth login`.
            commit_message: None: a default message.

        Returns:
            The URL of the commit.

        Raises:
            ValueError: if the base is a local folder, which others cannot load, or not known.
            OSError: if the push failed; the repository is then as it was before.
        """
        with tempfile.TemporaryDirectory() as folder:
            if side_branch_only:
                require_hub_base(self.side_branch_base(folder))
                save_adapter(self, os.path.join(folder, ADAPTER_FOLDER))
            (processor or self._base_processor(token)).save_pretrained(folder)
            self.save_pretrained(folder, side_branch_only=side_branch_only)
            if record is not None:
                Path(folder, RECORD_NAME).write_text(json.dumps(record, indent=2), encoding="utf-8")
            return upload(folder, repo_id, private=private, token=token, commit_message=commit_message)

    def _base_processor(self, token: str | bool | None) -> ProcessorMixin:
        base = self.config.base_model_name_or_path or self.config._name_or_path
        if not base:
            raise ValueError(
                "This model does not know its base, whose processor would be pushed with it: pass processor=..."
            )
        try:
            return load_processor(base, token=token)
        except HUB_ERRORS as error:
            raise OSError(
                f"The processor of the base {base!r}, which is pushed with the model, cannot be loaded "
                f"({_in_one_line(error)}): pass processor=..., or check the network and HF_HUB_OFFLINE."
            ) from None


def save_adapter(model: Any, folder: str | os.PathLike) -> None:
    """Save the side branch of a DPVR model as a PEFT adapter, for the DPVR model or its base, a stock LLaVA.

    An adapter has one routing, so it holds what the model's routing runs: the latent, or the side layers.

    Raises:
        ValueError: as `SideBranchLoading.side_branch_base`.
    """
    base = model.side_branch_base(folder)
    config = {
        "peft_type": "DPVR",
        "task_type": None,
        "auto_mapping": {  # for PEFT's Auto classes
            "base_model_class": "LlavaForConditionalGeneration",
            "parent_library": "transformers.models.llava.modeling_llava",
        },
        "inference_mode": True,
        "base_model_name_or_path": base,
        "num_hidden_layers": model.config.text_config.num_hidden_layers,
        **fields_that_run(model.config.dpvr_fields()),
    }
    runs, weights = model.config.routing == "latent", model.state_dict()
    weights = {n: w.contiguous() for n, w in weights.items() if is_side_branch(n) and (LATENT in n) == runs}
    os.makedirs(folder, exist_ok=True)
    Path(folder, ADAPTER_CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    save_file(
        {ADAPTER_KEY_PREFIX + name: weight for name, weight in weights.items()},
        os.path.join(folder, ADAPTER_WEIGHTS_NAME),
        metadata={"format": "pt"},
    )


def require_hub_base(base: str, remedy: str = SHARE_ALL) -> None:
    """Raise ValueError unless `base` is a Hub id: others cannot load a base from a local path."""
    try:
        validate_repo_id(base)
        local = os.path.isdir(base)
    except HFValidationError:
        local = True
    if local:
        raise ValueError(
            f"The base of this side branch is the local folder {base!r}, which others cannot load: push the base to "
            f"the Hub and load it by its id, or {remedy}."
        )


def make_repository(
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    space_sdk: str | None = None,
) -> str:
    """Create a repository on the Hub unless it exists, and return its full id; with `space_sdk` it is a Space.

    Raises:
        OSError: if the Hub cannot be reached or the token may not write there. For a repository that exists the right
            to write is checked with huggingface_hub 2 or newer.
    """
    api = HfApi(token=token)
    kind = {"repo_type": "space" if space_sdk else "model"}
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True, space_sdk=space_sdk, **kind).repo_id
        if "write" in inspect.signature(api.auth_check).parameters:
            api.auth_check(repo_id, write=True, **kind)
    except HUB_ERRORS as error:
        raise OSError(
            f"The Hub does not let you write to {repo_id!r} ({_in_one_line(error)}): run hf auth login with a token "
            "that may write, and give a name of the form me/x. If the Hub was not reached, check the network and "
            "HF_HUB_OFFLINE."
        ) from None  # the client's own traceback has some seventy lines
    return repo_id


def upload_space(
    repo_id: str, files: dict[str, bytes], *, private: bool | None = None, token: str | bool | None = None
) -> str:
    """Commit files, by their names, to a Gradio Space, which is created unless it exists; return the commit's URL.

    Raises:
        OSError: if the push failed; the Space is then as it was before.
    """
    repo_id = make_repository(repo_id, private=private, token=token, space_sdk="gradio")
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    try:
        commit = HfApi(token=token).create_commit(
            repo_id, operations, commit_message="Upload the DPVR chat", repo_type="space"
        )
    except HUB_ERRORS as error:
        raise OSError(
            f"The push to the Space {repo_id!r} failed ({_in_one_line(error)}). It was not changed: push again."
        ) from None
    return commit.commit_url


def upload(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
) -> str:
    """Commit a saved model to the Hub: the files at the top of its folder and those in `adapter/`.

    A card is added, unless somebody wrote one, in the folder or in the repository. Weights that are in the repository
    and no longer in the folder are deleted in the same commit.

    Returns:
        The URL of the commit.

    Raises:
        ValueError: if the folder holds no model and no adapter of this method, or one whose base is a local folder.
        OSError: if the push failed; the repository is then as it was before.
    """
    make_card = _card_of(Path(folder))
    repo_id = make_repository(repo_id, private=private, token=token)
    api, files = HfApi(token=token), files_to_share(Path(folder))
    try:
        present = set(api.list_repo_files(repo_id))
        if CARD_NAME in files and UNWRITTEN in files[CARD_NAME].read_text(encoding="utf-8"):
            del files[CARD_NAME]
        operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        if CARD_NAME not in files and (CARD_NAME not in present or _may_replace_card(api, repo_id)):
            operations.append(CommitOperationAdd(CARD_NAME, str(make_card(repo_id)).encode()))
        operations += [CommitOperationDelete(name) for name in sorted(present - set(files)) if _is_replaced(name)]
        message = commit_message or "Upload DPVR model"
        return api.create_commit(repo_id, operations, commit_message=message).commit_url
    except HUB_ERRORS as error:
        raise OSError(
            f"The push of {str(folder)!r} to {repo_id!r} failed ({_in_one_line(error)}). The repository was not "
            f"changed. Push again; for the output_dir of a run: python -m dpvr.push <output_dir> {repo_id}"
        ) from None


def _card_of(folder: Path) -> Callable[[str], ModelCard]:
    """What makes the card of a saved model or adapter, from the name of its repository.

    Raises:
        ValueError: as `upload`.
    """
    record = folder / RECORD_NAME
    record = json.loads(record.read_text(encoding="utf-8")) if record.exists() else None
    if (folder / CONFIG_NAME).is_file():
        config = DpvrLlavaConfig.from_pretrained(folder)
        if config.base_model_name_or_path is not None:
            require_hub_base(config.base_model_name_or_path)
        return lambda name: model_card(name, config, record)
    if not (folder / ADAPTER_CONFIG_NAME).is_file():
        raise ValueError(
            f"There is no {CONFIG_NAME} and no {ADAPTER_CONFIG_NAME} in {str(folder)!r}: give the output_dir of "
            "train_sft.py, or a folder that save_pretrained wrote."
        )
    fields = json.loads((folder / ADAPTER_CONFIG_NAME).read_text(encoding="utf-8"))
    kind, base = fields.get("peft_type"), fields.get("base_model_name_or_path")
    if kind != "DPVR" or not (folder / ADAPTER_WEIGHTS_NAME).is_file():
        raise ValueError(
            f"{str(folder)!r} holds an adapter of type {kind!r}, and one of type 'DPVR' with {ADAPTER_WEIGHTS_NAME} "
            "is needed: push others with the push_to_hub of their PeftModel."
        )
    if not base:
        raise ValueError(f"The adapter in {str(folder)!r} does not name its base, which others need: {NAME_BASE}.")
    require_hub_base(base, NAME_BASE)
    return lambda name: adapter_card(name, fields, record)


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def files_to_share(folder: Path) -> dict[str, Path]:
    """Return the files to push by their names in the repository: the model's, without checkpoints and logs."""
    top = [path for path in folder.iterdir() if path.suffix in SUFFIXES or path.name == CARD_NAME]
    inside = (folder / ADAPTER_FOLDER).glob("*")
    return {path.relative_to(folder).as_posix(): path for path in sorted([*top, *inside]) if path.is_file()}


def _may_replace_card(api: HfApi, repo_id: str) -> bool:
    card = Path(api.hf_hub_download(repo_id, CARD_NAME)).read_text(encoding="utf-8")
    return not card or OUR_CARD.search(card) is not None


def _is_replaced(name: str) -> bool:
    return name.startswith(f"{ADAPTER_FOLDER}/") or ("/" not in name and name.endswith(WEIGHTS_SUFFIXES))


def model_card(repo_id: str, config: DpvrLlavaConfig, record: dict[str, Any] | None) -> ModelCard:
    """Return the card of a model: what it is, how it was trained and its scores, as far as the record says."""
    base, plan = config.base_model_name_or_path, config.layer_plan()
    metadata = ModelCardData(
        base_model=base,
        base_model_relation="adapter" if base else None,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        datasets=[record["data"]["name"]] if record and record["data"]["on_the_hub"] else None,
        tags=["dpvr", "llava", "custom_code", *(["late-fusion"] if plan.reads_side_branch else [])],
    )
    depth, side = config.text_config.num_hidden_layers, config.num_side_layers
    routed = ROUTED.format(split=config.split_layer, depth=depth, side=side, plan=plan)
    text = CARD.format(
        name=repo_id,
        holds=SIDE_BRANCH_ONLY.format(base=base) if base else ALL_WEIGHTS,
        plan=routed if plan.reads_side_branch else NOT_ROUTED.format(routing=config.routing),
        training=_training(record) if record else "There is no record of the training.",
        scores=_scores(record["accuracy"]) if record and record["accuracy"] else "Not measured.",
        limits="Logits at image tokens mean nothing under its routing. " if plan.reads_side_branch else "",
        mark=MARK,
    )
    return ModelCard(f"---\n{metadata}\n---\n\n{text}")


def adapter_card(repo_id: str, fields: dict[str, Any], record: dict[str, Any] | None) -> ModelCard:
    """Return the card of a PEFT adapter.

    Args:
        fields: the content of its adapter_config.json.
        record: as `model_card`.
    """
    base, layers = fields["base_model_name_or_path"], fields.get("fusion_layers")
    metadata = ModelCardData(
        base_model=base,
        base_model_relation="adapter",
        library_name="peft",
        pipeline_tag="image-text-to-text",
        datasets=[record["data"]["name"]] if record and record["data"]["on_the_hub"] else None,
        tags=["dpvr", "late-fusion"],
    )
    text = ADAPTER_CARD.format(
        name=repo_id,
        base=base,
        split=fields["split_layer"],
        depth=fields["num_hidden_layers"],
        side=fields["num_side_layers"],
        routing=fields["routing"],
        layers=f" in the layers {', '.join(map(str, layers))}, counted from 0" if layers else "",
        training=_training(record) if record else "There is no record of the training.",
        scores=_scores(record["accuracy"]) if record and record["accuracy"] else "Not measured.",
        mark=MARK,
    )
    return ModelCard(f"---\n{metadata}\n---\n\n{text}")


def _training(record: dict[str, Any]) -> str:
    data, versions, losses = record["data"], record["versions"], [e["loss"] for e in record["log"] if "loss" in e]
    rows = {
        "Command": f"`{record['command']}`",
        "Base": f"{record['base']['name']}, {record['base']['dtype']}",
        "Data": f"{data['name']}, fingerprint `{data['fingerprint']}`, {len(data['bad_rows'])} bad rows left out",
        "Recipe": ", ".join(f"{name} {value}" for name, value in record["recipe"].items()),
        "Trained parameters": f"{record['trainable_parameters']:,}",
        "Loss": f"{losses[0]:.3f} at the first logged step, {losses[-1]:.3f} at the last" if losses else "not logged",
        "Time": f"{record['train_seconds']:.0f} s on {record['hardware']}",
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _scores(accuracy: list[dict[str, Any]]) -> str:
    tasks = list(accuracy[0]["tasks"])
    lines = ["MiniBench, validation split:", "", f"| | {' | '.join(tasks)} | mean | items |"]
    lines.append("|---" * (len(tasks) + 3) + "|")
    for row in accuracy:
        scores = " | ".join(f"{row['tasks'][task]:.1%}" for task in tasks)
        lines.append(f"| {row['name']} | {scores} | {row['mean']:.1%} | {row['n']} |")
    return "\n".join(lines)
