"""Sharing a side branch on the Hub: a card made from the run's own records, and all files in one commit.

    save_pretrained(side_branch_only=True)    side branch, config, code
    the base's processor                      tokenizer, image processor, chat template
    save_adapter                              adapter/: the same side branch for PEFT
    training.json, if a run wrote one         recipe, data, versions, loss curve, scores
        |
      upload         a card from config.json and training.json; one commit, so that nothing is ever half there
        |
    me/x             from_pretrained("me/x", trust_remote_code=True); the base comes from its own repository

A push that failed is made good by the same again, or by hand:

    python -m dpvr.push outputs/my-branch me/x
"""

import argparse
import inspect
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import save_file
from transformers import AutoConfig, AutoProcessor, ProcessorMixin

try:
    from .configuration_dpvr import DPVR_FIELDS, DpvrLlavaConfig
    from .loading_dpvr import is_side_branch
except ImportError:
    from configuration_dpvr import DPVR_FIELDS, DpvrLlavaConfig
    from loading_dpvr import is_side_branch

try:
    from httpx import TransportError
except ImportError:  # huggingface_hub 0.36 has no need of it: its errors are OSErrors
    TransportError = OSError

CONFIG_NAME, RECORD_NAME, CARD_NAME = "config.json", "training.json", "README.md"
ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, ADAPTER_KEY_PREFIX = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "base_model.model.",
)
SUFFIXES = (".py", ".json", ".jinja", ".model", ".txt", ".safetensors")
WEIGHTS_SUFFIXES = (".safetensors", ".index.json")
ADAPTER_FOLDER = "adapter"
HUB_ERRORS = (OSError, RuntimeError, HFValidationError, TransportError)

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

The base's limits are this model's, and so are the limits of the data it was trained on. {limits}What is not listed
under Scores was not measured.

