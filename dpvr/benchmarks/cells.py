"""The accuracy grid as data: which models are measured, and in which tables they stand.

tables()  ->  {table: [Row(name, cells)]}     one cell per seed; a cell that stands in several tables is measured once
    |
Cell      ->  DPVR fields, flags of train_sft.py or none, pruning or none, seed, split of the questions

Twins of the paper's Tables 2, 4 and 5, and the frontier: plans at a budget of prefill FLOPs beside late fusion, KV,
VTW (the text alone past the split) and pruning, each with the deepest split or the most image tokens that fit. The
first budget is what late fusion costs at dpvr-mini's split.
`dpvr.benchmarks.grid` runs them in the order they stand in, what matters most first, LoRA and all weights at the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from configuration_dpvr import SIDE_BRANCH_INITS
from dpvr.analysis.costs import PromptCosts
from dpvr.benchmarks.pruning import pruned_flops
from minibench.scenes import Split

Fields = dict[str, Any]

SEEDS = (1, 2, 3)  # of data, data order and random weights
DEPTH = 12
SPLIT = 8  # dpvr-mini's own; 18/32 and 24/32 of its 12 layers are 7 and 9
SWEPT_SPLITS = (4, 7, 9, 2, 11)
BUDGETS = (0.81, 0.70, 0.55, 0.45, 0.35, 0.28)  # of vanilla's prefill FLOPs
SEEDED_BUDGETS = (0.55, 0.45)
VANILLA = {"routing": "none"}
DEFAULTS = {"num_fusion_layers": 1, "fusion_layers": None, "num_side_layers": 1, "side_branch_init": "split_layer"}
PRUNING = {"layer": 3, "keep": 0.5}
MORE_DRAWS = ({"seed": 1}, {"seed": 2})  # of random pruning, beside seed 0
CUTS, TRIED_CUTS = (3, 2, 1), 2  # layers before a cut, and how many of those that leave enough tokens are measured
RANKS = {"fastv": "attention", "random_pruning": "random"}
SWEPT_FUSION = {SPLIT: (1, 2, 3, 4), 4: (1, 2, 3, 4), 2: (1, 2, 4)}  # K by split
SPARSE = ((4, [5, 6, 7]), (4, [4, 5, 6, 7]), (4, [6, 7]), (4, [7, 11]), (8, [8]), (2, [4, 5, 6, 7]))  # split, layers
LAST_READ = 8  # removing the image after so many layers costs 3 points (results/dpvr_mini/depth.json)
RATES = {  # late fusion's suits dpvr-mini; PC and KV take half, as in configs/; the others: learning_rates
    "late_fusion": 3e-3,
    "persistent_context": 1.5e-3,
    "kv_substitution": 1.5e-3,
    "lora": 2e-4,
    "full": 3e-5,
}
LONGER = 4  # times as many pictures
SWEPT_RATES = {"late_fusion": (3e-4, 1e-3, 3e-3, 1e-2), "lora": (2e-4, 1e-3, 3e-3), "full": (3e-5, 1e-4, 1e-3)}


@dataclass(frozen=True)
class Cell:
    """One model that is measured.

    Args:
        fields: DPVR fields that differ from the repository's config.
        training: flags of train_sft.py without DPVR fields and seed; None: nothing is trained.
        pruning: arguments of `pruning.prune`, or with a latent of `reduction.choose`; None: nothing is pruned.
        seed: of the training.
        split: where the questions come from; "validation" for what is chosen by its score.
        fit_rows: pictures that a latent is fitted on in closed form, if it is not trained.
        length: how many times as many pictures as the other cells it is trained on.
    """

    fields: Fields = field(default_factory=dict)
    training: dict[str, Any] | None = None
    pruning: dict[str, Any] | None = None
    seed: int = SEEDS[0]
    split: Split = "test"
    length: int = 1
    fit_rows: int = 0

    @property
    def name(self) -> str:
        """Also the name of its file: "late_fusion_split4_k2_seed1", "fastv_layer3_keep0.5"."""
        if self.pruning and "layer" in self.pruning:
            rank = next(name for name, rank in RANKS.items() if rank == self.pruning["rank"])
            drawn = f"_seed{self.pruning['seed']}" if "seed" in self.pruning else ""
            return f"{rank}_layer{self.pruning['layer']}_keep{self.pruning['keep']:.3g}{drawn}"
        method = self.training["method"] if self.training else None
        parts = [_plan_name(self.fields) if method in (None, "dpvr") else method]
        if method == "lora":
            parts[0] += f"_r{self.training['lora_r']}"
        if self.pruning:
            parts.append(self.pruning["rank"])
        if self.fields["routing"] == "latent":
            parts += (
                [self.training["objective"]] if self.training else [f"fitted{self.fit_rows}"] * bool(self.fit_rows)
            )
        if self.split == "validation":
            parts.append(f"lr{self.training['learning_rate']:.0e}")
        if self.length > 1:
            parts.append(f"x{self.length}")
        if self.training or self.fit_rows:
            parts.append(f"seed{self.seed}")
        elif self.fields["routing"] not in ("none", "text_only", "latent"):
            parts.append("untrained")
        return "_".join(parts)

    @property
    def is_baseline(self) -> bool:
        """Whether LoRA or all weights are trained, which takes several times as long as a side branch."""
        return self.training is not None and self.training["method"] != "dpvr"


class Row(NamedTuple):
    """A row of a table: the mean over its cells, which differ in their seeds alone; none: no such model exists."""

    name: str
    cells: list[Cell]


class GridCosts(PromptCosts):
    """`PromptCosts` by the fields of cells, and what fits a budget."""

    def ratio(self, fields: Fields) -> float:
        return self.share(**{name: value for name, value in fields.items() if name != "side_branch_init"})

    def of(self, model: PreTrainedModel) -> float:
        return model.prefill_flops(*self.tokens) / self.vanilla

    def pruned_ratio(self, pruning: dict[str, Any]) -> float:
        return pruned_flops(self.counted, *self.tokens, **pruning) / self.vanilla

    def deepest_split(self, routing: str, budget: float) -> Fields | None:
        """The fields of a routing with the deepest split within a budget; None if none is."""
        for split in range(self.depth - 1, 0, -1):
            fields = {"routing": routing, "split_layer": split}
            if self.ratio(fields) <= budget:
                return fields
        return None

    def most_kept(self, rank: str, budget: float) -> list[dict[str, Any]]:
        """Arguments of `prune`: the most image tokens within a budget, for the deepest cuts that leave an eighth.

        If none does, those after layer 1 that are left.
        """
        found = []
        for layer in CUTS:
            for kept in range(self.tokens[0], 0, -1):
                pruning = {"layer": layer, "keep": kept / self.tokens[0], "rank": rank}
                if self.pruned_ratio(pruning) <= budget:
                    found.append(pruning)
                    break
        return [one for one in found if one["keep"] >= 1 / 8][:TRIED_CUTS] or found[-1:]

    def provisional_plan(self, budget: float) -> Fields | None:
        """A plan until one is found: the deepest split after which the text reads every layer up to `LAST_READ`.

        If none is within the budget: split 1 and as many of the layers before `LAST_READ` as are.
        """
        splits = [(split, split) for split in range(LAST_READ - 1, 0, -1)]
        for split, first in [*splits, *((1, first) for first in range(2, LAST_READ))]:
            layers = list(range(first, LAST_READ))
            fields = {"routing": "late_fusion", "split_layer": split, "fusion_layers": layers}
            if self.ratio(fields) <= budget:
                return fields
        return None


class Grid:
    """All tables, for a number of training rows and the costs of one model.

    Args:
        costs: of the model and the median prompt.
        num_rows: training pictures of a trained cell.
        plans: {budget: DPVR fields} of the frontier; a budget left out has a provisional plan.

    Raises:
        ValueError: for a model of another depth than the splits are for, and plans for budgets that the grid has not.
    """

    def __init__(self, costs: GridCosts, num_rows: int, plans: dict[float, Fields] | None = None) -> None:
        if costs.depth != DEPTH:
            raise ValueError(
                f"The decoder has {costs.depth} layers, and the grid's splits are for {DEPTH}: use dpvr-mini, or "
                "python -m dpvr.benchmarks.accuracy for one model of any depth."
            )
        if unknown := sorted(set(plans or {}) - set(BUDGETS)):
            raise ValueError(f"There are plans for the budgets {unknown}, and the grid has only {BUDGETS}.")
        self.costs, self.num_rows = costs, num_rows
        self.plans = {budget: costs.provisional_plan(budget) for budget in BUDGETS} | (plans or {})

    def tables(self) -> dict[str, list[Row]]:
        return {
            "table2": self.table2(),
            "splits": self.splits(),
            "frontier": self.frontier(),
            "fusion": self.fusion(),
            "side_branch": self.side_branch(),
            "training_length": self.training_length(),
            "learning_rates": self.learning_rates(),
        }

    def table2(self) -> list[Row]:
        text_only = untrained(late(routing="text_only"))  # VTW is the same function: nothing reads the side branch
        return [
            Row("vanilla", [Cell(VANILLA)]),
            Row("late_fusion", self.trained(late(), SEEDS)),
            Row("untrained", [untrained(late())]),
            Row("vtw", [text_only]),
            Row("text_only", [text_only]),
            Row("fastv", [pruned({**PRUNING, "rank": "attention"})]),
            Row("random_pruning", [pruned({**PRUNING, "rank": "random", **seed}) for seed in ({}, *MORE_DRAWS)]),
            Row("kv_substitution", self.trained(late(routing="kv_substitution"))),
            Row("full", [self.baseline("full")]),
            Row("lora_r16", [self.baseline("lora", lora_r=16)]),
            Row("lora_r64", [self.baseline("lora", lora_r=64)]),
            Row("persistent_context", self.trained(late(routing="persistent_context"))),
        ]

    def splits(self) -> list[Row]:
        """The split sweep: trained, as an untrained identity, and with the text alone past the split."""
        rows = []
        for split in (SPLIT, *SWEPT_SPLITS):
            rows += [
                Row(f"{split}, trained", self.trained(late(split), SEEDS if split == SPLIT else SEEDS[:1])),
                Row(f"{split}, untrained identity", [untrained(late(split, side_branch_init="identity"))]),
                Row(f"{split}, VTW", [untrained(late(split, routing="text_only"))]),
            ]
        return rows

    def fusion(self) -> list[Row]:
        """K at the model's split and at shallow ones, and sparse plans (the paper's future work ii)."""
        rows = []
        for split, counts in SWEPT_FUSION.items():
            for count in counts:
                several = split == SPLIT and count <= 2
                cells = self.trained(late(split, num_fusion_layers=count), SEEDS if several else SEEDS[:1])
                rows.append(Row(f"{split}, K = {count}", cells))
        for split, layers in SPARSE:
            fields, named = late(split, fusion_layers=layers), " ".join(map(str, layers))
            rows.append(Row(f"{split}, layers {named}", self.trained(fields)))
            rows.append(Row(f"{split}, layers {named}, untrained", [untrained(fields)]))
        return rows

    def side_branch(self) -> list[Row]:
        """Its depth d_v and what it starts from."""
        depths = [(f"d_v = {count}", late(num_side_layers=count)) for count in (1, 2, 3)]
        starts = [(name, late(side_branch_init=name)) for name in SIDE_BRANCH_INITS]
        default = late()
        return [
            Row(name, self.trained(fields, SEEDS if fields == default else SEEDS[:1]))
            for name, fields in depths + starts
        ]

    def frontier(self) -> list[Row]:
        """What fits a budget of prefill FLOPs; trained plans at two budgets have three seeds."""
        rows = []
        for budget in BUDGETS:
            plan = self.plans[budget]
            late_fusion, kv, vtw = (
                self.costs.deepest_split(routing, budget)
                for routing in ("late_fusion", "kv_substitution", "text_only")
            )
            seeds = SEEDS if budget in SEEDED_BUDGETS else SEEDS[:1]
            rows += [
                Row(f"{budget:.2f} plan", self.trained(plan, seeds) if plan else []),
                Row(f"{budget:.2f} plan, untrained", [untrained(plan)] if plan else []),
                Row(f"{budget:.2f} late_fusion", self.trained(late_fusion) if late_fusion else []),
                Row(f"{budget:.2f} kv_substitution", self.trained(kv) if kv else []),
                Row(f"{budget:.2f} vtw", [untrained(vtw)] if vtw else []),
            ]
            for name, rank in RANKS.items():
                found = self.costs.most_kept(rank, budget)
                rows += [Row(f"{budget:.2f} {name}, after {one['layer']}", [pruned(one)]) for one in found]
                rows += [] if found else [Row(f"{budget:.2f} {name}", [])]
        return rows

    def training_length(self) -> list[Row]:
        """The same plans, trained on more pictures."""
        plans = {f"split {split}": late(split) for split in (SPLIT, 4)}
        if found := self.plans[SEEDED_BUDGETS[-1]]:
            plans[f"{SEEDED_BUDGETS[-1]:.2f} plan"] = found
        return [
            Row(f"{name}, {length * self.num_rows} pictures", self.trained(fields, length=length))
            for name, fields in plans.items()
            for length in (1, LONGER)
        ]

    def learning_rates(self) -> list[Row]:
        """What the rates are to be held to, by validation questions; the slow baselines on a quarter of the rows."""
        rows = [
            Row(f"late_fusion, {rate:.0e}", self.trained(late(), rate=rate, split="validation"))
            for rate in SWEPT_RATES["late_fusion"]
        ]
        return rows + [
            Row(
                f"{method}, {rate:.0e}",
                [self.baseline(method, rate, num_rows=max(1, self.num_rows // 4), split="validation", **extra)],
            )
            for method, extra in (("lora", {"lora_r": 16}), ("full", {}))
            for rate in SWEPT_RATES[method]
        ]

    def trained(
        self,
        fields: Fields,
        seeds: Sequence[int] = SEEDS[:1],
        length: int = 1,
        rate: float | None = None,
        split: Split = "test",
    ) -> list[Cell]:
        rate = rate or RATES[fields["routing"]]
        training = {"method": "dpvr", "learning_rate": rate, "num_rows": length * self.num_rows}
        return [Cell(fields, training, seed=seed, length=length, split=split) for seed in seeds]

    def baseline(
        self, method: str, rate: float | None = None, num_rows: int | None = None, split: Split = "test", **extra: Any
    ) -> Cell:
        training = {"method": method, "learning_rate": rate or RATES[method], "num_rows": num_rows or self.num_rows}
        return Cell(VANILLA, {**training, **extra}, split=split)


def late(split: int = SPLIT, routing: str = "late_fusion", **fields: Any) -> Fields:
    return {"routing": routing, "split_layer": split, **{k: v for k, v in fields.items() if v != DEFAULTS[k]}}


def untrained(fields: Fields) -> Cell:
    return Cell(fields)


def pruned(pruning: dict[str, Any]) -> Cell:
    return Cell(VANILLA, pruning=pruning)


def unique_cells(rows: list[Row]) -> list[Cell]:
    """The cells of these rows in their order, each once."""
    return list({cell.name: cell for row in rows for cell in row.cells}.values())


def _plan_name(fields: Fields) -> str:
    if fields["routing"] == "none":
        return "vanilla"
    if fields["routing"] == "latent":
        return "_".join(
            ["latent", *(f"{key.split('_')[1]}{value}" for key, value in fields.items() if key != "routing")]
        )
    name = f"{fields['routing']}_split{fields['split_layer']}"
    if "fusion_layers" in fields:
        name += "_layers" + ".".join(map(str, fields["fusion_layers"]))
    for key, letter in (("num_fusion_layers", "k"), ("num_side_layers", "side"), ("side_branch_init", "")):
        if key in fields:
            name += f"_{letter}{fields[key]}"
    return name
