"""The closed-form fit of a latent, against dense float64 least squares and against what the base itself computes."""

import json

import pytest
import torch
from conftest import IMAGE_TOKEN_ID, TOKENS_PER_IMAGE, VOCAB_SIZE
from families import FAMILIES, PRESENT, make, make_prompts
from family_checks import run, text_of
from peft import get_peft_model
from PIL import Image
from reference import make_dpvr

from adapter_dpvr import DpvrConfig
from dpvr.training import fit
from dpvr.training.latent_fit import Moments, Target, collect, fit_latent
from dpvr.training.objectives import match_loss
from latent_dpvr import normalised
from modeling_dpvr import DpvrLlavaForConditionalGeneration

WIDTH = 32


def batches(count: int, rows: int = 3, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Random prompts with two pictures in a row, of the tiny LLaVA."""
    generator, found = torch.Generator().manual_seed(seed), []
    image = [IMAGE_TOKEN_ID] * TOKENS_PER_IMAGE
    for _ in range(count):
        texts = torch.randint(8, VOCAB_SIZE, (rows, 6), generator=generator).tolist()
        ids = torch.tensor([[*text[:2], *image, *text[2:4], *image, *text[4:]] for text in texts])
        pixels = torch.randn(2 * rows, 3, 8, 8, generator=generator, dtype=torch.float64)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels})
    return found


def latent_model(**fields) -> DpvrLlavaForConditionalGeneration:
    return make_dpvr(**{"routing": "latent", "split_layer": 2, "latent_rank": 8, **fields}).eval()


def gathered(model, prompts) -> tuple[torch.Tensor, torch.Tensor]:
    """All n (N, D), and what the base's k_proj and v_proj of all reading layers give (N, W), side by side."""
    target, states, wanted = Target.of(model), [], []
    for inputs in prompts:
        found, taken = target.run(inputs)
        states.append(normalised(found))
        wanted.append(torch.cat([taken[key] for key in sorted(taken)], dim=1))
    return torch.cat(states), torch.cat(wanted)


@torch.no_grad()
def test_keys_and_values_are_the_bases_own_and_states_those_of_the_split():
    model, prompts = latent_model(latent_side_layers=0), batches(1)
    states, taken = Target.of(model).run(prompts[0])
    model.set_routing("none")
    hidden = model(**prompts[0], output_hidden_states=True).hidden_states
    image = prompts[0]["input_ids"] == IMAGE_TOKEN_ID
    torch.testing.assert_close(states, hidden[2][image], rtol=0, atol=0)
    layers = model.model.language_model.layers
    for (index, kind), value in taken.items():
        projection = layers[index].self_attn.k_proj if kind == "keys" else layers[index].self_attn.v_proj
        torch.testing.assert_close(value, projection(layers[index].input_layernorm(hidden[index]))[image])


@torch.no_grad()
@pytest.mark.parametrize("side_layers", [0, 1])
def test_the_fit_is_dense_least_squares_at_full_rank_and_the_best_of_its_rank_below(side_layers):
    fields = {"latent_side_layers": side_layers, "latent_rank": WIDTH}
    model, prompts = latent_model(**fields), batches(30)
    solution = fit_latent(model, prompts, ridge=1e-12)
    n, wanted = gathered(model, prompts)
    design = torch.cat([n, torch.ones(len(n), 1, dtype=n.dtype)], dim=1)
    dense = design @ torch.linalg.lstsq(design, wanted).solution
    latent, target = Target.of(model).latent, Target.of(model)
    keys = sorted((index, kind) for index in target.readers for kind in ("keys", "values"))
    fitted = torch.cat(
        [(latent.keys if kind == "keys" else latent.values)[str(i)](latent.reduce(n)) for i, kind in keys], dim=1
    )
    torch.testing.assert_close(fitted, dense, rtol=0, atol=1e-5)
    # below the full rank: the truncated SVD of the dense fit, each layer's keys and values scaled by their deviation
    moments, rank = collect(target, prompts), 5
    widths = [moments.target[key].numel() for key in keys]
    scale = torch.cat([moments.variance(key).sqrt().expand(width) for key, width in zip(keys, widths, strict=True)])
    centred = (dense - dense.mean(0)) / scale
    best = torch.linalg.svd(centred, full_matrices=False)
    left = ((wanted - wanted.mean(0)) / scale).pow(2).sum() - best.S[:rank].pow(2).sum()
    shares = torch.tensor([1 - solution.explained(moments, rank)[key] for key in keys], dtype=torch.float64)
    assert shares.sum().item() * len(n) == pytest.approx(left.item(), rel=1e-6)


@torch.no_grad()
def test_explained_is_what_the_written_maps_leave_over_on_rows_not_fitted_on():
    model = latent_model(latent_rank=6)
    solution = fit_latent(model, batches(20))
    held_out = batches(5, seed=1)
    target = Target.of(model)
    said = solution.explained(collect(target, held_out), 6)
    n, _ = gathered(model, held_out)
    for index, kind in said:
        wanted = torch.cat([target.run(inputs)[1][(index, kind)] for inputs in held_out])
        maps = target.latent.keys if kind == "keys" else target.latent.values
        left = (maps[str(index)](target.latent.reduce(n)) - wanted).pow(2).sum()
        total = (wanted - wanted.mean(0)).pow(2).sum()
        assert said[(index, kind)] == pytest.approx(1 - (left / total).item(), abs=1e-6)


@torch.no_grad()
def test_at_full_rank_a_layer_that_reads_the_split_layers_own_state_has_the_bases_keys_and_values():
    """Its norm is a scaling of n by fixed weights, so its keys and values are affine maps of n."""
    model, prompts = latent_model(latent_rank=WIDTH, latent_layers=[2]), batches(40)
    fit_latent(model, prompts, ridge=1e-14)
    target = Target.of(model)
    n, wanted = gathered(model, prompts)
    made = torch.cat([maps["2"](target.latent.reduce(n)) for maps in (target.latent.keys, target.latent.values)], 1)
    torch.testing.assert_close(made, wanted, rtol=0, atol=1e-5)


def test_moments_do_not_grow_with_the_number_of_pictures_nor_depend_on_the_batches():
    model = latent_model()
    target, many = Target.of(model), batches(4)
    once = collect(target, many)
    parts = collect(target, many[2:], collect(target, many[:2], Moments()))
    assert once.states.shape == (WIDTH, WIDTH) and once.count == 4 * 3 * 2 * TOKENS_PER_IMAGE
    torch.testing.assert_close(parts.states, once.states)
    for key in once.cross:
        torch.testing.assert_close(parts.cross[key], once.cross[key])


@torch.no_grad()
def test_fewer_image_tokens_than_the_width_give_finite_maps_that_hold_on_other_rows():
    model = latent_model(latent_rank=WIDTH)
    solution = fit_latent(model, batches(1, rows=2))  # 16 image tokens
    assert all(weight.isfinite().all() for weight in Target.of(model).latent.parameters())
    explained = solution.explained(collect(Target.of(model), batches(10, seed=2)), WIDTH)
    assert min(explained.values()) > -1.0


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in PRESENT if not FAMILIES[name].recurrent])
def test_any_family_is_fitted_and_then_answers_more_like_its_base(name):
    """But those with recurrent layers, which text never reads the image in, whatever is fitted."""
    fields = {"routing": "latent", "split_layer": FAMILIES[name].split, "latent_rank": 16}
    model = get_peft_model(make(name), DpvrConfig(**fields)).eval()
    base = model.base_model.model
    prompts = [make_prompts(name, base, [[2, 3], [3, 2]], seed=seed)[0] for seed in range(12)]
    with model.disable_adapter():
        want = run(model, prompts[0])
    texts = text_of(base, prompts[0])
    before = (run(model, prompts[0])[texts] - want[texts]).abs().mean()
    fit_latent(model, prompts)
    after = (run(model, prompts[0])[texts] - want[texts]).abs().mean()
    assert after < before


