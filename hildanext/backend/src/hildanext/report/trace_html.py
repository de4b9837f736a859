"""A denoising trace as static HTML: no script, readable on a phone, coloured in light and dark."""

from collections.abc import Container, Mapping, Sequence
from html import escape
from typing import Any

from hildanext.detokenization import cell_bytes, pieces_of

MASK = "░"
MAX_STEPS = 240
"""Steps of one trace that are shown; the rest is counted."""

CSS = """
.trace{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:.85rem;line-height:1.7;white-space:pre-wrap;
 overflow-wrap:anywhere}
.trace .p{color:var(--dim)} .trace .m{color:var(--mask)}
.trace .d{background:var(--draft);border-radius:3px} .trace .e{background:var(--edit);border-radius:3px;font-weight:600}
.trace .k{color:var(--ink)}
.trace .w0{background:var(--w0)} .trace .w1{background:var(--w1)} .trace .w2{background:var(--w2)}
.trace .w3{background:var(--w3)} .trace .w4{background:var(--w4)} .trace .w{border-radius:3px}
.trace .step{display:block;border-top:1px solid var(--line);padding:.15rem 0}
.trace .n{color:var(--dim);display:inline-block;min-width:3.2em}
.legend span{padding:.05rem .4rem;border-radius:3px;margin-right:.4rem;font-size:.8rem;white-space:nowrap}
"""
LIGHT = (
    "--mask:#9fb4cc;--draft:#c9ecd0;--edit:#ffd76a;--w0:#e8f1fb;--w1:#cfe3f8;--w2:#b4d2f3;--w3:#98c0ed;--w4:#7caee6;"
)
DARK = "--mask:#54677e;--draft:#1f5130;--edit:#7a5a00;--w0:#16202c;--w1:#1b2f45;--w2:#213f60;--w3:#28507c;--w4:#306199;"

Steps = Sequence[Mapping[str, Any]]


def final_text(steps: Steps, prompt: Sequence[str], kept: int) -> str:
    """The finished text, each token shaded by the forward of its block that wrote it last; edits in their colour.

    `kept` tokens were handed out; what the last block holds beyond them is left away.
    """
    written: dict[int, tuple[bytes, int, bool]] = {}
    first: dict[int, int] = {}
    for step in steps:
        begun = first.setdefault(int(step["block_start"]), int(step["forward"]))
        since = int(step["forward"]) - begun
        for cell in step["drafts"]:
            written[int(cell["position"])] = (_bytes(cell), since, False)
        for cell in step["edits"]:
            written[int(cell["position"])] = (_bytes(cell, "new_"), since, True)
    written = {at: cell for at, cell in written.items() if at < len(prompt) + kept}
    latest = max((since for _, since, _ in written.values()), default=0)
    parts = [f'<span class="p">{escape("".join(prompt))}</span>']
    cells = [cell for _, cell in sorted(written.items())]
    for text, (_, since, edited) in zip(pieces_of(raw for raw, _, _ in cells), cells, strict=True):
        shade = "e" if edited else f"w w{min(4, 5 * since // (latest + 1))}"
        parts.append(f'<span class="{shade}">{escape(text)}</span>')
    return f'<div class="trace">{"".join(parts)}</div>{_legend(latest)}'


def step_by_step(steps: Steps, prompt: Sequence[str]) -> str:
    """One line a forward: the active block with its masks, what the forward drafted and what it edited."""
    cells = {at: text.encode() for at, text in enumerate(prompt)}
    lines = []
    for step in steps[:MAX_STEPS]:
        drafts = {int(cell["position"]): _bytes(cell) for cell in step["drafts"]}
        edits = {int(cell["position"]): _bytes(cell, "new_") for cell in step["edits"]}
        masked = {int(at) for at in step["masks"]} - set(drafts)
        cells |= drafts | edits
        start = int(step["block_start"])
        here = sorted({at for at in cells if at >= start} | masked)
        texts = pieces_of(MASK.encode() if at in masked else cells[at] for at in here)
        looks = ("m" if at in masked else _look(at, len(prompt), drafts, edits) for at in here)
        body = "".join(_cell(text, look) for text, look in zip(texts, looks, strict=True))
        lines.append(f'<span class="step"><span class="n">{int(step["forward"])}</span>{body}</span>')
    if len(steps) > MAX_STEPS:
        lines.append(f'<span class="step">and {len(steps) - MAX_STEPS} forwards more</span>')
    legend = '<p class="legend trace"><span class="m">░ mask</span><span class="d">drafted</span>'
    legend += '<span class="e">edited</span><span class="p">prompt</span></p>'
    return f'{legend}<div class="trace">{"".join(lines)}</div>'


def _look(at: int, prompt: int, drafts: Container[int], edits: Container[int]) -> str:
    return "e" if at in edits else "d" if at in drafts else "p" if at < prompt else "k"


def _cell(text: str, look: str) -> str:
    return f'<span class="{look}">{escape(text.replace(chr(10), "⏎"))}</span>'


def _legend(latest: int) -> str:
    shades = "".join(f'<span class="w w{level}">&nbsp;</span>' for level in range(5))
    return (
        f'<p class="legend trace"><span class="p">prompt</span>written in the block\'s forward 1 {shades} {latest + 1}'
        '<span class="e">edited later</span></p>'
    )


def _bytes(cell: Mapping[str, Any], prefix: str = "") -> bytes:
    known = f"{prefix}text" in cell
    return cell_bytes(cell, prefix) if known else f"[{cell.get('token', cell.get('new'))}]".encode()
