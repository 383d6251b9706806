"""The four models of the accuracy benchmark, which are one model: another routing, another branch, other pictures."""

from typing import Any

from transformers import ProcessorMixin

from dpvr.inference.evaluation import as_drawn, evaluate, grey
from modeling_dpvr import DpvrLlavaForConditionalGeneration


def load(name_or_path: str) -> DpvrLlavaForConditionalGeneration:
    """Return the model, or raise ValueError if its routing has no side branch to compare."""
    model = DpvrLlavaForConditionalGeneration.from_pretrained(name_or_path)
    if not model.config.layer_plan().reads_side_branch:
        raise ValueError(
            f"The routing of {name_or_path!r} is {model.config.routing!r}, which reads no side branch, so there is "
            "nothing to compare: save the model with late_fusion, persistent_context or kv_substitution."
        )
    return model


def measure(
    model: DpvrLlavaForConditionalGeneration, processor: ProcessorMixin, **options: Any
) -> list[dict[str, Any]]:
    """Return the rows; afterwards the side branch is untrained. A latent has no such row: it is zero until fitted."""
    routing = model.config.routing
    rows = {}
    untrained = [("untrained", routing)] if routing != "latent" else []
    for name, row_routing in (("vanilla", "none"), ("blind", "none"), (routing, routing), *untrained):
        if name == "untrained":
            model.reset_side_branch()
        model.set_routing(row_routing)
        scores = evaluate(model, processor, show=grey if name == "blind" else as_drawn, description=name, **options)
        rows[name] = {"name": name, "routing": row_routing, **scores}
        model.set_routing(routing)
    return [rows[name] for name in ("vanilla", "untrained", routing, "blind") if name in rows]
