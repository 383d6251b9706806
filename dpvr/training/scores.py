"""MiniBench's scores around a training run, and the table that it ends with.

before: vanilla, untrained branch or fitted latent     after: the trained one, and what --compare trains beside it

    accuracy on the run's pictures and on ordinary ones, prefill FLOPs, trained parameters, seconds a step
"""

from dataclasses import replace
from typing import Any

from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel, ProcessorMixin

from configuration_dpvr import METHOD_FIELDS, LayerPlan, vanilla_plan
from costs_dpvr import ONE_LAYER, Branch, DecoderCosts, prefill_flops
from dpvr.inference.evaluation import as_drawn, evaluate, median_prompt
from dpvr.models import as_base, plan_of
from dpvr.training.models import method_fields
from dpvr.training.options import MINIBENCH, SWAPPED, DpvrArguments
from minibench.data import make_items, swapped

Row = dict[str, Any]

SHOWN = {MINIBENCH: {"ordinary": as_drawn}, SWAPPED: {"swapped": swapped, "ordinary": as_drawn}}
MEASURED = 10  # questions of each task whose lengths are measured
COMPARED = ("late_fusion", "persistent_context", "kv_substitution", "lora")
RATES = {"late_fusion": 3e-3, "persistent_context": 1.5e-3, "kv_substitution": 1.5e-3, "lora": 1e-3}  # dpvr-mini's


class Scores:
    """Scores on MiniBench's validation questions, on the main process; none if a run is on other rows.

    Attributes:
        rows: of each model and kind of pictures, as `evaluate` returns them, with the model's name and routing.
    """

    def __init__(self, processor: ProcessorMixin, args: DpvrArguments) -> None:
        self.processor, self.shown = processor, SHOWN.get(args.data, {})
        self.num_questions = args.eval_questions * (PartialState().is_main_process and bool(self.shown))
        self.rows: list[Row] = []

    def add(self, name: str, model: PreTrainedModel | PeftModel, *, only: str | None = None) -> bool:
        """Ask a model, on one kind of pictures or on all; returns whether there are new rows."""
        if not self.num_questions:
            return False
        for pictures, show in self.shown.items():
            if only in (None, pictures):
                self._ask(name, model, pictures, show)
        return True

    def _ask(self, name: str, model: PreTrainedModel | PeftModel, pictures: str, show: Any) -> None:
        options = {"split": "validation", "num_questions": self.num_questions, "show": show}
        scores = evaluate(model, self.processor, **options, description=f"{name}, {pictures}")
        tasks = "  ".join(f"{task} {score:.1%}" for task, score in scores["tasks"].items())
        print(f"{name:<16} mean {scores['mean']:6.1%}   {tasks}   (n = {scores['n']}, {pictures})", flush=True)
        fields = method_fields(model) or {"routing": "none"}
        routing = "none" if plan_of(model).is_vanilla else fields["routing"]
        self.rows.append({"name": name, "routing": routing, "pictures": pictures, **scores})

    def add_base(self, model: PreTrainedModel | PeftModel) -> None:
        with as_base(model):
            self.add("vanilla", model)

    def mean(self, name: str, pictures: str) -> float:
        return next(row["mean"] for row in self.rows if (row["name"], row["pictures"]) == (name, pictures))


def costs(model: PreTrainedModel | PeftModel, processor: ProcessorMixin) -> Row:
    """What MiniBench's median question costs, as a share of vanilla's prefill FLOPs.

    Returns:
        prefill_flops, where vanilla's last layer has one query as the plan's has; prefill_flops_stock, where it has
        all, as stock decoders do.
    """
    text_config = model.config.get_text_config()
    counted, sizes = DecoderCosts.of(text_config), median_prompt(processor, make_items("validation", MEASURED))
    plan, fields = plan_of(model), method_fields(model)
    branch = ONE_LAYER if fields is None else Branch.of(plan, fields)
    flops = prefill_flops(counted, plan, *sizes, branch=branch, short_vanilla=True)
    vanilla = vanilla_plan(text_config.num_hidden_layers)
    short, stock = (prefill_flops(counted, vanilla, *sizes, short_vanilla=short) for short in (True, False))
    return {"prefill_flops": flops / short, "prefill_flops_stock": flops / stock}


def compared(args: DpvrArguments, plan: LayerPlan) -> list[str]:
    """What a run is compared with: as asked, else a latent on other pictures with the paper's late fusion."""
    if args.compare is None:
        return ["late_fusion"] if plan.latent_stride and args.data == SWAPPED else []
    return [] if args.compare == ["none"] else args.compare


def compared_arguments(name: str, args: DpvrArguments) -> DpvrArguments:
    """The arguments of a run that another one is compared with: the same rows, another method.

    Raises:
        ValueError: for a method that is none.
    """
    if name not in COMPARED:
        raise ValueError(f"--compare takes {', '.join(COMPARED)}, not {name!r}.")
    latent = {field: None for field in vars(args) if field.startswith("latent_")}
    if name == "lora":
        return replace(args, method="lora", objective=None, **dict.fromkeys(set(vars(args)) & set(METHOD_FIELDS)))
    return replace(args, method="dpvr", routing=name, **latent)


def table(rows: list[Row], scores: Scores) -> list[str]:
    """The last lines of a run: a row per model, and a sentence that says what was won.

    Args:
        rows: name, prefill_flops, trained_parameters, seconds_per_step, saved_activation_bytes, the last None where no
            step was run; first vanilla's, second the run's own.
    """
    shown = list(scores.shown)
    head = f"{'':<24}" + "".join(f"{pictures:>10}" for pictures in shown)
    lines = [f"{head}{'prefill FLOPs':>15}{'trained':>12}{'s a step':>10}{'saved MB':>10}"]
    for row in rows:
        means = "".join(f"{scores.mean(row['name'], pictures):>10.1%}" for pictures in shown)
        trained, seconds = row["trained_parameters"], row["seconds_per_step"]
        rest = f"{trained:>12,}{seconds:>10.2f}" if trained else f"{'-':>12}{'-':>10}"
        kept = row["saved_activation_bytes"]
        saved = f"{'-' if kept is None else f'{kept / 1e6:,.0f}':>10}"
        lines.append(f"{row['name']:<24}{means}{row['prefill_flops']:>15.3f}{rest}{saved}")
    vanilla, own = rows[:2]
    before, after = (scores.mean(row["name"], shown[0]) for row in (vanilla, own))
    of_what = "MiniBench" if len(shown) == 1 else "MiniBench with red and blue swapped"
    if after > before:
        won = f"{100 * (after - before):.1f} points more than vanilla's {before:.1%}"
    else:
        won = f"{100 * (before - after):.1f} points below vanilla's {before:.1%}"
    lines.append(
        f"On {of_what} the {own['name']} answers {after:.1%}, {won}, at {own['prefill_flops']:.2f} of its prefill "
        f"FLOPs ({scores.num_questions} validation questions of each task). Without it the base is as it was."
    )
    return lines
