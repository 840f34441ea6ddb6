"""What advice says: the measurements it rests on, the rules that decide, the arms, the answers, and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from hybrid.evaluation.metrics import Example
from hybrid.evaluation.statistics import Difference, Estimate
from hybrid.types import JSON
from hybrid.types.outcome import Outcome

#: p values below this, corrected for the number of rivals, are a difference
ALPHA = 0.05
#: a written token costs as much as this many that are read
WRITTEN = 4.0
#: arms whose costs differ by less than this share cost the same
SAME_COST = 0.10
#: dev losses that differ by less than this share are one loss: so far apart are two seeds
SAME_LOSS = 0.02
#: fewer dev examples than this say little
FEW = 50

RULES = (
    "The best arm has the highest mean score on the dev examples.",
    f"An arm is within noise of the best unless a paired test finds them different (p < {ALPHA:g}, Holm-corrected "
    "for the number of rivals; McNemar for right-or-wrong scores, bootstrap otherwise).",
    f"Of the arms within noise the cheapest to serve wins: tokens read plus {WRITTEN:g} times tokens written; within "
    f"{SAME_COST:.0%} of the least the one with less to keep (nothing trained, then a head, then an adapter).",
    "An arm of which more than half of the answers failed cannot win.",
    f"More data matter if the learning curve's law puts twice the rows at a dev loss lower by more than "
    f"{SAME_LOSS:.0%}.",
    "Documents matter if answering with passages beats the same arm without them in a paired test.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """The dev loss that a multiple of the rows would bring, with the interval that the noise of the points leaves."""

    rows: int
    dev_loss: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What making an arm's artefact took. `points` are the learning curve's `{"rows", "dev_loss"}`, all rows last."""

    version: str
    seconds: float = 0.0
    memory_mb: float = 0.0
    steps: int = 0
    points: tuple[Mapping[str, float], ...] = ()
    ahead: tuple[Ahead, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """Everything the advice rests on. `outcomes` maps each arm to its outcomes on the same dev `examples`.

    `trained` maps arms to the artefact they answer with; `corpus` is "" where there are no documents, `documents` the
    folder it came from, where that is known; `rows` counts the training rows; `notes` are sentences about what could
    not be measured.
    """

    task: str
    metric: str
    folder: str
    labels: tuple[str, ...] = ()
    examples: tuple[Example, ...]
    outcomes: Mapping[str, Sequence[Outcome]]
    trained: Mapping[str, Trained] = field(default_factory=dict)
    corpus: str = ""
    documents: str = ""
    rows: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One arm: its score, what it costs for one request, and how it stands to the best."""

    arm: str
    score: Estimate
    read: float
    written: float
    calls: float
    p50_ms: float
    p95_ms: float
    failed: float
    valid: float | None
    behind: Difference | None = None
    p_holm: float = 1.0

    @property
    def cost(self) -> float:
        """Tokens read, and those written by their weight."""
        return self.read + WRITTEN * self.written

    @property
    def in_noise(self) -> bool:
        """Whether no test tells it from the best."""
        return self.behind is None or self.p_holm >= ALPHA

    def wire(self) -> JSON:
        """As `advice.json` shows it; the costs are of a thousand requests."""
        return {
            "arm": self.arm, **self.score.wire(), "valid_format": self.valid, "failed": round(self.failed, 4),
            "per_1000": {
                "tokens_read": round(1000 * self.read), "tokens_written": round(1000 * self.written),
                "calls": round(1000 * self.calls),
            },
            "latency_ms": {"p50": self.p50_ms, "p95": self.p95_ms},
            "behind_the_best": {**self.behind.wire(), "p_holm": round(self.p_holm, 6)} if self.behind else None,
            "within_noise_of_the_best": self.in_noise,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Finding:
    """A practitioner's question, the answer in a sentence, and the numbers it rests on."""

    question: str
    verdict: str
    sentence: str
    numbers: JSON

    def wire(self) -> JSON:
        """As `advice.json` shows it."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """The advice of one task. `rows` are the arms, best first; `winner` is the arm to serve now."""

    task: str
    metric: str
    n: int
    winner: str
    best: str
    certainty: str
    rows: tuple[Row, ...]
    findings: tuple[Finding, ...]
    commands: tuple[str, ...]
    notes: tuple[str, ...]

    def wire(self) -> JSON:
        """The content of `advice.json`."""
        return {
            "schema": 1, "task": self.task, "metric": self.metric, "split": "dev", "n": self.n,
            "winner": self.winner, "best": self.best, "certainty": self.certainty,
            "arms": [row.wire() for row in self.rows],
            "findings": [finding.wire() for finding in self.findings],
            "rules": list(RULES), "commands": list(self.commands), "notes": list(self.notes),
        }  # fmt: skip


# --- words ---------------------------------------------------------------------------------------------------------


def markdown(advice: Advice) -> str:
    """The advice as one page."""
    lines = [
        f"# {advice.task}: serve `{advice.winner}`", "",
        advice.certainty, "",
        f"Dev split, {advice.n} examples, metric `{advice.metric}`, intervals 95 %. Costs are of 1,000 requests.", "",
        "| arm | score | behind the best | tokens read | written | calls | p50 ms | p95 ms | valid |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
        *map(_line, advice.rows), "",
    ]  # fmt: skip
    lines += [f"- **{finding.question}** {finding.sentence}" for finding in advice.findings]
    lines += ["", "Next:", "", *(f"    {command}" for command in advice.commands), ""]
    if advice.notes:
        lines += ["Notes:", "", *(f"- {note}" for note in advice.notes), ""]
    lines += ["Rules:", "", *(f"{n}. {rule}" for n, rule in enumerate(RULES, 1)), ""]
    return "\n".join(lines)


def _line(row: Row) -> str:
    score = f"{row.score.score:.3f} [{row.score.low:.3f}, {row.score.high:.3f}]"
    behind = "best" if row.behind is None else f"{row.behind.diff:.3f} (p = {row.p_holm:.2g})"
    noise = " noise" if row.behind is not None and row.in_noise else ""
    share = "–" if row.valid is None else f"{row.valid:.0%}"
    tokens = f"{1000 * row.read:,.0f} | {1000 * row.written:,.0f} | {1000 * row.calls:,.0f}"
    return f"| {row.arm} | {score} | {behind}{noise} | {tokens} | {row.p50_ms:.0f} | {row.p95_ms:.0f} | {share} |"
