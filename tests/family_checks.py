"""What every routing must do on every family of models; each check returns the largest difference that it saw.

    python -m tests.family_checks        runs all of them, and writes them to results/families.json under the name of
                                         the installed release of transformers

`all_joint` compares bits. The others compare logits at text tokens in float64, between the product and the naive
derivation (naive_families.py), or between two ways through the product.
"""

import argparse
import functools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn
from tqdm import tqdm
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).parent))  # as pytest does

from families import FAMILIES, IMAGE, MARKED, PRESENT, VIDEO, VISION_END, VISION_START, forget, make, make_prompts
from families import text_places as text_of
from naive_families import exact, naive_text_logits

from adapter_dpvr import DpvrConfig
from configuration_dpvr import JOINT, LayerPlan
from decoders_dpvr import decoder_of, recurrent_layers
from dpvr.command_line import Parser
from dpvr.command_line import run as run_command
from dpvr.record import publish, run_record
from forward_dpvr import routed_forward
from versions_dpvr import cache_name

RAGGED = [[3, 4], [2, 3, 4], [5]]  # one image, two images, none
EVEN = [[2, 3], [2, 3], [2, 3]]
TWO_EACH = [[3, 20, 4], [2, 19, 3], [1, 22, 5]]
NUM_NEW = 4
RECORD = Path(__file__).parent.parent / "results" / "families.json"


SCORED = {"latent_stride": 2, "latent_score": "distance"}


