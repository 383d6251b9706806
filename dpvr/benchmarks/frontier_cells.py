"""The second grid: what answers are kept at how much of the prefill, latents and their rivals on the same questions.

FrontierGrid.tables()  ->  {table: [Row(name, cells)]}, for `dpvr.benchmarks.grid --grid frontier`

    frontier      vanilla; the paper's methods, early plans and KV at early splits, trained; latents at budgets of
                  prefill FLOPs, fitted, matched and distilled; FastV, random pruning and VTW at the same budgets;
                  LoRA, all weights
    reduction     latents of which half or a quarter of the image tokens is read, chosen by their states, by the
                  question's attention or by chance
    ranks, rows   latents of every rank and split, and fitted on few pictures

Every share is of a vanilla decoder whose last layer has one query too, as that of plans has.
"""

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel

from configuration_dpvr import LATENT_SCORES, vanilla_plan
from costs_dpvr import prefill_flops
from dpvr.benchmarks.cells import PRUNING, RANKS, RATES, SEEDS, SPLIT, VANILLA, Cell, Fields, GridCosts, Row, late

BUDGETS = (0.55, 0.45, 0.40, 0.35, 0.30, 0.25)  # of vanilla's prefill FLOPs
EARLY_SPLITS = (1, 2, 4)  # of DPVR-KV
WIDTH = 192  # of dpvr-mini's decoder
ENOUGH = WIDTH // 4  # the rank up to which a deeper split is worth more than a higher rank
STEP = 8  # between ranks that are tried
ROWS = 1200  # pictures that a latent is fitted on
FEW_ROWS = (10, 30, 100, 300, 1000)
SWEPT_RANKS, SWEPT_SPLITS = (16, 24, 32, 48, 64, 96), (0, 1, 2, 4)
STRIDES = (2, 4)  # half and a quarter of the image tokens
SCORES = (None, *LATENT_SCORES)
SIDE_BUDGETS = (0.45, 0.35)  # at which a side layer before the latent is affordable
DISTILLED_BUDGETS = (0.40, 0.30)
PLAN_BUDGETS = (0.70, 0.45)  # of early plans, which `dpvr.analysis.probe --find_plan` finds


