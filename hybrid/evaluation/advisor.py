"""From measurements to advice: which arm to serve, how sure that is, and what would change it.

Pure: no file is read and nothing is asked here. Every rule that decides stands in `RULES` and is printed beside what
it decided.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

import numpy as np

from hybrid.evaluation.advice import (
    ALPHA,
    FEW,
    SAME_COST,
    SAME_LOSS,
    Advice,
    Finding,
    Measurements,
    Row,
)
from hybrid.evaluation.formats import FORMATS, valid
from hybrid.evaluation.statistics import Difference, estimate, holm, paired
from hybrid.types import JSON
from hybrid.types.arm import Arm
from hybrid.types.outcome import Outcome

#: the least to keep first
_UPKEEP = ("prompt", "few_shot", "rag", "head", "adapter", "adapter+rag")
_UNTRAINED = _UPKEEP[:3]


def advise(m: Measurements) -> Advice:
    """The advice that the measurements bear out. Raises ValueError when no arm was measured."""
    rows = ranked(m)
    best, winner = rows[0], choose(rows)
    findings = (
        _served_already(m, rows),
        _facts(m, rows),
        _format(m, rows),
        _data(m),
        _budget(m, winner),
    )
    return Advice(
        task=m.task,
        metric=m.metric,
        n=len(m.examples),
        winner=winner.arm,
        best=best.arm,
        certainty=_certainty(rows, winner),
        rows=tuple(rows),
        findings=findings,
        commands=tuple(_commands(m, winner, findings)),
        notes=(*m.notes, *_cautions(m)),
    )


# --- the arms ------------------------------------------------------------------------------------------------------


def ranked(m: Measurements) -> list[Row]:
    """The arms, best first, each tested against the best. Raises ValueError when there are none."""
    rows = [_row(m, arm, outcomes) for arm, outcomes in m.outcomes.items() if outcomes]
    if not rows:
        raise ValueError("advice needs the outcomes of at least one arm")
    rows.sort(key=lambda row: (row.failed > 0.5, -row.score.score, row.cost))
    best, others = rows[0], rows[1:]
    gaps = [_gap(m, best.arm, row.arm) for row in others]
    corrected = holm([gap.p for gap in gaps])
    told = zip(others, gaps, corrected, strict=True)
    return [best, *(replace(row, behind=gap, p_holm=p) for row, gap, p in told)]


def choose(rows: Sequence[Row]) -> Row:
    """The arm to serve: the cheapest of those within noise of the best."""
    fit = [row for row in rows if row.in_noise and row.failed <= 0.5] or [rows[0]]
    least = min(row.cost for row in fit)
    cheap = [row for row in fit if row.cost <= least * (1 + SAME_COST) + 1e-9]
    return min(cheap, key=lambda row: (_upkeep(row.arm), -row.score.score, row.cost))


def _upkeep(arm: str) -> int:
    """How much an arm leaves to keep: nothing trained, a head, an adapter; documents count beside each."""
    strategy = arm.partition(":")[0]
    return _UPKEEP.index(strategy) if strategy in _UPKEEP else len(_UPKEEP)


def _row(m: Measurements, arm: str, outcomes: Sequence[Outcome]) -> Row:
    latency = [o.latency_ms for o in outcomes]
    checked = [valid(o.answer, m.metric, m.labels) for o in outcomes if o.error is None]
    known = [found for found in checked if found is not None]
    return Row(
        arm=arm,
        score=estimate([o.score for o in outcomes]),
        read=float(np.mean([o.prompt_tokens for o in outcomes])),
        written=float(np.mean([o.completion_tokens for o in outcomes])),
        calls=float(np.mean([o.calls for o in outcomes])),
        p50_ms=round(float(np.percentile(latency, 50)), 1),
        p95_ms=round(float(np.percentile(latency, 95)), 1),
        failed=float(np.mean([o.error is not None for o in outcomes])),
        valid=round(float(np.mean(known)), 4) if known else None,
    )


def _gap(m: Measurements, a: str, b: str) -> Difference:
    """`a` less `b` on the examples that both answered."""
    left, right = ({o.id: o.score for o in m.outcomes[arm]} for arm in (a, b))
    ids = [i for i in left if i in right]
    return paired([([left[i] for i in ids], [right[i] for i in ids])])


def _certainty(rows: Sequence[Row], winner: Row) -> str:
    score = f"{winner.score.score:.3f} [{winner.score.low:.3f}, {winner.score.high:.3f}]"
    if len(rows) == 1:
        return f"{winner.arm} scores {score}; nothing else was measured."
    if winner is not rows[0]:
        gap = winner.behind
        assert gap is not None  # noqa: S101  only the best has none
        return (
            f"{winner.arm} scores {score}; the best, {rows[0].arm}, is {gap.diff:+.3f} [{gap.low:+.3f}, "
            f"{gap.high:+.3f}] from it, which is noise (p = {winner.p_holm:.2g}), and costs more."
        )
    rival = next((row for row in rows[1:] if row.failed <= 0.5), rows[1])
    gap = rival.behind
    assert gap is not None  # noqa: S101
    sure = rival.p_holm < ALPHA
    told = f"{gap.diff:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}], p = {rival.p_holm:.2g}"
    told += "" if sure else f"; with this many examples a difference of {gap.detectable:.3f} would show"
    return f"{winner.arm} scores {score}, {'' if sure else 'not '}surely better than the runner-up {rival.arm}: {told}."


# --- the questions -------------------------------------------------------------------------------------------------


def _served_already(m: Measurements, rows: Sequence[Row]) -> Finding:
    base = next((row for row in rows if row.arm == "prompt"), None)
    question = "Does the base model serve this already?"
    if base is None:
        return Finding(question, "unknown", "The base was not measured.", {})
    best = rows[0]
    numbers = {"prompt": base.score.wire(), "best": {"arm": best.arm, **best.score.wire()}, "p": base.p_holm}
    if base.in_noise:
        said = f"Yes: prompting scores {base.score.score:.3f} and nothing measured is surely better"
        return Finding(question, "yes", f"{said} (best: {best.arm} {best.score.score:.3f}).", numbers)
    examples = next((row for row in rows if row.arm.startswith("few_shot")), None)
    if examples and examples.in_noise:
        said = (
            f"With examples in the prompt it does: few_shot scores {examples.score.score:.3f}, within noise of the best"
        )
        return Finding(question, "with examples", f"{said} ({best.score.score:.3f}).", numbers)
    gap = base.behind.diff if base.behind else 0.0
    said = f"No: prompting scores {base.score.score:.3f}, {gap:.3f} below {best.arm}"
    return Finding(question, "no", f"{said} (p = {base.p_holm:.2g}).", numbers)


def _facts(m: Measurements, rows: Sequence[Row]) -> Finding:
    """Whether passages help, and whether the right ones are found."""
    question = "Does it need facts that change (documents)?"
    pairs = [(row.arm, closed) for row in rows if (closed := _closed_book(row.arm, rows))]
    if not pairs:
        return Finding(question, "unknown", "There are no documents to search; give a corpus to find out.", {})
    gains = {arm: _gap(m, arm, closed) for arm, closed in pairs}
    arm = max(gains, key=lambda name: gains[name].diff)
    gain, closed = gains[arm], dict(pairs)[arm]
    found, with_gold, without = _gold(m, arm)
    numbers = {
        "arms": [arm, closed], "gain": gain.wire(), "gold_found": found,
        "score_with_gold": with_gold, "score_without_gold": without,
    }  # fmt: skip
    told = f"{arm} is {gain.diff:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}] from {closed}"
    if found is not None:
        told += f"; the right passage was among those shown for {found:.0%} of the questions"
    if gain.p < ALPHA and gain.diff > 0:
        return Finding(question, "yes", f"Yes: {told}. Fresher documents change the answers.", numbers)
    if gain.p < ALPHA:
        return Finding(question, "no", f"No, passages harm: {told}.", numbers)
    return Finding(question, "no", f"Not measurably: {told}.", numbers)


def _closed_book(arm: str, rows: Sequence[Row]) -> str | None:
    """The arm that is the same without passages."""
    strategy, _, _ = arm.partition(":")
    if strategy not in ("rag", "adapter+rag"):
        return None
    adapter = Arm.parse(arm).adapter
    closed = f"adapter:{adapter}" if adapter else "prompt"
    return closed if any(row.arm == closed for row in rows) else None


def _gold(m: Measurements, arm: str) -> tuple[float | None, float | None, float | None]:
    """The share of questions whose gold passage was shown, and the scores where it was and where it was not."""
    gold = {e.id: set(e.meta.get("gold_passages") or ()) for e in m.examples}
    seen = [(bool(gold[o.id] & _ids(o.passages)), o.score) for o in m.outcomes[arm] if gold.get(o.id)]
    if not seen:
        return None, None, None
    found = [score for hit, score in seen if hit]
    missed = [score for hit, score in seen if not hit]
    return round(len(found) / len(seen), 4), _mean(found), _mean(missed)


def _ids(passages: Sequence[str]) -> set[str]:
    """A piece of a long passage counts as that passage."""
    return {*passages, *(p.rpartition("#")[0] for p in passages)}


def _mean(scores: Sequence[float]) -> float | None:
    return round(float(np.mean(scores)), 4) if scores else None


def _format(m: Measurements, rows: Sequence[Row]) -> Finding:
    question = "Is it about style and format?"
    base = next((row for row in rows if row.arm == "prompt"), None)
    tuned = next((row for row in rows if row.arm.startswith("adapter:")), None)
    if m.metric not in FORMATS and not m.labels:
        if base and tuned:
            lengths = {"prompt": round(base.written, 1), "adapter": round(tuned.written, 1)}
            said = f"No format can be checked; prompting writes {lengths['prompt']:g} tokens, the adapter"
            return Finding(question, "unknown", f"{said} {lengths['adapter']:g}.", {"written": lengths})
        return Finding(question, "unknown", f"The metric {m.metric} asks for no format that can be checked.", {})
    shares = {row.arm: row.valid for row in rows if row.valid is not None}
    what = "a label of the list" if m.labels else FORMATS[m.metric]
    if base is None or base.valid is None:
        return Finding(question, "unknown", "Prompting was not measured.", {"valid": shares})
    top = max(shares, key=lambda arm: shares[arm] or 0.0)
    told = f"{base.valid:.0%} of the answers to the bare prompt are {what}, {shares[top]:.0%} of those of {top}"
    if (shares[top] or 0.0) - base.valid > 0.05:
        return Finding(question, "yes", f"Yes: {told}.", {"valid": shares})
    return Finding(question, "no", f"No: {told}.", {"valid": shares})


def _data(m: Measurements) -> Finding:
    """What the learning curve says of more rows."""
    question = "Is there enough data, and would more change it?"
    made = next((t for t in m.trained.values() if t.points), None)
    if made is None:
        return Finding(question, "unknown", f"There are {m.rows} training rows; no learning curve was measured.", {})
    points = list(made.points)
    drawn = ", ".join(f"{p['rows']:.0f} rows {p['dev_loss']:.3f}" for p in points)
    numbers = {"rows": m.rows, "points": [dict(p) for p in points], "ahead": [asdict(a) for a in made.ahead]}
    last, before = points[-1]["dev_loss"], points[-2]["dev_loss"] if len(points) > 1 else float("inf")
    if made.ahead:
        ahead = made.ahead[0]
        gain = (last - ahead.dev_loss) / last if last > 0 else 0.0
        told = f"twice the data would bring the dev loss from {last:.3f} to about {ahead.dev_loss:.3f} "
        told += f"[{ahead.low:.3f}, {ahead.high:.3f}]"
        if gain > SAME_LOSS:
            return Finding(question, "more would help", f"More would help: {told} ({drawn}).", numbers)
        return Finding(question, "enough", f"Enough: the curve is flat, {told} ({drawn}).", numbers)
    if last >= before * (1 - SAME_LOSS):
        return Finding(question, "enough", f"Enough for this recipe: the curve is flat ({drawn}).", numbers)
    said = f"More would help, how much cannot be told: the loss falls, but on no law ({drawn})."
    return Finding(question, "more would help", said, numbers)


def _budget(m: Measurements, winner: Row) -> Finding:
    question = "What does it cost?"
    numbers: JSON = {"serving": winner.wire()["per_1000"], "latency_ms": winner.wire()["latency_ms"]}
    said = (
        f"A thousand requests to {winner.arm} read {1000 * winner.read:,.0f} tokens and write "
        f"{1000 * winner.written:,.0f} in {1000 * winner.calls:,.0f} calls; half are answered in "
        f"{winner.p50_ms:.0f} ms, 95 % in {winner.p95_ms:.0f} ms"
    )
    made = m.trained.get(winner.arm)
    if made is None:
        return Finding(question, "no training", f"{said}; nothing is trained.", numbers)
    numbers["training"] = {"seconds": made.seconds, "memory_mb": made.memory_mb, "steps": made.steps}
    took = f"{made.seconds / 60:.1f} minutes" if made.seconds >= 60 else f"{made.seconds:.0f} seconds"
    memory = f" and {made.memory_mb / 1024:.1f} GiB" if made.memory_mb else ""
    return Finding(question, "training", f"{said}; training it took {took}{memory}.", numbers)


# --- what follows --------------------------------------------------------------------------------------------------


def _commands(m: Measurements, winner: Row, findings: Sequence[Finding]) -> Iterator[str]:
    """What to run next, as it stands."""
    strategy = winner.arm.partition(":")[0]
    verdicts = [finding.verdict for finding in findings]
    if "rag" in strategy and m.documents:  # again, whenever they change
        yield f"hybrid index {m.documents} --name {m.corpus}"
    if strategy == "head":
        yield f"hybrid train {m.folder} --method head"
    if strategy in ("adapter", "adapter+rag"):
        yield f"hybrid train {m.folder}" + (" --growth" if "more would help" in verdicts else "")
    if "more would help" in verdicts and strategy not in _UNTRAINED:
        yield f"hybrid data next {m.folder} --pool UNLABELLED.jsonl -n 100"
    yield f"hybrid eval {m.folder} --split test --out eval/reports/{m.task}"
    yield "hybrid serve"


def _cautions(m: Measurements) -> Iterator[str]:
    if len(m.examples) < FEW:
        yield f"Only {len(m.examples)} dev examples were asked; differences below what the test can find stay unseen."
    if m.trained:
        yield (
            "Trained arms chose their stopping point on the same dev split, which flatters them a little; "
            "`hybrid eval --split test` has the last word."
        )
