"""The tables of docs/chat.md: what DPVR saves in the chat, and which pictures the chat tells apart."""

from pathlib import Path

from dpvr.reports.documents import read, table


def render_demo(results: Path) -> str:
    """A row per number of pictures."""
    found = read(results / "dpvr_mini" / "chat.json")
    rows = []
    for row in found["rows"]:
        ratio, (vanilla, own) = row["prefill_ratio"], row["answers"]
        interval = f"{ratio['low']:.2f} to {ratio['high']:.2f}, {ratio['rounds']} rounds"
        rows.append(
            [
                f"{row['pictures']} ({row['image_tokens']} tokens)",
                f"{ratio['estimate']:.2f} ({interval})" + ("" if ratio["conclusive"] else ", too busy to tell"),
                " and ".join(f"{milliseconds:.0f}" for milliseconds in row["first_word_ms"]),
                f"{row['prefill_flops']:.2f}",
                own if vanilla == own else f"{vanilla}, {own}",
            ]
        )
    heads = ["pictures", "prefill time, ratio (95%)", "first word, ms, vanilla and latent", "prefill FLOPs", "answer"]
    versions = found["versions"]
    made = f"“{found['question']}”, dpvr-mini's latent against vanilla: `{found['command']}`, on {found['hardware']}, "
    return "\n".join(
        [*table(heads, rows), "", f"{made}torch {versions['torch']}, transformers {versions['transformers']}.", ""]
    )


def render_unlike(results: Path) -> str:
    """A row per kind of picture, and below which were missed and how it was made."""
    found = read(results / "dpvr_mini" / "pictures.json")
    alarms, number = found["false_alarms"], found["pictures_of_each_split"]
    rows = [
        ["MiniBench, test split (false alarms)", f"{number:,}", f"{alarms['test']:.1%}"],
        *([name, str(kind["pictures"]), f"{kind['share']:.0%}"] for name, kind in found["told_apart"].items()),
    ]
    missed, versions = ", ".join(found["missed"]) or "none", found["versions"]
    lines = [
        *table(["", "pictures", "called unlike"], rows),
        "",
        f"The threshold is the distance that {alarms['validation']:.0%} of {number:,} validation pictures are above. "
        f"Of the packages' pictures these were missed: {missed}. `{found['command']}`, on {found['hardware']}, "
        f"torch {versions['torch']}, transformers {versions['transformers']}.",
    ]
    return "\n".join(lines) + "\n"
