"""The house in a line and in tables: pure functions from the gateway's status to HTML; everything is escaped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hybrid.types import JSON
from hybrid.ui.panels import esc, percent
from hybrid.ui.theme import NAME

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
    share = percent(step / steps)
    bar = f'<span class="hy-bar"><i style="width:{share:.0f}%"></i></span>'
    eta = progress.get("eta_s")
    left = f", {remaining(float(eta))}" if eta is not None else ""
    return f"{name} {bar} {share:.0f} %{left}"


def versions_table(status: JSON) -> str:
    """Every version, newest first; a row that is picked shows its card."""
    return table(
        "Adapters",
        ("version", "state", "dev loss", "measured"),
        [(version_id(a), _version_row(a)) for a in reversed(status.get("adapters") or [])],
        "None yet. Train one here, or with <code>hybrid train DIR</code>; it appears by itself.",
    )


def jobs_table(jobs: Sequence[Mapping[str, Any]]) -> str:
    """Every job, newest first; a row that is picked shows how it goes."""
    return table(
        "Jobs",
        ("adapter", "status"),
        [(str(job["id"]), _job_row(job)) for job in jobs],
        "None yet. One that is started elsewhere, by the command line or the API, appears here too.",
    )


def job_facts(job: JSON) -> str:
    """How far a job (as the API tells it) is: its bar, and the numbers of the moment."""
    told = job["hybrid"]
    progress, status = told.get("progress") or {}, str(job["status"])
    head = f"<h4>{esc(told.get('adapter') or '')} <small>{esc(status.replace('_', ' '))}</small></h4>"
    steps = float(progress.get("steps") or 0)
    share = 100.0 if status == "succeeded" else percent(float(progress.get("step") or 0) / steps) if steps else 0.0
    bar = f'<div class="hy-bar hy-long" role="progressbar" aria-valuenow="{share:.0f}" aria-valuemin="0" aria-valuemax="100"><i style="width:{share:.0f}%"></i></div>'  # noqa: E501
    cells = "".join(f"<div><dt>{name}</dt><dd>{esc(value)}</dd></div>" for name, value in _progress(progress, status))
    error = (job.get("error") or {}).get("message")
    wrong = f'<p class="hy-bad">{esc(error)}</p>' if error else ""
    return f'<div class="hy-panel">{head}{bar}<dl class="hy-facts">{cells}</dl>{wrong}</div>'


def _progress(progress: JSON, status: str) -> Iterator[tuple[str, str]]:
    if status == "running" and progress.get("phase") not in (None, "training"):
        yield "now", str(progress["phase"])
    if progress.get("steps"):
        yield "step", f"{progress.get('step', 0):,} of {progress['steps']:,}"
    for key, name in (("loss", "training loss"), ("dev_loss", "dev loss")):
        if progress.get(key) is not None:
            yield name, f"{progress[key]:.4f}"
    if status == "running" and progress.get("tokens_per_s"):
        yield "speed", f"{progress['tokens_per_s']:,.0f} tokens/s"
    if status == "running" and progress.get("eta_s") is not None:
        yield "ready in", remaining(float(progress["eta_s"])).removesuffix(" left")


def _job_row(job: Mapping[str, Any]) -> list[str]:
    error = f'<small class="hy-bad">{esc(job["error"])}</small>' if job["error"] else ""
    return [pick_button(job["name"] or job["id"]), esc(str(job["status"]).replace("_", " ")) + error]


def version_id(adapter: Mapping[str, Any]) -> str:
    """`name@version`."""
    return f"{adapter.get('name', '')}@{adapter.get('version', '')}"


def _version_row(adapter: JSON) -> list[str]:
    name = pick_button(version_id(adapter))
    if adapter.get("alias"):
        name += ' <span class="hy-pill hy-adapter">in use</span>'
    kind = f"{esc(adapter['kind'])}, " if adapter.get("kind", "lora") != "lora" else ""
    state = f"{kind}{esc(adapter.get('state', ''))}"
    why = (adapter.get("measured") or {}).get("reason") or adapter.get("reason")
    if why:
        bad = ' class="hy-bad"' if adapter.get("state") == "rejected" else ""
        state += f"<small{bad}>{esc(why)}</small>"
    loss = (adapter.get("metrics") or {}).get("dev_loss")
    return [name, state, f"{loss:.4f}" if isinstance(loss, (int, float)) else "–", _measured(adapter)]


def _measured(adapter: JSON) -> str:
    """Its score beside the best arm that needs no training."""
    record = adapter.get("measured") or {}
    arms: JSON = record.get("arms") or {}
    own = arms.get(str(record.get("own")))
    if not own:
        return esc(record.get("error") or "–")
    said = f"<b>{own['score']:.2f}</b> <small>{esc(record.get('metric', ''))}"
    rivals = {arm: row["score"] for arm, row in arms.items() if arm != record["own"]}
    if rivals:
        best = max(rivals, key=lambda arm: float(rivals[arm]))
        said += f"; {esc(best)} {rivals[best]:.2f}"
    return said + "</small>"


def pick_button(text: object) -> str:
    """The button of a row that can be picked: what the keyboard reaches."""
    return f'<button type="button" class="hy-pick">{esc(text)}</button>'


def table(title: str, heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], empty: str) -> str:
    """Rows of ready HTML under a title, each with what it is picked by ("" for one that cannot be); `empty` is HTML."""
    if not rows:
        return f'<div class="hy-house"><h4>{title}</h4><p class="hy-empty">{empty}</p></div>'
    head = "".join(f'<th scope="col">{esc(h)}</th>' for h in heads)
    body = "".join(_row(pick, cells) for pick, cells in rows)
    return (
        f'<div class="hy-house"><h4>{title}</h4><div class="hy-wide"><table class="hy-table"><thead><tr>{head}</tr>'
        f"</thead><tbody>{body}</tbody></table></div></div>"
    )


def _row(pick: str, cells: Sequence[str]) -> str:
    data = f' data-pick="{esc(pick)}"' if pick else ""
    return f"<tr{data}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