class ShortCosts(GridCosts):
    """Costs as shares of a vanilla decoder whose last layer has one query, as that of plans has."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        plan = vanilla_plan(self.depth)
        self.vanilla = prefill_flops(self.counted, plan, *self.tokens, short_vanilla=True)

    def of(self, model: PreTrainedModel) -> float:
        """The share of a model; 1 of one that runs as the base does."""
        plan = vanilla_plan(self.depth)
        return 1.0 if model.model.plan == plan else model.prefill_flops(*self.tokens) / self.vanilla

    def best_latent(self, budget: float, **fields: Any) -> Fields | None:
        """The latent of the deepest split at which a rank of `ENOUGH` fits.

        If none does: at split 0 with the fewest image tokens left out; if that does not fit, the highest rank there.
        """
        splits = [{"latent_split_layer": split} for split in range(self.depth - 1, -1, -1)]
        fewer = [{"latent_split_layer": 0, "latent_stride": stride} for stride in STRIDES]
        for place, least in [*((each, ENOUGH) for each in (*splits, *fewer)), (splits[-1], STEP)]:
            for rank in range(WIDTH, least - 1, -STEP):
                found = {"routing": "latent", "latent_rank": rank, **place, **fields}
                if self.ratio(found) <= budget:
                    return found
        return None


class FrontierGrid:
    """All tables, for a number of training rows and the costs of one model.

    Args:
        costs: of the model and the median prompt.
        num_rows: training pictures of a trained cell.
        plans: {budget: DPVR fields} of late fusion that reads early; a budget left out has no row.
    """

    def __init__(self, costs: ShortCosts, num_rows: int, plans: dict[float, Fields] | None = None) -> None:
        self.costs, self.num_rows, self.plans = costs, num_rows, plans or {}

    def tables(self) -> dict[str, list[Row]]:
        return {
            "frontier": [*self.untrained(), *self.trained(), *self.baselines()],
            "reduction": self.reduction(),
            "rows": [Row(f"{rows} pictures", list(self.fitted(latent(1, ENOUGH), rows=rows))) for rows in FEW_ROWS],
            "ranks": [
                Row(f"split {split}, rank {rank}", [next(self.fitted(latent(split, rank)))])
                for split in SWEPT_SPLITS
                for rank in SWEPT_RANKS
            ],
        }

    def untrained(self) -> list[Row]:
        rows = [Row("vanilla", [Cell(VANILLA)]), Row("latent of dpvr-mini", [Cell({"routing": "latent"})])]
        for budget in BUDGETS:
            found = self.costs.best_latent(budget)
            rows.append(Row(f"{budget:.2f} latent, fitted", list(self.fitted(found)) if found else []))
        for budget in BUDGETS:
            vtw = self.costs.deepest_split("text_only", budget)
            rows.append(Row(f"{budget:.2f} vtw", [Cell(vtw)] if vtw else []))
            for name, rank in RANKS.items():
                most = self.costs.most_kept(rank, budget)[:1]
                rows.append(Row(f"{budget:.2f} {name}", [Cell(VANILLA, pruning=one) for one in self.draws(most)]))
        return [
            *rows,
            Row("vtw", [Cell(late(routing="text_only"))]),
            *(Row(name, [Cell(VANILLA, pruning=one) for one in self.draws([PRUNING | {"rank": rank}])])
              for name, rank in RANKS.items()),
            *(Row(f"kv_substitution, split {split}, untrained", [Cell(late(split, "kv_substitution"))])
              for split in EARLY_SPLITS),
        ]  # fmt: skip

    def draws(self, prunings: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Each pruning; a random one with every seed."""
        of_seeds = [{}, *({"seed": seed} for seed in SEEDS[:2])]
        return [one | seed for one in prunings for seed in (of_seeds if one["rank"] == "random" else of_seeds[:1])]

    def trained(self) -> list[Row]:
        rows = [Row("late_fusion", self.branches(late()))]
        for budget in (budget for budget in PLAN_BUDGETS if budget in self.plans):
            rows.append(Row(f"{budget:.2f} late_fusion, early plan", self.branches(self.plans[budget])))
        for split in (SPLIT, *EARLY_SPLITS):
            fields = late(split, "kv_substitution")
            rows.append(Row(f"kv_substitution, split {split}", self.branches(fields)))
        rows.append(Row("persistent_context", self.branches(late(routing="persistent_context"))))
        for objective, budgets, more in (
            ("distil", DISTILLED_BUDGETS, {}),
            ("match", SIDE_BUDGETS, {"latent_side_layers": 1}),
        ):
            for budget in budgets:
                fields = self.costs.best_latent(budget, **more)
                training = {"method": "dpvr", "objective": objective, "learning_rate": 1e-3, "num_rows": self.num_rows}
                cells = [Cell(fields, {**training, "fit_rows": ROWS}, seed=seed) for seed in SEEDS] if fields else []
                rows.append(Row(f"{budget:.2f} latent, {objective}", cells))
        return rows

    def branches(self, fields: Fields) -> list[Cell]:
        training = {"method": "dpvr", "learning_rate": RATES[fields["routing"]], "num_rows": self.num_rows}
        return [Cell(fields, training, seed=seed) for seed in SEEDS]

    def baselines(self) -> list[Row]:
        kinds = {"lora_r16": {"method": "lora", "lora_r": 16}, "lora_r64": {"method": "lora", "lora_r": 64}}
        rows = []
        for name, flags in {**kinds, "full": {"method": "full"}}.items():
            training = {**flags, "learning_rate": RATES[flags["method"]], "num_rows": self.num_rows}
            rows.append(Row(name, [Cell(VANILLA, training, seed=seed) for seed in SEEDS]))
        return rows

    def reduction(self) -> list[Row]:
        """Half and a quarter of the image tokens, by each rule; attention needs a layer before the choice."""
        rows = []
        for split in (1, 0):
            rows.append(Row(f"split {split}, all", list(self.fitted(latent(split, ENOUGH)))))
            for stride in STRIDES:
                for score in SCORES:
                    fields = latent(split, ENOUGH, latent_stride=stride, **{"latent_score": score} if score else {})
                    which = f"1/{stride} by {score}" if score else f"every {stride}"
                    rows.append(Row(f"split {split}, {which}", list(self.fitted(fields))))
                fields = latent(split, ENOUGH, latent_stride=stride)
                for rank in RANKS.values() if split else ("random",):
                    name = f"split {split}, 1/{stride} {'by attention' if rank == 'attention' else 'at random'}"
                    rows.append(Row(name, list(self.fitted(fields, rank=rank))))
        return rows

    def fitted(self, fields: Fields, rows: int = ROWS, rank: str | None = None) -> Iterator[Cell]:
        """A latent fitted in closed form, on other pictures with every seed; `rank` as of `reduction.choose`."""
        for seed in SEEDS:
            choice = {"random": {"rank": "random", "seed": seed}, "attention": {"rank": "attention"}}.get(rank)
            yield Cell(fields, fit_rows=rows, seed=seed, pruning=choice)


def latent(split: int, rank: int, **fields: Any) -> Fields:
    return {"routing": "latent", "latent_rank": rank, "latent_split_layer": split, **fields}
