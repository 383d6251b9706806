"""Sharing a side branch on the Hub: a card made from the run's own records, and all files in one commit.

    save_pretrained(side_branch_only=True)    side branch, config, code
    the base's processor                      tokenizer, image processor, chat template
    save_adapter                              adapter/: the same side branch for PEFT
    training.json, if a run wrote one         recipe, data, versions, loss curve, scores
        |
      upload         README.md from config.json and training.json; one commit, so that nothing is ever half there
        |
    me/x             from_pretrained("me/x", trust_remote_code=True); the base comes from its own repository

A push that failed is made good by the same again, or by hand:

    python sharing_dpvr.py outputs/my-branch me/x
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from safetensors.torch import save_file
from transformers import AutoConfig, AutoProcessor, ProcessorMixin

try:
    from .configuration_dpvr import DPVR_FIELDS, DpvrLlavaConfig
    from .loading_dpvr import is_side_branch
except ImportError:
    from configuration_dpvr import DPVR_FIELDS, DpvrLlavaConfig
    from loading_dpvr import is_side_branch

CONFIG_NAME, RECORD_NAME, CARD_NAME = "config.json", "training.json", "README.md"
ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, ADAPTER_KEY_PREFIX = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "base_model.model.",
)
FILES = ("*.py", "*.json", "*.jinja", "*.model", "*.txt", "*.safetensors", CARD_NAME, "adapter/*")
RUNS_OWN = ("checkpoint-*/*", "runs/*", "trackio/*", ".*", ".*/*")
REPLACED = ("*.safetensors", "*.index.json", "adapter/*")

SIDE_BRANCH_ONLY = """\
A side branch for [{base}](https://huggingface.co/{base}), which is loaded from its own repository. `adapter/` holds
the same side branch for PEFT."""
ALL_WEIGHTS = "A LLaVA with its side branch: all weights."

CARD = """\
# {name}

{holds}

DPVR is late-layer fusion for LLaVA ([Late-Layer Fusion is Enough](https://arxiv.org/abs/2606.09131)). Here, image
tokens leave the decoder after {split} of its {depth} layers for a side branch of {side}, and the text meets them again
as the plan `{plan}` says (`o` image and text together, `.` text alone, `c` and `r` text reads the side branch).

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

The base's limits are this model's, and so are the limits of the data it was trained on. Image tokens predict nothing
past the split: they are context. What is not listed under Scores was not measured.
"""


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
        revision: str | None = None,
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
            revision: the branch to commit to; None: main.
            commit_message: None: one that names the model.

        Returns:
            the address of the commit.

        Raises:
            ValueError: if the base lies in a local folder, where others cannot load it from.
            OSError: if the push failed; the Hub is as it was before.
        """
        with tempfile.TemporaryDirectory() as folder:
            if side_branch_only:
                require_hub_base(self.side_branch_base(folder))
                save_adapter(self, os.path.join(folder, "adapter"))
            self.save_pretrained(folder, side_branch_only=side_branch_only)
            (processor or _processor_of(self.side_branch_base(folder), token)).save_pretrained(folder)
            if record is not None:
                Path(folder, RECORD_NAME).write_text(json.dumps(record, indent=2), encoding="utf-8")
            where = {"private": private, "token": token, "revision": revision, "commit_message": commit_message}
            return upload(folder, repo_id, **where)


def _processor_of(base: str, token: str | bool | None) -> ProcessorMixin:
    """The base's processor, without being asked whether the code beside it may run: a processor needs none."""
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
    """Raise ValueError if a base is a local folder: a side branch shared with its path is of no use to others."""
    if os.path.isdir(base):
        raise ValueError(
            f"Expected a base with a name on the Hub, from where others load it beside the side branch; got the local "
            f"folder {base!r}. Remedy: put the base on the Hub and load it by its id, or share all weights: "
            "model.push_to_hub(..., side_branch_only=False)."
        )


def make_repository(repo_id: str, *, private: bool | None = None, token: str | bool | None = None) -> str:
    """Return the full id of a repository on the Hub, made if it is not there yet.

    Raises:
        OSError: if the Hub cannot be reached or does not let us.
    """
    try:
        return HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id
    except Exception as error:  # requests' errors or httpx's, by the version of huggingface_hub
        raise OSError(
            f"Expected a repository {repo_id!r} on the Hub that we may write to; got: {error}. Remedy: hf auth login "
            "with a token that may write, and a name of the form me/x."
        ) from error


def upload(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Commit a saved model to the Hub, with a card if it has none; checkpoints and logs stay behind.

    Weights that the folder no longer has go from the repository in the same commit.

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
    if not Path(folder, CARD_NAME).exists():
        record = Path(folder, RECORD_NAME)
        record = json.loads(record.read_text(encoding="utf-8")) if record.exists() else None
        model_card(repo_id, config, record).save(Path(folder, CARD_NAME))
    try:
        commit = HfApi(token=token).upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message or "Upload DPVR side branch",
            allow_patterns=list(FILES),
            ignore_patterns=list(RUNS_OWN),
            delete_patterns=list(REPLACED),
        )
    except Exception as error:  # requests' errors or httpx's, by the version of huggingface_hub
        raise OSError(
            f"Expected to push {str(folder)!r} to {repo_id!r}; got: {error}. Nothing was changed there. Remedy: the "
            f"same call again, or for a folder: python sharing_dpvr.py {folder} {repo_id}"
        ) from error
    return commit.commit_url


def model_card(repo_id: str, config: DpvrLlavaConfig, record: dict[str, Any] | None) -> ModelCard:
    """Return the card of a model: what it is, how it was made as far as that was recorded, and how well it does."""
    base = config.base_model_name_or_path
    data = record["data"]["name"] if record else None
    metadata = ModelCardData(
        base_model=base,
        base_model_relation="adapter" if base else None,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        datasets=[data] if data and data.count("/") == 1 and not Path(data).exists() else None,
        tags=["dpvr", "llava", "late-fusion", "custom_code"],
    )
    text = CARD.format(
        name=repo_id,
        holds=SIDE_BRANCH_ONLY.format(base=base) if base else ALL_WEIGHTS,
        split=config.split_layer,
        depth=config.text_config.num_hidden_layers,
        side=config.num_side_layers,
        plan=config.layer_plan(),
        training=_training(record) if record else "No record of the training lies here.",
        scores=_scores(record["accuracy"]) if record and record["accuracy"] else "Not measured.",
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Put the folder of a saved side branch on the Hub.")
    parser.add_argument("folder", help="the output_dir of train_sft.py, or what save_pretrained wrote")
    parser.add_argument("repo_id", help="me/x")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    arguments = parser.parse_args()
    print(upload(arguments.folder, arguments.repo_id, private=arguments.private))