def test_matching_lowers_its_loss_and_trains_side_layers_and_maps_alone():
    model, prompts = latent_model(latent_side_layers=1, latent_rank=8), batches(4)
    solution = fit_latent(model, prompts)
    target = Target.of(model)
    deviations = collect(target, prompts).deviations
    model.freeze_base()
    trained = [weight for weight in target.latent.parameters()]
    optimizer = torch.optim.Adam(trained, lr=1e-3)
    losses = []
    for _ in range(20):
        loss = match_loss(model, prompts[0], deviations)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(weight.grad is not None for weight in trained)
    expected = 1 - sum(solution.explained(collect(target, prompts[:1]), 8).values()) / (2 * len(target.readers))
    assert losses[0] == pytest.approx(expected, rel=0.5)


def test_a_model_without_a_latent_and_a_batch_without_pictures_are_refused():
    with pytest.raises(ValueError, match="has no latent to fit"):
        fit_latent(make_dpvr(), batches(1))
    text = {"input_ids": torch.tensor([[9, 10, 11]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with pytest.raises(ValueError, match="has no images"):
        fit_latent(latent_model(), [text])


def test_the_command_fits_saves_and_reports(random_mini, tmp_path, capsys):
    words = ["--model", random_mini, "--num_samples", "12", "--eval_samples", "4", "--split_layer", "1"]
    document = fit.main(fit.parse_args([*words, "--latent_rank", "auto", "--output_dir", str(tmp_path / "out")]))
    written = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert written["latent_rank"] == document["latent_rank"] and 0 <= written["answers_equal"] <= 1
    model = DpvrLlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert (model.config.routing, str(model.model.plan)) == ("latent", "o|lll")
    assert float(model.side_branch.latent.reduce.weight.abs().max()) > 0
    assert "answers have the base's tokens" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is not empty: choose a new one"):
        fit.main(fit.parse_args([*words, "--output_dir", str(tmp_path / "out")]))
    with pytest.raises(ValueError, match="rows with a picture are left"):
        few = ["--data", str(rows_of_one(tmp_path)), "--image_folder", str(tmp_path)]
        few += ["--output_dir", str(tmp_path / "other")]
        fit.main(fit.parse_args([*words, *few]))


def rows_of_one(folder):
    """A data file with a single row."""
    Image.new("RGB", (32, 32), "red").save(folder / "red.png")
    said = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": "red"}]
    (folder / "rows.json").write_text(json.dumps([{"image": "red.png", "conversations": said}]))
    return folder / "rows.json"
