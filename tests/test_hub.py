"""hub_dpvr.py, dpvr/push.py and train_sft.py --push_to_hub: to a Hub on loopback and back, with the real client."""

import json
import sys
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import make_llava
from families import PRESENT, make, make_prompts
from forked_python import ForkedPython
from hub_server import TOKEN, Hub
from lines import NEEDS_TRAINING
from test_loading import SIDE_BRANCH_KEYS

import hub_dpvr
import train_sft
from configuration_dpvr import DpvrLlavaConfig
from dpvr.command_line import run
from dpvr.push import main as push_folder
from dpvr.push import parse_args as parse_push_args
from dpvr.record import run_record
from modeling_dpvr import DpvrLlavaForConditionalGeneration
from processors_dpvr import load_processor

ROOT = Path(__file__).resolve().parent.parent
CODE = {path.name for path in ROOT.glob("*_dpvr.py")} - {path.name for path in ROOT.glob("adapter_*.py")}
ADAPTER = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
PROCESSOR = {"tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"}
MODEL = {"config.json", "generation_config.json", "model.safetensors", "README.md"}

PREPARE = """
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from modeling_dpvr import DpvrLlavaForConditionalGeneration
from processors_dpvr import load_processor


def logits(model):
    marks = torch.full((1, 64), model.config.image_token_id)
    ids = torch.cat((torch.tensor([[1, 300]]), marks, torch.tensor([[301, 302]])), 1)
    with torch.no_grad():
        return model.eval()(input_ids=ids, pixel_values=torch.ones(1, 3, 96, 96)).logits[:, -2:]
"""
PUSH = f"""{PREPARE}
model = DpvrLlavaForConditionalGeneration.from_pretrained("me/base", split_layer=1)
torch.manual_seed(0)
for weight in model.side_branch.parameters():
    weight.data.add_(0.1 * torch.randn_like(weight))
try:
    print(model.push_to_hub("me/x", private=True))
finally:
    torch.save(logits(model), sys.argv[1])
"""
LOAD = f"""{PREPARE}
model = AutoModelForImageTextToText.from_pretrained("me/x", trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules")
expected = torch.load(sys.argv[1])
assert torch.equal(logits(model), expected)
processor = AutoProcessor.from_pretrained("me/x", trust_remote_code=True)
assert processor.tokenizer("Is there a red star?")["input_ids"][0] == processor.tokenizer.bos_token_id

import adapter_dpvr

stock = AutoModelForImageTextToText.from_pretrained("me/base", trust_remote_code=True)
stock.set_routing("none")
vanilla = logits(stock)
adapted = PeftModel.from_pretrained(stock, "me/x", subfolder="adapter")
assert torch.allclose(logits(adapted), expected, atol=1e-5) and not torch.allclose(vanilla, expected, atol=1e-3)
"""
PUSH_ADAPTER = """
import torch
from peft import get_peft_model
from transformers import AutoModelForImageTextToText

from dpvr import DpvrConfig

base = AutoModelForImageTextToText.from_pretrained("me/stock")
model = get_peft_model(base, DpvrConfig(split_layer=3, fusion_layers=[3, 5])).eval()
for weight in model.parameters():
    if weight.requires_grad:
        weight.data.add_(0.1 * torch.randn_like(weight))
model.save_pretrained("side")
with torch.no_grad():
    torch.save(model(**torch.load("inputs.pt")).logits, "logits.pt")
"""
LOAD_ADAPTER = """
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from dpvr import DpvrConfig

base = AutoModelForImageTextToText.from_pretrained("me/stock")
model = PeftModel.from_pretrained(base, "me/side")
inputs = torch.load("inputs.pt")
with torch.no_grad():
    assert torch.equal(model.eval()(**inputs).logits, torch.load("logits.pt"))
    with model.disable_adapter():
        assert not torch.allclose(model(**inputs).logits, torch.load("logits.pt"), atol=1e-3)
"""
NOT_CHANGED = "The repository was not changed. Push again"
PUSH_COMMAND = str(ROOT / "dpvr" / "push.py")


