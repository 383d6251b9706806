"""saturation.py against hidden states, attention maps and whole forward passes that transformers itself gives."""

import weakref
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from conftest import IMAGE_TOKEN_ID, make_llava
from reference import Prompts, randomise_vectors, real_float64
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpvr.analysis.saturation import GRAPHS, Sample, measure, measure_routed
from dpvr.analysis.tuned_lens import TunedLens
from modeling_dpvr import DpvrLlavaForConditionalGeneration

DEPTH = 5
LAYOUT = [[2, 5], [1, 2, 4], [6, 4]]  # one image, two, one
ANSWERS = [3, 1, 1]  # how many of a row's last tokens are the answer
TOLERANCE = 1e-9


@pytest.fixture(autouse=True, scope="module")
def exact() -> Iterator[None]:
    with real_float64():
        yield


def make_model():
    return randomise_vectors(make_llava(DEPTH))


def labels_of(batch: Prompts) -> torch.Tensor:
    labels = torch.full_like(batch.inputs["input_ids"], -100)
    for row, ids, count in zip(batch.unpad(labels), batch.rows, ANSWERS, strict=False):
        row[-count:] = ids[-count:]
    return labels


def one_row(batch: Prompts, row: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = batch.rows[row][None]
    return ids, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": batch.images[row]}


def kl(expected: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    """KL(expected || got) of logits (..., vocabulary)."""
    return functional.kl_div(got.log_softmax(-1), expected.log_softmax(-1), reduction="none", log_target=True).sum(-1)


@torch.no_grad()
def naive(batch: Prompts, row: int) -> Sample:
    """The same of one row alone, from what the model returns of itself."""
    ids, inputs = one_row(batch, row)
    model, found = make_model(), Sample()
    model.set_attn_implementation("eager")
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    image = ids[0] == IMAGE_TOKEN_ID
    after = ~image & (torch.arange(len(image)) > image.nonzero()[0])
    states = [*output.hidden_states[:-1], None]  # the last one that it returns is normed
    last = model.model.language_model.layers[-1].register_forward_hook(
        lambda _, args, result: states.__setitem__(-1, result if isinstance(result, torch.Tensor) else result[0])
    )
    model(**inputs)
    last.remove()
    for before, state, attention in zip(states[:-1], states[1:], output.attentions, strict=True):
        found.attention_mass.append(attention[0][:, after][..., image].sum(-1).mean(-1).tolist())
        cosine = (before * state).sum(-1) / (before.norm(dim=-1) * state.norm(dim=-1))
        lens = kl(output.logits, model.lm_head(model.model.language_model.norm(state)))
        for kind, tokens in (("image", image), ("text", ~image)):
            found.cosine[kind].append(cosine[0][tokens].mean().item())
            found.logit_lens_kl[kind].append(lens[0][tokens].mean().item())
    answer = slice(-ANSWERS[row] - 1, -1)
    vanilla = output.logits[0, answer]
    for split in range(1, DEPTH):
        for graph in GRAPHS:
            fields = {"split_layer": split, "side_branch_init": "identity", "routing": graph}
            dpvr = DpvrLlavaForConditionalGeneration.from_llava(make_model(), **fields)
            logits = dpvr(**inputs).logits[0, answer]
            found.removal_kl[graph].append(kl(vanilla, logits).mean().item())
            found.removal_changed[graph].append(bool((vanilla.argmax(-1) != logits.argmax(-1)).any()))
    return found


@pytest.mark.parametrize(("side", "chunk"), [("left", 2), ("right", 128)])
def test_a_padded_batch_has_the_statistics_of_its_rows_computed_one_by_one(side: str, chunk: int) -> None:
    batch = Prompts(LAYOUT, side)
    found = measure(make_model(), batch.inputs, labels_of(batch), chunk=chunk)
    for row, sample in enumerate(found):
        want = naive(batch, row)
        for name, value in vars(want).items():
            got = vars(sample)[name]
            if name == "removal_changed":
                assert got == value
            else:
                for mine, theirs in zip(flat(got), flat(value), strict=True):
                    assert abs(mine - theirs) < TOLERANCE, name
        assert sample.logit_lens_kl["text"][-1] == 0
    changed = [change for sample in found for graph in GRAPHS for change in sample.removal_changed[graph]]
    assert any(changed) and not all(changed)


def flat(value: object) -> list[float]:
    if isinstance(value, float):
        return [value]
    return [number for part in (value.values() if isinstance(value, dict) else value) for number in flat(part)]


def test_a_dpvr_model_has_the_statistics_of_its_base() -> None:
    batch = Prompts(LAYOUT)
    dpvr = DpvrLlavaForConditionalGeneration.from_llava(make_model(), split_layer=2)
    assert measure(dpvr, batch.inputs, labels_of(batch)) == measure(make_model(), batch.inputs, labels_of(batch))


def test_rows_without_a_picture_or_an_answer_are_refused() -> None:
    batch = Prompts([[2, 5], [9]])
    with pytest.raises(ValueError, match=r"have no picture: \[1\]\. Leave them out"):
        measure(make_model(), batch.inputs, labels_of(batch))
    batch = Prompts([[2, 5]])
    with pytest.raises(ValueError, match=r"have no answer: \[0\]\. Leave them out"):
        measure(make_model(), batch.inputs, torch.full_like(batch.inputs["input_ids"], -100))


def test_a_routed_models_shared_layers_are_its_bases_and_a_difference_shows() -> None:
    batch = Prompts([[2, 5]])
    _, inputs = one_row(batch, 0)
    dpvr = DpvrLlavaForConditionalGeneration.from_llava(make_model(), split_layer=3, fusion_layers=[3])
    found = measure_routed(dpvr, inputs)
    assert found.identical and dpvr.config.routing == "late_fusion"
    assert [len(found.shared_cosine[kind]) for kind in ("image", "text")] == [3, 3]
    assert min(min(cosine) for cosine in found.shared_cosine.values()) == pytest.approx(1, abs=1e-12)
    vanilla = measure(make_model(), batch.inputs, labels_of(batch))[0].attention_mass
    assert found.vanilla_mass == pytest.approx([sum(heads) / len(heads) for heads in vanilla])
    assert found.attention_mass[:3] == pytest.approx(found.vanilla_mass[:3])
    assert found.attention_mass[3] > 0 and found.attention_mass[4] == 0

    second = dpvr.model.language_model.layers[1]
    noise = iter([0.0, 0.0, 1.0, 0.0])  # two passes under the routing, two under "none", their states and attention
    second.register_forward_pre_hook(lambda _, args: (args[0] + torch.linspace(0, next(noise), args[0].shape[-1]),))
    found = measure_routed(dpvr, inputs)
    assert not found.identical
    for cosine in found.shared_cosine.values():
        assert cosine[0] == pytest.approx(1, abs=1e-12) and max(cosine[1:]) < 0.9998


class Held(TorchDispatchMode):
    """The most bytes that tensors made under it held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[int, Counter] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor)
        return result

    def _hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        holders = self.tensors.setdefault(place, Counter())
        if not holders:
            self.now += size
            self.most = max(self.most, self.now)
        holders[size] += 1
        weakref.finalize(tensor, self._release, place, size)

    def _release(self, place: int, size: int) -> None:
        holders = self.tensors[place]
        holders[size] -= 1
        if not +holders:
            self.now -= size
            del self.tensors[place]


def held_by_measuring(depth: int, times: int) -> int:
    model, batch = make_llava(depth), Prompts([[6, 30, 4]] * 2)
    labels = torch.full_like(batch.inputs["input_ids"], -100)
    labels[:, -1] = 5
    with Held() as held:
        samples = [sample for _ in range(times) for sample in measure(model, batch.inputs, labels, chunk=4)]
    assert len(samples) == 2 * times
    return held.most


def test_what_measuring_holds_grows_neither_with_depth_nor_with_samples() -> None:
    once = held_by_measuring(depth=3, times=1)
    assert held_by_measuring(depth=9, times=1) == once
    assert held_by_measuring(depth=3, times=4) == once
    states = 2 * 44 * 32 * 8  # rows x tokens x width x bytes, with two images of four tokens
    assert once < 40 * states


def test_a_tuned_lens_starts_as_the_logit_lens_and_training_lowers_its_kl(tmp_path) -> None:
    batch, model = Prompts(LAYOUT), make_model()
    batches = [(batch.inputs, labels_of(batch))]
    untrained = measure(model, *batches[0], lens=TunedLens(DEPTH, 32))
    for sample in untrained:
        for kind, curve in sample.logit_lens_kl.items():
            assert sample.tuned_lens_kl[kind] == pytest.approx(curve, rel=1e-5)  # the lens is in float32
    lens = TunedLens.fit(model, batches * 30, 30)
    assert all(parameter.grad is None for parameter in model.parameters())
    lens.save(tmp_path / "lens.safetensors", {"seed": "0"})
    loaded = TunedLens.load(tmp_path / "lens.safetensors", {"seed": "0"}, "cpu")
    assert TunedLens.load(tmp_path / "lens.safetensors", {"seed": "1"}, "cpu") is None
    with pytest.raises(ValueError, match="1 batches to train the tuned lens on, and 3 are needed: lower --tuned_lens"):
        TunedLens.fit(model, batches, 3)
    for before, after, again in zip(
        untrained, *(measure(model, *batches[0], lens=lens) for lens in (lens, loaded)), strict=True
    ):
        assert after == again and after.logit_lens_kl == before.logit_lens_kl
        for kind in ("image", "text"):
            pairs = list(zip(before.tuned_lens_kl[kind], after.tuned_lens_kl[kind], strict=True))
            assert all(trained < start for start, trained in pairs[:-1]) and pairs[-1] == (0, 0)
