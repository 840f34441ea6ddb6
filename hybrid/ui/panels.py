"""What is painted around an answer: pure functions from the gateway's JSON to HTML in which everything is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from hybrid.types import JSON
from hybrid.ui.answer import Turn
from hybrid.ui.theme import NAME

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
    bar = f'<div class="hy-bar"><i style="width:{_percent(score):.0f}%"></i></div>'
    return f'<tr{mark}><th scope="row">{name}</th><td>{bar}</td><td>{score:.2f}</td></tr>'


def _percent(share: float) -> float:
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
        facts.append(("confidence", f"{_percent(float(detail.get('confidence') or 0)):.0f} %"))
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


# --- the state of the house ------------------------------------------------------------------------------------------

ACTIVE = ("validating_files", "queued", "running", "paused")


def remaining(eta_s: float) -> str:
    """Time left, in the unit a person would say it in."""
    return f"{eta_s:.0f} s left" if eta_s < 90 else f"{eta_s / 60:.0f} min left"


def status_line(status: JSON) -> str:
    """The line above every tab."""
    engine = status.get("engine") or {}
    ready = status.get("status") == "ready"
    words = "ready" if ready else " – ".join(filter(None, [status.get("phase", "starting"), engine.get("detail")]))
    live = [f"{a['name']}@{a['version']}" for a in status.get("adapters") or [] if a.get("alias")]
    bits = [
        f'<span class="hy-state"><i class="hy-dot {"hy-ok" if ready else "hy-wait"}"></i>{esc(words)}</span>',
        f"<span>{esc(engine.get('model', ''))}</span>",
        f"<span>adapters {esc(', '.join(live) or 'none yet')}</span>",
    ]
    bits += [f"<span>{esc(c['name'])} {esc(c.get('passages', 0))} passages</span>" for c in status.get("corpora") or []]
    bits += [f'<span class="hy-job">{_job(job)}</span>' for job in status.get("jobs") or [] if _active(job)]
    return _line(bits)


def trouble_line(message: str) -> str:
    """The same line when the gateway did not answer the page."""
    return _line([f'<span class="hy-state"><i class="hy-dot hy-down"></i>{esc(message)}</span>'])


def _line(bits: Sequence[str]) -> str:
    return f'<div class="hy-line" role="status">{NAME}{"".join(bits)}</div>'


def _active(job: JSON) -> bool:
    return job.get("status") in ACTIVE


def _job(job: JSON) -> str:
    """A job in a few words with its bar: kind, name, percent, time left."""
    progress = job.get("progress") or {}
    steps, step = float(progress.get("steps") or 0), float(progress.get("step") or 0)
    name = f"{esc(job.get('kind', 'job'))} <b>{esc((job.get('spec') or {}).get('name', ''))}</b>"
    if job.get("status") != "running" or not steps:
        return f"{name} {esc(job.get('status', ''))}"
    share = _percent(step / steps)
    bar = f'<span class="hy-bar"><i style="width:{share:.0f}%"></i></span>'
    eta = progress.get("eta_s")
    left = f", {remaining(float(eta))}" if eta is not None else ""
    return f"{name} {bar} {share:.0f} %{left}"


def house(status: JSON) -> str:
    """The tab Adapters: what was learned, what is being learned, what can be read."""
    body = "".join(
        [
            _table("Jobs", ("job", "loss", ""), [_job_row(job) for job in status.get("jobs") or []]),
            _table(
                "Adapters",
                ("adapter", "state", "measured", "made how"),
                [_adapter_row(a) for a in status.get("adapters") or []],
                "None yet. `hybrid train DIR` makes one; it appears here by itself.",
            ),
            _table(
                "Corpora",
                ("corpus", "documents", "passages", "generation"),
                [
                    tuple(esc(c.get(key, "")) for key in ("name", "documents", "passages", "generation"))
                    for c in status.get("corpora") or []
                ],
                "None yet. `hybrid index DIR` makes one; it appears here by itself.",
            ),
        ]
    )
    return f'<div class="hy-house">{body}</div>'


def _job_row(job: JSON) -> tuple[str, ...]:
    loss = (job.get("progress") or {}).get("loss")
    return _job(job), f"{loss:.3f}" if loss is not None else "", esc(job.get("error") or job.get("detail") or "")


def _adapter_row(adapter: JSON) -> tuple[str, ...]:
    name = f"<b>{esc(adapter.get('name', ''))}@{esc(adapter.get('version', ''))}</b>"
    if adapter.get("alias"):
        name += ' <span class="hy-pill hy-adapter">in use</span>'
    state = f"{esc(adapter.get('state', ''))}"
    if adapter.get("reason"):
        state += f'<small class="hy-bad">{esc(adapter["reason"])}</small>'
    card = adapter.get("card") or {}
    made = [f"{key} {card[key]}" for key in ("method", "rank", "examples") if isinstance(card.get(key), (str, int))]
    return name, state, _numbers(adapter.get("metrics") or {}), esc(", ".join(made))


def _numbers(metrics: JSON) -> str:
    """The plain numbers among the metrics."""
    pairs = [(k, v) for k, v in metrics.items() if isinstance(v, (int, float)) and not isinstance(v, bool)]
    return ", ".join(f"{esc(name)} {value:.3g}" for name, value in pairs[:4]) or "–"


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], empty: str = "") -> str:
    """Rows of ready HTML under a title; nothing at all when there is nothing to say."""
    if not rows:
        return f'<h4>{title}</h4><p class="hy-empty">{esc(empty)}</p>' if empty else ""
    head = "".join(f'<th scope="col">{esc(h)}</th>' for h in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<h4>{title}</h4><div class="hy-wide"><table class="hy-table"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