@pytest.fixture(scope="module")
def loopback():
    """The Hub of this module, which `hub` empties for each test."""
    server = Hub()
    yield server
    server.close()


@pytest.fixture(scope="module")
def python(loopback, tmp_path_factory):
    """A Python whose Hub this is."""
    folder = tmp_path_factory.mktemp("client")
    python = ForkedPython(
        {
            "HF_ENDPOINT": loopback.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(folder / "hub"),
            "NO_PROXY": "127.0.0.1",
        },
        folder,
    )
    yield python
    python.close()


@pytest.fixture
def hub(loopback, random_mini):
    """A Hub that holds the random dpvr-mini as "me/base"."""
    loopback.clear()
    loopback.add("me/base", random_mini)
    return loopback


@pytest.fixture
def client(python, hub, tmp_path):
    """Runs a Python program whose Hub this is, in the test's own folder."""
    return partial(python.run, cwd=tmp_path)


def card_of(hub: Hub, repo_id: str) -> str:
    return hub.files(repo_id)["README.md"].decode()


def test_a_model_goes_to_the_hub_in_one_commit_and_comes_back_with_its_base(hub, client, tmp_path):
    expected = str(tmp_path / "logits.pt")
    hub.broken = {"/lfs/"}
    failed = client("-c", PUSH, expected)
    assert failed.returncode != 0 and "storage is full" in failed.stderr and NOT_CHANGED in failed.stderr
    assert hub.commits["me/x"] == []
    hub.broken = set()
    pushed = client("-c", PUSH, expected)
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.splitlines()[-1] == f"{hub.url}/me/x/commit/{hub.revision('me/x')}"
    (files,) = hub.commits["me/x"]
    assert hub.private == {"me/x"} and set(files) >= CODE | ADAPTER | PROCESSOR | MODEL
    assert len(files["model.safetensors"]) < len(hub.files("me/base")["model.safetensors"]) / 2
    assert json.loads(files["config.json"])["base_model_name_or_path"] == "me/base"
    assert "base_model: me/base" in files["README.md"].decode()
    loaded = client("-c", LOAD, expected)
    assert loaded.returncode == 0, loaded.stderr


@pytest.mark.parametrize("name", [name for name in ("internvl", "qwen3_vl") if name in PRESENT])
def test_an_adapter_on_any_family_goes_to_the_hub_with_its_card_and_loads_on_the_stock_model(
    name, hub, client, tmp_path
):
    stock = make(name, torch.float32)
    stock.save_pretrained(tmp_path / "stock")
    hub.add("me/stock", tmp_path / "stock")
    torch.save(make_prompts(name, stock, [[3, 4]])[0], tmp_path / "inputs.pt")
    made = client("-c", PUSH_ADAPTER)
    assert made.returncode == 0, made.stderr
    assert "[More Information Needed]" in (tmp_path / "side" / "README.md").read_text()  # PEFT's, which says nothing
    pushed = client(PUSH_COMMAND, "side", "me/side")
    assert pushed.returncode == 0, pushed.stderr
    assert set(hub.files("me/side")) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    card = huggingface_hub.ModelCard(card_of(hub, "me/side"))
    assert (card.data.base_model, card.data.library_name) == ("me/stock", "peft") and "dpvr" in card.data.tags
    assert "after 3 of its\n6 layers" in card.text and "in the layers 3, 5, counted from 0" in card.text
    loaded = client("-c", LOAD_ADAPTER)
    assert loaded.returncode == 0, loaded.stderr
    (tmp_path / "side" / "README.md").write_text(mine := "---\nbase_model: me/stock\n---\nmine")
    assert client(PUSH_COMMAND, "side", "me/side").returncode == 0 and card_of(hub, "me/side") == mine


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "LORA"}, "holds an adapter of type 'LORA', and one of type 'DPVR' with adapter_model"),
        ({"base_model_name_or_path": None}, "does not name its base, .* put its id into base_model_name_or_path of"),
        ({"base_model_name_or_path": "."}, "is the local folder '.', .* put its id into base_model_name_or_path of"),
    ],
)
def test_an_adapter_that_others_could_not_load_is_refused(fields, message, tmp_path):
    saved = {"peft_type": "DPVR", "base_model_name_or_path": "me/stock", **fields}
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=message):
        hub_dpvr.upload(tmp_path, "me/x")


