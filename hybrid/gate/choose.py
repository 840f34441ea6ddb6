"""Teaches a gate from outcomes and chooses its kind by cross-validation: the same folds for all, judged by the score
of the arms they take, the simpler where they are level.

A model that sees more than there is would be worse than always taking the best single arm. So what it says of an arm's
advantage is scaled by how much of it held-out rows confirm (the regression of what came on what was predicted; nothing
confirmed means the best single arm, always), the other arms may have to be better by a margin, and arms of which
little was measured may be doubted. What the choice of an arm that a row was not asked is worth, the arm's other rows
tell: judged by measured arms alone, a gate that takes lucky strangers would look as good as one that does not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from hybrid.gate.calibrate import Conformal, Isotonic, calibration_error
from hybrid.gate.features import Numbers, Vectors
from hybrid.gate.front import areas, front
from hybrid.gate.learned import KINDS, Learned, Trust, trusted
from hybrid.gate.memory import Places
from hybrid.gate.outcomes import Lessons, Table
from hybrid.gate.routed import ahead_by, chosen, judge
from hybrid.gate.study import FOLDS, Study
from hybrid.types import JSON

Progress = Callable[[str, int, int], None]

MARGINS = (0.0, 0.01, 0.02, 0.04, 0.08)
#: standard errors by which an arm is doubted
DOUBTS = (0.0, 1.0, 2.0, 3.0)
#: a simpler kind is taken when the best one is ahead by less than this many standard errors
_LEVEL = 0.5


@dataclass(frozen=True, eq=False, slots=True)
class Trial:
    """One kind as cross-validation found it best: its setting, how far to trust it, its scores [n, arms] for rows held
    out, the arms it would take there [n], and what those are `worth` [n]."""

    kind: str
    setting: float
    trust: Trust
    score: Numbers
    taken: Places
    worth: Numbers


def choose(
    table: Lessons,
    vectors: Vectors,
    seed: int = 0,
    *,
    kinds: Sequence[str] = tuple(KINDS),
    progress: Progress | None = None,
) -> tuple[Learned, JSON]:
    """The best gate for a table with the unit vectors [n, d] of its queries, refitted on all of it, and its facts.

    Facts are measured on rows held out: each kind beside random, best single arm and oracle; calibration; the front.
    The same input gives the same gate. Raises DataError for too few queries, Refused for a table that may not teach.
    """
    told = progress or (lambda _step, _done, _total: None)
    told("comparing queries", 0, 1)
    study = Study.of(table, vectors, seed)
    trials = []
    for n, kind in enumerate(kinds):
        told(f"trying {kind}", n, len(kinds))
        trials.append(_trial(study, kind))
    best = _winner(table, trials)
    told(f"fitting {best.kind}", 0, 1)
    return _fitted(study, best, trials)


def fit(kind: str, table: Lessons, vectors: Vectors, seed: int = 0) -> Learned:
    """A gate of one kind, its settings chosen as `choose` does. Raises what `choose` raises."""
    return choose(table, vectors, seed, kinds=(kind,))[0]


def digests(queries: Sequence[str]) -> npt.NDArray[np.uint64]:
    """[n]: what a gate remembers every query by that taught it."""
    found = (hashlib.sha256(query.encode()).digest()[:8] for query in queries)
    return np.array([int.from_bytes(digest, "big") for digest in found], dtype=np.uint64)


def _fitted(study: Study, best: Trial, trials: Sequence[Trial]) -> tuple[Learned, JSON]:
    table, measured = study.table, study.table.measured
    calibration = Isotonic.of(best.score[measured], table.score[measured])
    score = calibration(best.score)
    cost = study.memory.costs(study.asked.near)
    given_up = front(table, score, cost)
    learned = Learned(
        arms=table.arms,
        model=KINDS[best.kind].fit(study, best.setting),
        memory=study.memory,
        groups=study.groups,
        means=study.means,
        trust=best.trust,
        calibration=calibration,
        conformal=Conformal.of(study.asked.near, table, score),
        taught=digests(table.queries),
        held_out=chosen(table, score, cost, 0.0).astype(np.int16),
    )
    facts: JSON = {
        "n": len(table),
        "folds": FOLDS,
        "chosen": best.kind,
        "kinds": {trial.kind: _told(table, trial) for trial in trials},
        "calibration": _calibration(study, best),
        "front": given_up,
        "aiq": areas(table, given_up),
    }
    return learned, facts


def _told(table: Table, trial: Trial) -> JSON:
    return {
        **judge(table, trial.taken, trial.worth).wire(),
        "setting": trial.setting,
        "trust": {name: round(value, 4) for name, value in asdict(trial.trust).items()},
    }


def _winner(table: Table, trials: Sequence[Trial]) -> Trial:
    """The trial that scores best, or the simplest that is level with it; `trials` come simplest first."""
    best = max(trials, key=lambda trial: float(table.weights @ trial.worth))
    for trial in trials:
        ahead, error = ahead_by(best.worth, trial.worth)
        if ahead <= _LEVEL * error:
            return trial
    return best


def _trial(study: Study, kind: str) -> Trial:
    found: tuple[float, float, float, Numbers] | None = None
    for setting, estimates in KINDS[kind].trials(study):
        raw = _trusted(study, estimates, Trust(1.0))
        advantage, error = _confirmed(study, raw)
        if found is None or error < found[0]:
            found = error, setting, advantage, raw
    assert found is not None  # noqa: S101  every kind has settings
    _, setting, advantage, raw = found
    trust = _trust(study, raw, advantage)
    score = _trusted(study, raw, trust)
    taken: Places = score.argmax(axis=1)
    return Trial(kind, setting, trust, score, taken, _worth(study, taken))


def _confirmed(study: Study, raw: Numbers) -> tuple[float, float]:
    """(the share of the predicted advantages that came true, the squared error with that share).

    Advantages are differences from the mean of the arms measured on a row, beyond the arms' own means.
    """
    table, weights = study.table, study.table.weights
    expected = np.empty_like(raw)
    for fold in study.folds:
        expected[fold.tried] = fold.means.arm
    measured = table.measured
    weight = np.where(measured, weights[:, None], 0.0)

    def beyond(scores: Numbers) -> Numbers:
        away = np.where(measured, scores - expected, 0.0)
        middle = away.sum(axis=1, keepdims=True) / np.maximum(measured.sum(axis=1, keepdims=True), 1)
        return np.where(measured, away - middle, 0.0)

    came, said = beyond(np.nan_to_num(table.score)), beyond(raw)
    size = float((weight * said * said).sum())
    share = float((weight * came * said).sum()) / size if size > 0 else 0.0
    share = min(max(share, 0.0), 1.0)
    return share, float((weight * (came - share * said) ** 2).sum())


def _trust(study: Study, raw: Numbers, advantage: float) -> Trust:
    """The margin and the doubt that score best on held-out rows; the best single arm alone where none is better."""
    found = [Trust(advantage, margin, doubt) for margin in MARGINS for doubt in DOUBTS]
    scores = [_score(study, raw, trust) for trust in found]
    best = int(np.argmax(scores))
    return found[best] if scores[best] > _score(study, raw, Trust(0.0)) else Trust(0.0)


def _score(study: Study, raw: Numbers, trust: Trust) -> float:
    return float(study.table.weights @ _worth(study, _trusted(study, raw, trust).argmax(axis=1)))


def _worth(study: Study, taken: Places) -> Numbers:
    worth: Numbers = study.worth[np.arange(len(taken)), taken]
    return worth


def _trusted(study: Study, raw: Numbers, trust: Trust) -> Numbers:
    """Scores for the rows held out, each fold's by what the other folds measured."""
    out = np.empty_like(raw)
    for fold in study.folds:
        out[fold.tried] = trusted(raw[fold.tried], fold.asked.group, fold.means, trust)
    return out


def _calibration(study: Study, best: Trial) -> JSON:
    """The expected calibration error before and after, each half of the folds calibrated by the other."""
    measured, even = study.table.measured, np.zeros((len(study.table), 1), dtype=bool)
    for fold in study.folds[::2]:
        even[fold.tried] = True
    after = np.empty_like(best.score)
    for half in (measured & even, measured & ~even):
        other = measured & ~half
        after[half] = Isotonic.of(best.score[other], study.table.score[other])(best.score[half])
    came = study.table.score[measured]
    return {
        "ece_before": round(calibration_error(np.clip(best.score[measured], 0, 1), came), 4),
        "ece_after": round(calibration_error(after[measured], came), 4),
    }
