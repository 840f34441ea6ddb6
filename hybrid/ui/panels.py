"""What is painted around an answer: pure functions from the gateway's JSON to HTML in which everything is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from hybrid.types import JSON
from hybrid.ui.answer import Turn

_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)
_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_CITED = re.compile(r"\[(\d{1,2})\]")


def esc(value: object) -> str:
    """Text that HTML shows as it is."""
    return html.escape(str(value), quote=True)


def markdown(text: str) -> str:
    """A model's words as Markdown in which no tag is a tag and no image is fetched; code stays as it was written."""
    parts = _CODE.split(text)
    parts[::2] = [_TAG.sub("&lt;", part).replace("![", "!&#91;") for part in parts[::2]]
    return "".join(parts)


def pill(arm: str) -> str:
    """An arm as a label, coloured by its strategy."""
    strategy = re.sub(r"[^a-z]+", "-", arm.partition(":")[0])
    return f'<span class="hy-pill hy-{strategy or "none"}">{esc(arm or "…")}</span>'


def seconds(ms: float) -> str:
    """A duration as a person reads it."""
    return f"{ms:.0f} ms" if ms < 1000 else f"{ms / 1000:.1f} s"


def badge(turn: Turn) -> str:
    """One line about an answer: what answered, how fast, how much."""
    bits = [pill(turn.arm)]
    if turn.adapter:
        bits.append(f"<b>{esc(turn.adapter)}</b>")
    if turn.total_ms:
        bits.append(seconds(turn.total_ms))
    if turn.usage:
        bits.append(f"{esc(turn.usage.get('completion_tokens', 0))} tokens")
    return f'<div class="hy-badge">{" ".join(f"<span>{bit}</span>" for bit in bits)}</div>'


def explain(turn: Turn | None, title: str = "") -> str:
    """The panel beside an answer: the arm, the reason, the scores, the passages, the drafts."""
    head = f"<h4>{esc(title)}</h4>" if title else ""
    if turn is None:
        return '<div class="hy-panel hy-empty">Ask something: here you will see which arm answered, and why.</div>'
    if turn.error:
        return f'<div class="hy-panel">{head}<p class="hy-bad">{esc(turn.error)}</p></div>'
    if not turn.done:
        wait = "Answering…" if turn.arm else "Choosing an arm…"
        return f'<div class="hy-panel" aria-busy="true">{head}{badge(turn)}<p>{wait}</p></div>'
    body = [
        head,
        badge(turn),
        _reason(turn),
        _scores(turn),
        _facts(turn),
        _passages(turn),
        _folded("Drafts and examples used", [_draft(draft) for draft in turn.drafts]),
        _folded("Nearest messages the gate knows", [_neighbour(n) for n in turn.detail.get("neighbours") or []]),
    ]
    return f'<div class="hy-panel">{"".join(body)}</div>'


def _reason(turn: Turn) -> str:
    detail = turn.detail
    out = f'<p class="hy-why">{esc(detail.get("reason", ""))}</p>' if detail.get("reason") else ""
    if detail.get("fallback"):
        out += f'<p class="hy-warn">The gate was not followed: {esc(detail["fallback"])}.</p>'
    return out


def _scores(turn: Turn) -> str:
    """The gate's scores as bars, best first."""
    scores: dict[str, float] = turn.detail.get("scores") or {}
    if not scores:
        return ""
    best = sorted(scores.items(), key=lambda item: -item[1])[:8]
    rows = "".join(_score_row(arm, score, chosen=arm == turn.arm) for arm, score in best)
    return f'<table class="hy-scores"><caption>What the gate thought of each arm</caption>{rows}</table>'


def _score_row(arm: str, score: float, *, chosen: bool) -> str:
    name, mark = (f"<b>{esc(arm)}</b>", ' class="hy-won"') if chosen else (esc(arm), "")
    bar = f'<div class="hy-bar"><i style="width:{percent(score):.0f}%"></i></div>'
    return f'<tr{mark}><th scope="row">{name}</th><td>{bar}</td><td>{score:.2f}</td></tr>'


def percent(share: float) -> float:
    """A share as a percentage, within 0 and 100."""
    return 100 * min(max(share, 0.0), 1.0)


def _facts(turn: Turn) -> str:
    detail, usage = turn.detail, turn.usage
    if not detail:
        return "<p>Stopped: the rest was not written.</p>"
    facts = [
        ("first word", seconds(turn.first_ms) if turn.first_ms else "–"),
        ("whole answer", seconds(turn.total_ms)),
        ("tokens", f"{usage.get('prompt_tokens', 0)} in, {usage.get('completion_tokens', 0)} out" if usage else "–"),
    ]
    if detail.get("chosen_by") != "caller":
        facts.append(("gate", seconds(float(detail.get("route_ms") or 0))))
        facts.append(("confidence", f"{percent(float(detail.get('confidence') or 0)):.0f} %"))
    cells = "".join(f"<div><dt>{name}</dt><dd>{esc(value)}</dd></div>" for name, value in facts)
    return f'<dl class="hy-facts">{cells}</dl>'


def _passages(turn: Turn) -> str:
    cited = {int(n) for n in _CITED.findall(turn.answer)}
    entries = []
    for n, passage in enumerate(turn.passages, 1):
        score = float(passage.get("score") or 0)
        head = f"<b>[{n}]</b> {esc(passage.get('title') or passage.get('filename', ''))} <small>{score:.2f}</small>"
        if n in cited:
            head += " <em>cited</em>"
        where = " · ".join(esc(passage[key]) for key in ("corpus", "filename") if passage.get(key))
        entries.append((head, str(passage.get("quote", "")), where))
    if not entries:
        return ""
    items = "".join(
        f"<li><details><summary>{head}</summary><p>{esc(text)}</p><small>{where}</small></details></li>"
        for head, text, where in entries
    )
    return f'<h5>Passages it read</h5><ol class="hy-folds">{items}</ol>'


def _neighbour(neighbour: JSON) -> str:
    score = float(neighbour.get("similarity") or 0)
    return f"{esc(neighbour.get('arm', ''))} <small>{score:.2f}</small><p>{esc(neighbour.get('text', ''))}</p>"


def _draft(draft: JSON) -> str:
    return f"{esc(draft.get('arm', ''))}<p>{esc(draft.get('text', ''))}</p>"


def _folded(title: str, entries: Sequence[str]) -> str:
    """Entries of ready HTML behind a title that opens; nothing when there are none."""
    if not entries:
        return ""
    items = "".join(f"<li>{entry}</li>" for entry in entries)
    summary = f"<summary>{title} ({len(entries)})</summary>"
    return f'<details class="hy-more">{summary}<ol class="hy-folds">{items}</ol></details>'
