"""What the page says of a model: its name, plan, cost and limits, all read from it."""

from peft import PeftModel

from dpvr.inference.chat import ONE_WAY, Answerer
from dpvr.inference.dial import PROMPT, costs_of
from dpvr.inference.ways import NAMES, VANILLA

REAL_PROMPT = (576, 128)  # image and text tokens of LLaVA-1.5's prompts in the paper


def describe(answerer: Answerer) -> str:
    """Return a list in Markdown."""
    ways, stock = answerer.ways, answerer.ways.stock
    text = stock.config.get_text_config()
    prompt = REAL_PROMPT if answerer.criterion is None else PROMPT
    costs = costs_of(ways, prompt)
    shares = ", ".join(f"{NAMES[routing]} {cost:.2f}" for routing, cost in costs.items() if routing != VANILLA)
    own_name = stock.config.name_or_path.rstrip("/").rpartition("/")[2] or "a model in memory"
    name = own_name if answerer.criterion is None else "dpvr-mini"
    lines = [
        f"`{name}`, {type(stock).__name__}",
        f"{sum(weight.numel() for weight in stock.parameters()) / 1e6:,.1f} million parameters, "
        f"{text.num_hidden_layers} layers, {str(stock.dtype).removeprefix('torch.')}, on {stock.device.type}",
        f"Plan: {plan_of(answerer)}",
        f"Compute of the prefill at {prompt[0]} image and {prompt[1]} text tokens, as a share of vanilla's: "
        f"{shares or 'vanilla is the only way'}",
        f"Room for {text.max_position_embeddings:,} tokens of conversation",
        "Pictures unlike its training pictures are told apart"
        if answerer.criterion
        else "Nothing is known of which pictures it was trained on",
    ]
    return "\n".join(f"- {line}" for line in lines)


def plan_of(answerer: Answerer) -> str:
    """The layer plan of the model's own routing, with its legend."""
    ways = answerer.ways
    if ways.own == VANILLA:
        return f"none: {ONE_WAY}"
    model = answerer.model
    if isinstance(model, PeftModel):
        plan = ways.config.plan_for(ways.stock.config)
    else:
        plan = model.config.layer_plan()
    legend = "`o` image and text together, `l` or `c` text reads the image, `.` text alone"
    return f"`{plan}` ({NAMES[ways.own]}; {legend})"