def plans(name: str) -> list[dict[str, Any]]:
    """Fields of adapters, one of each routing, that a family allows."""
    family = FAMILIES[name]
    split = max(family.split, family.depth // 2)
    lowest = 0 if family.split == 1 else family.split
    deep = [layer for layer in range(split, family.depth) if layer not in recurrent_layers(_text_config(name))]
    return [
        {"split_layer": split, "routing": "late_fusion"},
        {"split_layer": family.split, "routing": "kv_substitution"},
        {"split_layer": split, "routing": "persistent_context", "num_side_layers": 2},
        {"split_layer": split, "routing": "text_only"},
        {"split_layer": split, "routing": "late_fusion", "fusion_layers": deep[:1] + deep[2:]},
        {"split_layer": split, "routing": "late_fusion", "num_fusion_layers": 2},
        {"split_layer": split, "routing": "latent", "latent_rank": 8, "latent_side_layers": 1},
        {"latent_split_layer": lowest, "routing": "latent", "latent_rank": 6, "latent_stride": 3},
        {"split_layer": split, "routing": "latent", "latent_rank": 8, "latent_layers": deep[-2:], "latent_stride": 2},
        {"latent_split_layer": lowest, "routing": "latent", "latent_rank": 6, **SCORED},
    ]


@functools.cache
def _text_config(name: str):
    return make(name).config.get_text_config()


def with_adapter(name: str, *, seed: int = 5, **fields: Any) -> PeftModel:
    """A tiny model with a side branch whose weights are not those of the decoder."""
    dtype, attention = fields.pop("dtype", torch.float64), fields.pop("attention", "sdpa")
    model = get_peft_model(make(name, dtype, attention), DpvrConfig(**fields)).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "side_branch" in key:
                weight.add_(0.1 * torch.randn_like(weight))
    return model


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item() if one.numel() else 0.0


def first_plan(name: str) -> dict[str, Any]:
    """Late fusion in several layers, not all."""
    return plans(name)[4]


# -- the method -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def all_joint(name: str) -> float:
    """A plan of joint layers alone, on split and merged streams, is the stock model, bit for bit."""
    worst = 0.0
    for attention in ("sdpa", "eager"):
        model, family = make(name, torch.float32, attention), FAMILIES[name]
        plan = LayerPlan(max(family.split, 1), (JOINT,) * family.depth)
        for layout in (RAGGED, EVEN):
            inputs, _ = make_prompts(name, model, layout)
            stock = model(**inputs).logits
            forget(model)
            states = routed_forward(model.model, type(model.model).forward, nn.ModuleList(), plan, dict(inputs))
            joint = model.lm_head(states.last_hidden_state)
            stock_states = model.lm_head(model.model(**inputs).last_hidden_state)
            valid = inputs["attention_mask"].bool()
            worst = max(worst, difference(joint[valid], stock_states[valid]))
            assert stock.shape == joint.shape
    return worst


@torch.no_grad()
def routings(name: str) -> float:
    """Each routing is the naive derivation, with ragged rows, left padding, and 0 to 2 images of different sizes."""
    worst = 0.0
    with exact():
        for fields in plans(name):
            for attention in ("sdpa", "eager") if fields["routing"] in ("kv_substitution", "latent") else ("sdpa",):
                model = with_adapter(name, attention=attention, **fields)
                worst = max(worst, *(_to_naive(name, model, layout) for layout in (RAGGED, EVEN)))
    return worst


def _to_naive(name: str, model: PeftModel, layout: list[list[int]]) -> float:
    base = model.base_model.model
    inputs, alone = make_prompts(name, base, layout)
    got, texts, worst = model(**inputs).logits, text_of(base, inputs), 0.0
    for row, inputs_of_row in enumerate(alone):
        worst = max(worst, difference(got[row][texts[row]], naive_of(model, inputs_of_row)))
    return worst


def naive_of(model: PeftModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The naive derivation's logits at the text tokens of one row."""
    base = model.base_model.model
    owner, attention = base.model, base.config._attn_implementation
    image = ~text_of(base, inputs)[0]
    plan = model.peft_config["default"].plan_for(base.config)
    base.set_attn_implementation("sdpa")
    with model.disable_adapter():
        forget(base)
        branch, recurrent = owner.side_branch["default"], recurrent_layers(base.config.get_text_config())
        want = naive_text_logits(base, decoder_of(owner)[1], inputs, image, plan, branch, recurrent)
    base.set_attn_implementation(attention)
    forget(base)
    return want


@torch.no_grad()
def videos(name: str) -> float:
    """An image and a video in one prompt: both leave the decoder, and the text reads both."""
    worst, generator = 0.0, torch.Generator().manual_seed(3)
    frames = [VIDEO] * 4
    many = name.startswith("qwen3")  # a time stamp stands between the frames
    video = [VISION_START, *frames, VISION_END, *([12, VISION_START, *frames, VISION_END] if many else [])]
    video = video if many else [VISION_START, *frames, *frames, VISION_END]
    ids = torch.tensor([[5, 6, VISION_START, *[IMAGE] * 4, VISION_END, 7, 8, *video, 9, 10, 11]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(16, 96, generator=generator, dtype=torch.float64),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "pixel_values_videos": torch.randn(32, 96, generator=generator, dtype=torch.float64),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
        **{key: make_ids(ids) for key, make_ids in FAMILIES[name].extra.items()},
    }
    with exact():
        for fields in plans(name)[:2]:
            model = with_adapter(name, **fields)
            texts = text_of(model.base_model.model, inputs)
            worst = max(worst, difference(model(**inputs).logits[texts], naive_of(model, inputs)))
    return worst


# -- generation -------------------------------------------------------------------------------------------------------


def grown(name: str, inputs: dict[str, torch.Tensor], new: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs with text tokens (B, n) after them."""
    ids = torch.cat([inputs["input_ids"], new], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(new)], dim=1)
    extra = {key: make_ids(ids) for key, make_ids in FAMILIES[name].extra.items()}
    if name == "paligemma":  # what follows the prompt is causal there
        extra["token_type_ids"][:, -new.shape[1] :] = int(new.shape[1] > 0)
        if new.shape[1] == 0:
            extra["token_type_ids"].zero_()
    return {**inputs, **extra, "input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def cached(name: str) -> float:
    """Greedy decoding with a cache gives the logits of whole forwards without one, and so the same answers."""
    worst, greedy = 0.0, {"do_sample": False, "max_new_tokens": NUM_NEW, "suppress_tokens": MARKED}
    with exact():
        for fields in plans(name):
            model = with_adapter(name, **fields)
            base = model.base_model.model
            for layout in (RAGGED, EVEN):
                inputs, _ = make_prompts(name, base, layout)
                out = model.generate(**inputs, **greedy, return_dict_in_generate=True, output_logits=True)
                answer = out.sequences[:, inputs["input_ids"].shape[1] :]
                for count in range(NUM_NEW):
                    forget(base)
                    whole = model(**grown(name, inputs, answer[:, :count]), use_cache=False).logits[:, -1]
                    worst = max(worst, difference(whole, out.logits[count]))
                forget(base)
    return worst


@torch.no_grad()
def beams(name: str) -> float:
    """Beam search gives the answers of beam search without a cache, rows with different pictures among them."""
    with exact():
        model = with_adapter(name, **first_plan(name))
        inputs, _ = make_prompts(name, model.base_model.model, EVEN)
        search = {"num_beams": 3, "do_sample": False, "max_new_tokens": NUM_NEW, "suppress_tokens": MARKED}
        got = model.generate(**inputs, **search)
        forget(model)
        one_by_one = []
        for _row, alone in enumerate(make_prompts(name, model.base_model.model, EVEN)[1]):
            forget(model)
            one_by_one.append(model.generate(**alone, **search, use_cache=name == "paligemma"))
        new = slice(inputs["input_ids"].shape[1], None)
        want = torch.cat([row[:, -NUM_NEW:] for row in one_by_one])
    return float((got[:, new] != want).sum())


@torch.no_grad()
def later_turn(name: str) -> float:
    """A prompt in three chunks, the last with a picture of its own, gives the logits of one forward."""
    with exact():
        model = with_adapter(name, **first_plan(name))
        base = model.base_model.model
        layout = EVEN_TWO if FAMILIES[name].recurrent else TWO_EACH
        inputs, alone = make_prompts(name, base, layout)
        positions: list[torch.Tensor | None] = []
        decoder = decoder_of(base.model)[1]
        hook = decoder.register_forward_pre_hook(
            lambda module, args, kwargs: positions.append(kwargs.get("position_ids")), with_kwargs=True
        )
        whole = model(**inputs).logits
        hook.remove()
        forget(base)
        got = _in_chunks(name, model, inputs, positions[0])
        keep = text_of(base, inputs)
    return difference(got[keep], whole[keep])


EVEN_TWO = [[3, 20, 4], [3, 20, 4]]


def _in_chunks(
    name: str, model: PeftModel, inputs: dict[str, torch.Tensor], positions: torch.Tensor | None
) -> torch.Tensor:
    """Logits (B, T, vocabulary) of a prompt with two pictures a row, run as picture, text, picture."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    runs = (ids == VISION_START).long().cumsum(1)
    second = int((runs == 2).long().argmax(1).min())  # where the first row starts its second picture
    first_end = int(((runs == 1) & (ids == VISION_END)).long().argmax(1).max()) + 1
    assert first_end <= second
    cache, logits = DynamicCache(config=model.base_model.model.config), []
    for start, end, of_row in ((0, first_end, 0), (first_end, second, None), (second, ids.shape[1], 1)):
        if start == end:
            continue
        chunk = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end]}
        chunk |= {
            key: inputs[key][:, (0 if key == "token_type_ids" and "gemma3" in name else start) : end]
            for key in FAMILIES[name].extra
        }
        if "rope_deltas" in vars(model.base_model.model.model):
            chunk["position_ids"] = positions[..., start:end]
        if of_row is not None:
            chunk |= pictures_of_turn(name, inputs, of_row)
        chunk[cache_name(type(model.base_model.model).forward)] = cache
        logits.append(model(**chunk).logits)
    return torch.cat(logits, dim=1)


def pictures_of_turn(name: str, inputs: dict[str, torch.Tensor], turn: int) -> dict[str, torch.Tensor]:
    """Of prompts with two pictures in each row, the first ones or the second ones."""
    kind = FAMILIES[name].picture
    if kind == "rows":
        return {"pixel_values": inputs["pixel_values"][:, turn : turn + 1]}
    found = {}
    if kind == "patches":
        grids = inputs["image_grid_thw"]
        pieces = inputs["pixel_values"].split(grids.prod(1).tolist())
        return {"pixel_values": torch.cat(pieces[turn::2]), "image_grid_thw": grids[turn::2]}
    for key in ("pixel_values", "image_sizes", "batch_num_images"):
        if key in inputs:
            found[key] = inputs[key][turn::2]
    return found


# -- adapters ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def saved(name: str) -> float:
    """Loaded is what was saved; disabled and unloaded is the base; two adapters are switched; nothing else changed."""
    model = with_adapter(name, dtype=torch.float32, **first_plan(name))
    base = make(name, torch.float32)
    inputs, _ = make_prompts(name, base, RAGGED)
    base.requires_grad_(False)  # as under an adapter: kernels of trained weights round otherwise
    texts, stock, worst = text_of(base, inputs), run(base, inputs), 0.0
    want = run(model, inputs)
    with model.disable_adapter():
        worst = max(worst, difference(run(model, inputs), stock))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(base, folder).eval()
        worst = max(worst, difference(run(again, inputs)[texts], want[texts]))
        again.add_adapter("other", DpvrConfig(**plans(name)[1]))
        again.set_adapter("other")
        other = run(again, inputs)
        assert difference(other[texts], want[texts]) > 1e-4
        again.set_adapter("default")
        worst = max(worst, difference(run(again, inputs)[texts], want[texts]))
    plain = again.unload()
    assert type(plain) is type(make(name, torch.float32)) and not any(
        "side_branch" in key for key in plain.state_dict()
    )
    worst = max(worst, difference(run(plain, inputs), stock))
    fresh = make(name, torch.float32).state_dict()
    return max(worst, *(difference(weight, fresh[key]) for key, weight in plain.state_dict().items()))


def run(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    forget(model)
    return model(**inputs).logits


def gradients(name: str) -> float:
    """Only the side branch gets gradients, all of it, and they are those of finite differences."""
    model = with_adapter(name, **first_plan(name)).train()
    base = model.base_model.model
    inputs, _ = make_prompts(name, base, RAGGED)
    labels = inputs["input_ids"].masked_fill(~text_of(base, inputs), -100)
    if name == "paligemma":
        inputs["token_type_ids"] = inputs["attention_mask"] * 0

    def loss() -> torch.Tensor:
        forget(base)
        return model(**inputs, labels=labels, use_cache=False).loss

    with exact():
        loss().backward()
        trained = {key for key, weight in model.named_parameters() if weight.grad is not None}
        side = {key for key, weight in model.named_parameters() if "side_branch" in key}
        assert trained == side, (sorted(trained ^ side))[:4]
        weight = next(weight for key, weight in model.named_parameters() if "side_branch" in key and "o_proj" in key)
        step, values = 1e-5, []
        with torch.no_grad():
            for sign in (1, -1):
                weight[0, 0] += sign * step
                values.append(loss().item())
                weight[0, 0] -= sign * step
    return abs((values[0] - values[1]) / (2 * step) - weight.grad[0, 0].item())


CHECKS: dict[str, tuple[Callable[[str], float], float]] = {  # with the largest difference allowed
    "all_joint": (all_joint, 0.0),
    "routings": (routings, 1e-9),
    "videos": (videos, 1e-9),
    "cached": (cached, 1e-9),
    "beams": (beams, 0.0),
    "later_turn": (later_turn, 1e-9),
    "saved": (saved, 0.0),
    "gradients": (gradients, 1e-7),
}


def cells() -> list[tuple[str, str]]:
    """The families of the installed transformers, with the checks that apply to each."""
    return [
        (name, check)
        for name in PRESENT
        for check in CHECKS
        if not (check == "videos" and not FAMILIES[name].video or check == "later_turn" and not FAMILIES[name].turns)
    ]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--output", type=Path, default=RECORD, help="the file to add this release's results to")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    document = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {}
    found: dict[str, dict[str, float]] = {}
    for name, check in tqdm(cells(), unit="check"):
        found.setdefault(name, {})[check] = CHECKS[check][0](name)
    allowed = {check: most for check, (_, most) in CHECKS.items()}
    document[transformers.__version__] = {
        **run_record("-m tests.family_checks"),
        "allowed": allowed,
        "largest_difference": found,
    }
    publish(dict(sorted(document.items())), args.output)
    if wrong := [f"{name} {check}" for name, check in cells() if not found[name][check] <= allowed[check]]:
        raise ValueError(f"These checks found more than is allowed: {', '.join(wrong)}.")


if __name__ == "__main__":
    run_command(main, parse_args())
