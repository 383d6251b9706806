"""The table of docs/latent.md: what a fitted latent explains of its base, and how it answers.

results/dpvr_mini/latent/*.json     fit.json of python -m dpvr.training.fit, one per plan
"""

from pathlib import Path

from dpvr.reports.documents import read, table

HEADINGS = [
    "plan",
    "rank",
    "side layers",
    "explained of keys and values",
    "answers equal",
    "tokens equal",
    "KL (nats)",
]


def render_latents(results: Path) -> str:
    """A row per fit, and below how it was made."""
    fits = [read(path) for path in sorted((results / "dpvr_mini" / "latent").glob("*.json"))]
    rows = [
        [
            f"`{fit['plan']}`",
            str(fit["latent_rank"]),
            str(fit["latent_side_layers"]),
            f"{sum(fit['explained'].values()) / len(fit['explained']):.3f}",
            f"{fit['answers_equal']:.1%}",
            f"{fit['tokens_equal']:.1%}",
            f"{fit['kl_to_base']:.4f}",
        ]
        for fit in fits
    ]
    first = fits[0]
    lines = [
        *table(HEADINGS, rows),
        "",
        f"dpvr-mini, fitted on {first['num_samples']} pictures of MiniBench and measured on {first['eval_samples']} "
        f"others of the same split, with the rows' own answers given; `{first['command']}`, {first['hardware']}, "
        f"torch {first['versions']['torch']}, transformers {first['versions']['transformers']}. One seed.",
    ]
    return "\n".join(lines) + "\n"