def test_without_a_token_the_error_says_what_to_do(hub, client, tmp_path):
    refused = client("-c", PUSH, str(tmp_path / "logits.pt"), HF_TOKEN="hf_wrong")
    assert refused.returncode != 0 and "run hf auth login" in refused.stderr
    assert list(hub.commits) == ["me/base"]


@pytest.fixture(params=["http://127.0.0.1:1", "http://name.invalid", "ftp://127.0.0.1", "offline"])
def no_hub(request, monkeypatch):
    """A Hub that is not reached."""
    if request.param == "offline":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub_dpvr, "HfApi", partial(hub_dpvr.HfApi, endpoint=request.param))
    close_session = getattr(huggingface_hub, "close_session", None) or huggingface_hub.utils.reset_sessions
    close_session()  # a session remembers whether it is offline
    yield
    close_session()


def check_one_line(said: str) -> None:
    assert said.startswith("Error: The Hub does not let you write to 'me/x'") and said.count("\n") == 1, said
    assert "check the network and HF_HUB_OFFLINE" in said


def test_a_hub_that_is_not_reached_is_said_in_one_line(no_hub, random_mini, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(push_folder, parse_push_args([random_mini, "me/x"]))
    check_one_line(capsys.readouterr().err)


@pytest.mark.parametrize("side_branch_only", [True, False])
def test_a_model_that_is_pushed_to_no_hub_raises_one_line_without_the_clients_traceback(
    no_hub, side_branch_only, random_mini
):
    model = DpvrLlavaForConditionalGeneration.from_pretrained(random_mini)
    model.config.base_model_name_or_path = "me/base"
    with pytest.raises(OSError, match="check the network and HF_HUB_OFFLINE") as caught:
        model.push_to_hub("me/x", side_branch_only=side_branch_only, processor=load_processor(random_mini))
    assert caught.value.__suppress_context__ and "\n" not in str(caught.value)


@NEEDS_TRAINING
def test_a_run_that_is_to_be_pushed_to_no_hub_ends_in_one_line_before_it_begins(no_hub, random_mini, tmp_path, capsys):
    words = f"--model_name_or_path {random_mini} --method full --num_rows 8 --push_to_hub --hub_model_id me/x"
    arguments = train_sft.parse_args([*words.split(), "--output_dir", str(tmp_path / "out"), "--eval_questions", "0"])
    with pytest.raises(SystemExit, match="2"):
        run(train_sft.main, *arguments)
    said = capsys.readouterr().err
    assert "Traceback" not in said and not (tmp_path / "out").exists()
    check_one_line(said[said.index("Error: ") :])


@NEEDS_TRAINING
def test_a_training_run_pushes_its_folder_and_its_records_into_the_card(hub, client, tmp_path):
    command = "--model_name_or_path me/base --split_layer 2 --num_rows 8 --per_device_train_batch_size 4"
    command += " --eval_questions 2 --logging_steps 1 --save_strategy steps --save_steps 1 --output_dir out"
    command += f" --push_to_hub --hub_model_id me/y --hub_token {TOKEN}"
    hub.broken = {"/commit/"}
    failed = client(str(ROOT / "train_sft.py"), *command.split())
    assert failed.returncode != 0 and NOT_CHANGED in failed.stderr
    assert hub.commits["me/y"] == [] and (tmp_path / "out" / "model.safetensors").exists()
    hub.broken = set()
    retried = client(PUSH_COMMAND, "out", "me/y")
    assert retried.returncode == 0, retried.stderr
    assert retried.stdout.splitlines()[-1] == f"Pushed out to me/y: {hub.url}/me/y/commit/{hub.revision('me/y')}"
    (files,) = hub.commits["me/y"]
    assert set(files) >= CODE | ADAPTER | PROCESSOR | MODEL | {"training.json"}
    assert not any("checkpoint" in path or path.endswith((".bin", ".pt", ".pth")) for path in files)
    assert files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert not any(TOKEN.encode() in content for content in files.values())
    record, card = json.loads(files["training.json"]), card_of(hub, "me/y")
    assert f"`{record['command']}`" in card and f"{record['trainable_parameters']:,}" in card
    for row in record["accuracy"]:
        assert f"| {row['name']} |" in card and f"| {row['mean']:.1%} | {row['n']} |" in card
    assert 'from_pretrained("me/y", trust_remote_code=True)' in card
    program = f"{PREPARE}\nprint(AutoModelForImageTextToText.from_pretrained('me/y', trust_remote_code=True).config)"
    loaded = client("-c", program)
    assert loaded.returncode == 0 and '"split_layer": 2' in loaded.stdout, loaded.stderr


@NEEDS_TRAINING
def test_a_run_that_could_not_push_in_the_end_does_not_begin(client, random_mini, tmp_path):
    command = f"--num_rows 8 --push_to_hub --hub_model_id me/y --output_dir out --model_name_or_path {random_mini}"
    refused = client(str(ROOT / "train_sft.py"), *command.split())
    assert refused.returncode != 0 and "push the base to the Hub" in refused.stderr
    command = "--num_rows 8 --push_to_hub --hub_model_id me/y --output_dir out --model_name_or_path me/base"
    refused = client(str(ROOT / "train_sft.py"), *command.split(), HF_TOKEN="hf_wrong")
    assert refused.returncode != 0 and "run hf auth login" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_weights_that_a_later_save_no_longer_has_go_from_the_repository(hub, client, random_mini, tmp_path):
    model = DpvrLlavaForConditionalGeneration.from_pretrained(random_mini)
    model.save_pretrained(tmp_path / "out", max_shard_size="200KB")
    assert client(PUSH_COMMAND, "out", "me/x").returncode == 0
    shards = {path for path in hub.files("me/x") if path.endswith(".safetensors")}
    assert len(shards) > 1 and "model.safetensors.index.json" in hub.files("me/x")
    for path in (tmp_path / "out").glob("*.safetensors*"):
        path.unlink()
    model.save_pretrained(tmp_path / "out")
    assert client(PUSH_COMMAND, "out", "me/x").returncode == 0
    assert {path for path in hub.files("me/x") if "safetensors" in path} == {"model.safetensors"}
    assert "all its weights" in card_of(hub, "me/x") and "base_model:" not in card_of(hub, "me/x")


def test_the_push_command_makes_a_private_repository_and_ends_at_an_error_in_one_message(hub, client, random_mini):
    assert client(PUSH_COMMAND, random_mini, "me/z", "--private").returncode == 0
    assert hub.private == {"me/z"} and hub.files("me/z")
    refused = client(PUSH_COMMAND, "nowhere", "me/y")
    assert refused.returncode == 2 and refused.stderr.startswith(
        "Error: There is no config.json and no adapter_config.json in 'nowhere'"
    )
    assert "Traceback" not in refused.stderr and "me/y" not in hub.commits


def test_a_folder_without_a_model_and_one_with_a_local_base_are_refused(random_mini, tmp_path):
    with pytest.raises(
        ValueError, match="There is no config.json and no adapter_config.json in .* give the output_dir"
    ):
        hub_dpvr.upload(tmp_path, "me/x")
    model = DpvrLlavaForConditionalGeneration.from_pretrained(random_mini)
    model.save_pretrained(tmp_path, side_branch_only=True)
    for push in (lambda: hub_dpvr.upload(tmp_path, "me/x"), lambda: model.push_to_hub("me/x")):
        with pytest.raises(ValueError, match="is the local folder .* push the base to the Hub"):
            push()


@NEEDS_TRAINING
def test_a_run_does_not_begin_that_may_not_write_to_a_repository_that_is_there(hub, client, random_mini, tmp_path):
    hub.add("you/x", random_mini)
    command = "--num_rows 8 --push_to_hub --hub_model_id you/x --output_dir out --model_name_or_path me/base"
    refused = client(str(ROOT / "train_sft.py"), *command.split())
    assert refused.returncode != 0 and "run hf auth login" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_what_is_not_the_models_stays_behind_and_a_card_of_ones_own_is_kept(hub, client, random_mini, tmp_path):
    out = tmp_path / "out"
    model = DpvrLlavaForConditionalGeneration.from_pretrained(random_mini)
    model.config.base_model_name_or_path = "me/base"
    model.save_pretrained(out, side_branch_only=True)
    for name in ("checkpoint-10/model.safetensors", "checkpoint-10/optimizer.pt", "runs/events.json", "venv/a.py"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(b"x")
    for repo_id in ("me/x", "me/y"):
        assert client(PUSH_COMMAND, "out", repo_id).returncode == 0
        assert not any("/" in path for path in hub.files(repo_id))
        assert card_of(hub, repo_id).count(repo_id) == 3  # its own name in it, not that of the push before
    own = card_of(hub, "me/x")
    older = own.replace("made by hub_dpvr.py", "made by sharing_dpvr.py")
    hub.commits["me/x"].append({**hub.files("me/x"), "README.md": older.encode()})
    assert older != own and client(PUSH_COMMAND, "out", "me/x").returncode == 0
    assert card_of(hub, "me/x") == own
    hub.commits["me/x"].append({**hub.files("me/x"), "README.md": b"mine", "other/model.safetensors": b"x"})
    assert client(PUSH_COMMAND, "out", "me/x").returncode == 0
    assert card_of(hub, "me/x") == "mine" and "other/model.safetensors" in hub.files("me/x")


def test_all_weights_of_a_model_without_a_name_need_its_processor():
    model = DpvrLlavaForConditionalGeneration.from_llava(make_llava(), split_layer=2)
    with pytest.raises(ValueError, match="does not know its base.* pass processor="):
        model.push_to_hub("me/x", side_branch_only=False)


def test_records_hold_no_tokens_and_no_folders(monkeypatch):
    for token in ("--hub_token secret", "--hub-token=secret", "--hub_tok hf_abcdefghij"):
        arguments = f"{token} --data /disk/me/rows.json --image_folder=/data/images --output_dir out/x"
        monkeypatch.setattr(sys, "argv", ["train_sft.py", *arguments.split()])
        command = run_record("train_sft.py")["command"]
        assert "secret" not in command and "hf_a" not in command and "/disk" not in command
        assert command.endswith("--data .../rows.json --image_folder=.../images --output_dir out/x")


def test_a_card_says_what_the_routing_is():
    config = DpvrLlavaConfig(split_layer=2, routing="none")
    card = hub_dpvr.model_card("me/x", config, None).content
    assert "Its routing is `none`" in card and "late-fusion" not in card and "base_model" not in card


def test_a_card_without_a_record_claims_nothing():
    config = DpvrLlavaConfig(split_layer=2, base_model_name_or_path="me/base")
    card = hub_dpvr.model_card("me/x", config, None).content
    assert "There is no record of the training" in card and "Not measured." in card
    assert SIDE_BRANCH_KEYS and f"`{config.layer_plan()}`" in card