{mark}
"""
SIDE_BRANCH_ONLY = """\
A side branch for [{base}](https://huggingface.co/{base}), which is loaded from its own repository. `adapter/` holds
the same side branch for PEFT."""
ALL_WEIGHTS = "A LLaVA with all its weights."
ROUTED = """\
Image tokens leave the decoder after {split} of its {depth} layers for a side branch of {side}, and the text meets
them again as the plan `{plan}` says (`o` image and text together, `.` text alone, `c` and `r` text reads the side
branch)."""
NOT_ROUTED = "Its routing is `{routing}`: the side branch is not read."
MARK = "<!-- made by hub_dpvr.py; leave this line out of a card of your own, and it is kept -->"


class Sharing:
    """Adds `push_to_hub`; mixed in before the stock model."""

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
        """Put the model on the Hub, in one commit, so that `from_pretrained(..., trust_remote_code=True)` loads it.

        Args:
            repo_id: "me/x"; made if it is not there.
            side_branch_only: the side branch, and the name of its base in the config; False: all weights.
            processor: what comes along; None: the base's.
            record: what `training.json` of a run holds, for the card; None: the card says that there is none.
            private: whether a new repository is; None: as the account's settings say.
            token: None: the one of `hf auth login`.
            commit_message: None: one of ours.

        Returns:
            the address of the commit.

        Raises:
            ValueError: if the base lies in a local folder, where others cannot load it from, or is not known.
            OSError: if the push failed; the Hub is as it was before.
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
        """The base's, without being asked whether the code beside it may run: a processor needs none."""
        base = self.config.base_model_name_or_path or self.config._name_or_path
        if not base:
            raise ValueError(
                "Expected processor=..., as this model does not know where its base came from; got None. Remedy: pass "
                "the processor that it is used with."
            )
        AutoConfig.register(DpvrLlavaConfig.model_type, DpvrLlavaConfig, exist_ok=True)
        return AutoProcessor.from_pretrained(base, token=token)


def save_adapter(model: Any, folder: str | os.PathLike) -> None:
    """Write the side branch of a DPVR model as a PEFT adapter, which also fits the stock LLaVA that it stands on.

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
        **{name: vars(model.config)[name] for name in DPVR_FIELDS if name != "base_model_name_or_path"},
    }
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items() if is_side_branch(name)}
    os.makedirs(folder, exist_ok=True)
    Path(folder, ADAPTER_CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    save_file(
        {ADAPTER_KEY_PREFIX + name: weight for name, weight in weights.items()},
        os.path.join(folder, ADAPTER_WEIGHTS_NAME),
        metadata={"format": "pt"},
    )


def require_hub_base(base: str) -> None:
    """Raise ValueError unless a base has a name on the Hub; shared with a path, a side branch is of no use."""
    try:
        validate_repo_id(base)
        local = os.path.isdir(base)
    except HFValidationError:
        local = True
    if local:
        raise ValueError(
            f"Expected a base with a name on the Hub, from where others load it beside the side branch; got the local "
            f"folder {base!r}. Remedy: put the base on the Hub and load it by its id, or share all weights: "
            "model.push_to_hub(..., side_branch_only=False)."
        )


def make_repository(repo_id: str, *, private: bool | None = None, token: str | bool | None = None) -> str:
    """Return the full id of a repository on the Hub, made if it is not there yet.

    Raises:
        OSError: if the Hub cannot be reached or does not let us write there. That of a repository that is there
            already huggingface_hub finds out from version 2 on.
    """
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if "write" in inspect.signature(api.auth_check).parameters:
            api.auth_check(repo_id, write=True)
    except HUB_ERRORS as error:
        raise OSError(
            f"Expected a repository {repo_id!r} on the Hub that we may write to; got: {error}. Remedy: hf auth login "
            "with a token that may write, and a name of the form me/x."
        ) from error
    return repo_id


def upload(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
) -> str:
    """Commit a saved model to the Hub: the files at the top of its folder and those in `adapter/`.

    With them goes a card, unless the folder or the repository has one that is not of our making. Weights that the
    folder no longer has go from the repository in the same commit.

    Returns:
        the address of the commit.

    Raises:
        ValueError: if the folder holds no model, or one whose base is a local folder.
        OSError: if the push failed; the repository is as it was before.
    """
    if not Path(folder, CONFIG_NAME).is_file():
        raise ValueError(
            f"Expected a folder with {CONFIG_NAME}, as save_pretrained and train_sft.py write it; got "
            f"{str(folder)!r}. Remedy: name the output_dir of a run."
        )
    config = DpvrLlavaConfig.from_pretrained(folder)
    if config.base_model_name_or_path is not None:
        require_hub_base(config.base_model_name_or_path)
    repo_id = make_repository(repo_id, private=private, token=token)
    api, files = HfApi(token=token), files_to_share(Path(folder))
    try:
        present = set(api.list_repo_files(repo_id))
        card = present & {CARD_NAME} and Path(api.hf_hub_download(repo_id, CARD_NAME)).read_text(encoding="utf-8")
        operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        if CARD_NAME not in files and (not card or MARK in card):
            record = Path(folder, RECORD_NAME)
            record = json.loads(record.read_text(encoding="utf-8")) if record.exists() else None
            operations.append(CommitOperationAdd(CARD_NAME, str(model_card(repo_id, config, record)).encode()))
        operations += [CommitOperationDelete(name) for name in sorted(present - set(files)) if _is_replaced(name)]
        message = commit_message or "Upload DPVR model"
        return api.create_commit(repo_id, operations, commit_message=message).commit_url
    except HUB_ERRORS as error:
        raise OSError(
            f"Expected to push {str(folder)!r} to {repo_id!r}; got: {error}. Nothing was changed there. Remedy: push "
            f"again; the output_dir of a run with: python -m dpvr.push <output_dir> {repo_id}"
        ) from error


def files_to_share(folder: Path) -> dict[str, Path]:
    """Return the files of a saved model by their names in the repository; checkpoints and logs stay behind."""
    top = [path for path in folder.iterdir() if path.suffix in SUFFIXES or path.name == CARD_NAME]
    inside = (folder / ADAPTER_FOLDER).glob("*")
    return {path.relative_to(folder).as_posix(): path for path in sorted([*top, *inside]) if path.is_file()}


def _is_replaced(name: str) -> bool:
    return name.startswith(f"{ADAPTER_FOLDER}/") or ("/" not in name and name.endswith(WEIGHTS_SUFFIXES))


def model_card(repo_id: str, config: DpvrLlavaConfig, record: dict[str, Any] | None) -> ModelCard:
    """Return the card of a model: what it is, how it was made as far as that was recorded, and how well it does."""
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
        training=_training(record) if record else "No record of the training lies here.",
        scores=_scores(record["accuracy"]) if record and record["accuracy"] else "Not measured.",
        limits="Image tokens predict nothing past the split: they are context. " if plan.reads_side_branch else "",
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


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Put the folder of a saved model on the Hub.")
    parser.add_argument("folder", help="the output_dir of train_sft.py, or what save_pretrained wrote")
    parser.add_argument("repo_id", help="me/x")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    print(upload(args.folder, args.repo_id, private=args.private))


if __name__ == "__main__":
    main(parse_args())
