"""What the tab Evaluate paints: pure functions from evaluations, reports and examples to HTML; all is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from hybrid.evaluation.words import summary
from hybrid.types import JSON
from hybrid.ui.house import remaining, table
from hybrid.ui.panels import esc, percent, pill, seconds

ACTIVE = ("queued", "running")
#: how the examples of a task are put in order: the words, and the key
ORDERS: Mapping[str, Any] = {
    "arms disagree most": lambda row: -row["disagreement"],
    "lowest scores first": lambda row: row["mean"],
    "as they were asked": lambda row: 0,
}
SHOWN = 100


def plan_facts(plan: JSON) -> str:
    """What would be done, and how long it takes."""
    made = [(f"index {name}", minutes) for name, minutes in plan["corpora"].items()]
    made += [(f"train {name}", minutes) for name, minutes in plan["adapters"].items()]
    rows = [(what, f"{minutes:.1f} min") for what, minutes in made]
    rows += [
        (f"ask {part['kind']}, {part['open']:,} of {part['questions']:,}", f"{part['minutes']:.1f} min")
        for part in plan["parts"]
    ]
    cells = "".join(f'<tr><th scope="row">{esc(what)}</th><td></td><td>{esc(took)}</td></tr>' for what, took in rows)
    return (
        f'<div class="hy-panel"><h4>About {plan["minutes"]:.0f} minutes</h4><p>{plan["open"]:,} of '
        f"{plan['questions']:,} answers are still to be had. Nothing was started.</p>"
        f'<table class="hy-scores">{cells}</table></div>'
    )


def evaluation_facts(row: JSON) -> str:
    """How far an evaluation is: its bar, and what it does now."""
    progress, status = row["progress"] or {}, str(row["status"])
    step, steps = float(progress.get("step") or 0), float(progress.get("steps") or 0)
    share = 100.0 if status == "succeeded" else percent(step / steps) if steps else 0.0
    bar = (
        f'<div class="hy-bar hy-long" role="progressbar" aria-label="answers" aria-valuenow="{share:.0f}" '
        f'aria-valuemin="0" aria-valuemax="100"><i style="width:{share:.0f}%"></i></div>'
    )
    facts = [("split", row["split"])]
    if status == "running":
        facts.append(("now", progress.get("phase") or "starting"))
    if steps:
        facts.append(("done", f"{step:,.0f} of {steps:,.0f}"))
    if status == "running" and progress.get("eta_s") is not None:
        facts.append(("time left", remaining(float(progress["eta_s"])).removesuffix(" left")))
    cells = "".join(f"<div><dt>{name}</dt><dd>{esc(value)}</dd></div>" for name, value in facts)
    error = (row.get("error") or {}).get("message")
    wrong = f'<p class="hy-bad" role="alert">{esc(error)}</p>' if error else ""
    note = "<p>Run it again: the answers it has are kept.</p>" if status == "cancelled" else ""
    head = f"<h4>{esc(row['report'])} <small>{esc(status)}</small></h4>"
    return f'<div class="hy-panel">{head}{bar}<dl class="hy-facts">{cells}</dl>{wrong}{note}</div>'


def verdict(name: str, report: JSON) -> str:
    """What a report says in sentences, and the way to its page."""
    first, *more = summary(report) or ["This report is empty."]
    rest = "".join(f"<p>{esc(sentence)}</p>" for sentence in more)
    held = " The examples are held out: nothing is to be chosen by them." if report["split"] == "test" else ""
    tasks = len(report["tasks"])
    page = f"/v1/reports/{quote(name, safe='')}/report.html"
    return (
        f'<div class="hy-panel"><h4>{esc(first)}</h4>{rest}<p class="hy-empty">Split {esc(report["split"])}, {tasks} '
        f"task{'' if tasks == 1 else 's'}, base {esc(report['base_model'])}, gate {esc(report['gate'] or 'none')}."
        f'{held}</p><p><a href="{page}" target="_blank" rel="noopener">Open the whole report</a></p></div>'
    )


def report_label(row: JSON) -> str:
    """A report in the list of them."""
    tasks = row["tasks"]
    what = ", ".join(tasks) if len(tasks) < 3 else f"{len(tasks)} tasks"
    return f"{row['name']} ({row['split']}; {what}; {row['arms']} arms)"


def ordered(examples: Sequence[JSON], order: str) -> list[JSON]:
    """The examples in one of `ORDERS`; equals stay as they were asked."""
    return sorted(examples, key=ORDERS.get(order, ORDERS["as they were asked"]))


def examples_table(examples: Sequence[JSON]) -> str:
    """The first of them, each with how many arms were right; a row that is picked shows its answers."""
    more = f", the first {SHOWN} of {len(examples):,}" if len(examples) > SHOWN else ""
    return table(
        f"Examples{more}",
        ("example", "right", "mean"),
        [(str(row["id"]), _example_row(row)) for row in examples[:SHOWN]],
        "None.",
    )


def _example_row(row: JSON) -> list[str]:
    scores = row["scores"].values()
    right = sum(score >= 1 for score in scores)
    asked = f"<small>{esc(row['input'])}</small>" if row["input"] else ""
    button = f'<button type="button" class="hy-pick">{esc(row["id"])}</button>'
    return [button + asked, f"{right} of {len(scores)}", f"{row['mean']:.2f}"]


def side_by_side(example: JSON) -> str:
    """The question, the reference, and every arm's answer with its score."""
    if example["texts"]:
        asked = "".join(_text(label, example[key]) for label, key in (("Asked", "input"), ("Reference", "reference")))
    else:
        asked = '<p class="hy-empty">This report was written without texts: it holds scores alone.</p>'
    cards = "".join(_card(answer, shown=example["texts"]) for answer in example["answers"])
    return (
        f'<div class="hy-panel"><h4>{esc(example["task"])} <small>{esc(example["id"])}</small></h4>{asked}</div>'
        f'<div class="hy-sides">{cards}</div>'
    )


def _text(label: str, text: object) -> str:
    return f"<h5>{label}</h5><p class='hy-text'>{esc(text)}</p>" if text else ""


def _card(answer: JSON, *, shown: bool) -> str:
    score = float(answer["score"])
    kind, word = ("good", "✓ right") if score >= 1 else ("poor", "✗ wrong") if score <= 0 else ("part", "~ in part")
    if answer["error"]:
        words = f'<p class="hy-bad">{esc(answer["error"])}</p>'
    elif shown:
        words = f'<p class="hy-text">{esc(answer["answer"]) or "<i>nothing</i>"}</p>'
    else:
        words = ""
    tokens = answer["tokens"]
    facts = [f"{tokens['prompt']} + {tokens['completion']} tokens", seconds(float(answer["latency_ms"]))]
    facts += [f"took {answer['chosen']}"] if answer.get("chosen") else []
    facts += [f"read {len(answer['passages'])} passages"] if answer["passages"] else []
    told = " · ".join(map(esc, facts))
    return (
        f'<section class="hy-panel hy-side hy-{kind}"><header>{pill(answer["arm"])} <b>{word}</b> {score:.2f}</header>'
        f"{words}<small>{told}</small></section>"
    )
