"""Whether what is asked is still what was trained for: recent requests beside the training rows, as vectors.

Pure: vectors in, words out. An adapter has drifted when a two-sample test tells its requests from its training rows
(maximum mean discrepancy with a permutation p, Gretton et al. 2012, JMLR 13) and they are also measurably further from
them than these are from one another: with thousands of requests any difference is significant, and few of them matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid.evaluation.statistics import holm
from hybrid.types import JSON

Vectors = npt.NDArray[np.float32]

#: requests of an arm below which nothing is said of it
FEWEST = 20
#: p values below this, corrected for the number of arms, are a difference
ALPHA = 0.01
#: how much less alike (cosine) requests must be to the training rows to matter
FALL = 0.05
#: share of an arm's own training rows that would be strangers to the rest of them
OWN_STRANGERS = 0.05
#: a cosine below this is another subject, however scattered the training rows are
OTHER_SUBJECT = 0.35
#: one above this is the same subject, however alike the training rows are
SAME_SUBJECT = 0.6
#: share of all requests that must be strangers before the gate is said to have drifted
STRANGERS = 0.15
#: mean feedback that must be lost
WORSE = 0.1
FEWEST_VOTES = 10
_SAMPLE, _PERMUTATIONS = 300, 4999
_MOST_CLUSTERS = 5
_CENTRAL = 3

RULES = (
    f"Of an arm with fewer than {FEWEST} requests nothing is said.",
    f"An adapter has drifted when its requests are told from its training rows (p < {ALPHA:g}, Holm-corrected) and "
    f"their mean cosine to the nearest row is lower by {FALL:g} than that among the rows.",
    f"A request is a stranger when it is further from every arm than {1 - OWN_STRANGERS:.0%} of that arm's own rows "
    f"are from one another; a cosine below {OTHER_SUBJECT:g} is always far, one above {SAME_SUBJECT:g} never.",
    f"The gate has drifted when more than {STRANGERS:.0%} of the requests are strangers (binomial p < {ALPHA:g}).",
    f"Feedback fell when its mean is lower by {WORSE:g} than in the window before (permutation p < {ALPHA:g}).",
)


@dataclass(frozen=True, slots=True)
class Asked:
    """One routed request: its decision's id, the arm that answered, its unit vector [d], and the feedback it got."""

    id: str
    arm: str
    vector: Vectors
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Known:
    """What an arm was made from: its training rows as unit vectors, one array [n, d] a way of asking.

    `learned` is False for documents and general lines: requests are never like those, so no test compares them.
    """

    views: tuple[Vectors, ...]
    learned: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmDrift:
    """One arm. `then` is the mean cosine of a training row to its nearest other, `now` that of a request to a row."""

    arm: str
    n: int
    share: float
    share_before: float | None
    then: float | None = None
    now: float | None = None
    p: float | None = None
    feedback: float | None = None
    feedback_before: float | None = None
    feedback_p: float | None = None

    @property
    def moved(self) -> bool:
        """Whether its requests have left its training rows."""
        if self.p is None or self.then is None or self.now is None:
            return False
        return self.p < ALPHA and self.then - self.now > FALL

    @property
    def disliked(self) -> bool:
        """Whether its feedback fell."""
        if self.feedback is None or self.feedback_before is None or self.feedback_p is None:
            return False
        return self.feedback_p < ALPHA and self.feedback_before - self.feedback > WORSE


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Strangers that are like one another. `ids` are the decisions at its centre."""

    n: int
    share: float
    nearest: str
    cosine: float
    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """What moved. `n` requests in the window, `before` in the one before it; `strangers` is a share."""

    n: int
    before: int
    arms: tuple[ArmDrift, ...]
    strangers: float
    p: float
    clusters: tuple[Cluster, ...] = ()
    todo: tuple[str, ...] = field(default=())

    def wire(self) -> JSON:
        """As `--json` shows it."""
        rows = [{**asdict(arm), "moved": arm.moved, "disliked": arm.disliked} for arm in self.arms]
        return {**asdict(self), "arms": rows, "drifted": bool(self.todo), "rules": list(RULES)}


def drift(recent: Sequence[Asked], before: Sequence[Asked], known: Mapping[str, Known]) -> Drift:
    """Compares the requests of a window with what each arm was made from, and with the window before."""
    arms = sorted({*known, *(a.arm for a in recent)})
    rows = [_arm(arm, recent, before, known.get(arm)) for arm in arms]
    tested = [row for row in rows if row.p is not None]
    for row, p in zip(tested, holm([row.p for row in tested if row.p is not None]), strict=True):
        rows[rows.index(row)] = replace(row, p=round(p, 5))
    strange = _strangers(recent, known)
    share = len(strange) / len(recent) if recent else 0.0
    found = Drift(
        n=len(recent),
        before=len(before),
        arms=tuple(rows),
        strangers=round(share, 4),
        p=_more_than(len(strange), len(recent)),
        clusters=_clusters(strange, len(recent), known),
    )
    return replace(found, todo=tuple(_todo(found)))


# --- one arm -------------------------------------------------------------------------------------------------------


def _arm(arm: str, recent: Sequence[Asked], before: Sequence[Asked], known: Known | None) -> ArmDrift:
    mine, old = [a for a in recent if a.arm == arm], [a for a in before if a.arm == arm]
    row = ArmDrift(
        arm=arm,
        n=len(mine),
        share=round(len(mine) / len(recent), 4) if recent else 0.0,
        share_before=round(len(old) / len(before), 4) if before else None,
        **_votes(mine, old),
    )
    if len(mine) < FEWEST or known is None or not any(map(len, known.views)):
        return row
    asked = np.stack([a.vector for a in mine])
    now, view = max(((float(_nearest(asked, v).mean()), v) for v in known.views if len(v)), key=lambda pair: pair[0])
    if not known.learned:
        return replace(row, now=round(now, 4))
    then = float(_among(view).mean())
    return replace(row, now=round(now, 4), then=round(then, 4), p=discrepancy(asked, view))


def _votes(mine: Sequence[Asked], old: Sequence[Asked]) -> dict[str, float | None]:
    now, then = ([a.score for a in part if a.score is not None] for part in (mine, old))
    out: dict[str, float | None] = {
        "feedback": round(float(np.mean(now)), 4) if now else None,
        "feedback_before": round(float(np.mean(then)), 4) if then else None,
    }
    if min(len(now), len(then)) >= FEWEST_VOTES:
        from scipy.stats import permutation_test

        tested = permutation_test(
            (now, then), lambda a, b, axis: np.mean(a, axis=axis) - np.mean(b, axis=axis), vectorized=True,
            n_resamples=1999, alternative="less", rng=np.random.default_rng(0),
        )  # fmt: skip
        out["feedback_p"] = float(tested.pvalue)
    return out


def discrepancy(a: Vectors, b: Vectors) -> float:
    """The permutation p of "both are drawn alike", from the maximum mean discrepancy of samples [n, d] and [m, d].

    A Gaussian kernel as wide as the median distance.
    """
    rng = np.random.default_rng(0)
    a, b = _sample(a, rng), _sample(b, rng)
    both = np.concatenate([a, b]).astype(np.float64)
    squared = np.maximum(0.0, 2 - 2 * both @ both.T) if _unit(both) else _distances(both)
    width = float(np.median(squared[np.triu_indices(len(both), 1)])) or 1.0
    kernel = np.exp(-squared / width)
    np.fill_diagonal(kernel, 0.0)
    member = np.arange(len(both)) < len(a)
    (seen,) = _mmd(kernel, member[None, :])
    drawn = _mmd(kernel, rng.permuted(np.tile(member, (_PERMUTATIONS, 1)), axis=1))
    return float((np.sum(drawn >= seen - 1e-12) + 1) / (_PERMUTATIONS + 1))


def _mmd(kernel: npt.NDArray[np.float64], members: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """The unbiased estimate from a kernel matrix [n, n] without its diagonal, for each row of `members` [k, n]."""
    x, y = members.astype(np.float64), (~members).astype(np.float64)
    n, m = x[0].sum(), y[0].sum()
    near_x = x @ kernel
    total = kernel.sum()
    xx = np.einsum("kn,kn->k", near_x, x)
    xy = np.einsum("kn,kn->k", near_x, y)
    yy = total - xx - 2 * xy
    return np.asarray(xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m))


def _unit(rows: npt.NDArray[np.float64]) -> bool:
    return bool(np.allclose(np.einsum("nd,nd->n", rows, rows), 1.0, atol=1e-2))


def _distances(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    squares = np.einsum("nd,nd->n", rows, rows)
    return np.asarray(np.maximum(0.0, squares[:, None] + squares[None, :] - 2 * rows @ rows.T))


def _sample(rows: Vectors, rng: np.random.Generator) -> Vectors:
    return rows if len(rows) <= _SAMPLE else rows[rng.choice(len(rows), _SAMPLE, replace=False)]


def _nearest(rows: Vectors, others: Vectors) -> npt.NDArray[Any]:
    """The cosine of each row to the nearest of `others`."""
    return np.asarray((rows @ others.T).max(axis=1))


def _among(rows: Vectors) -> npt.NDArray[Any]:
    """The cosine of each of a sample of rows to the nearest other row; 1 where there is but one."""
    if len(rows) < 2:
        return np.ones(1)
    kept = np.random.default_rng(0).permutation(len(rows))[: 2 * _SAMPLE]
    cosines = rows[kept] @ rows.T
    cosines[np.arange(len(kept)), kept] = -1.0
    return np.asarray(cosines.max(axis=1))


# --- strangers -----------------------------------------------------------------------------------------------------


def _strangers(recent: Sequence[Asked], known: Mapping[str, Known]) -> list[Asked]:
    """The requests that are like nothing that any arm was made from."""
    if not recent or not known:
        return []
    vectors = np.stack([a.vector for a in recent])
    familiar = np.zeros(len(recent), bool)
    for arm in known.values():
        for view in arm.views:
            if len(view):
                usual = float(np.quantile(_among(view), OWN_STRANGERS)) if arm.learned else OTHER_SUBJECT
                familiar |= _nearest(vectors, view) >= min(max(usual, OTHER_SUBJECT), SAME_SUBJECT)
    return [a for a, seen in zip(recent, familiar, strict=True) if not seen]


def _more_than(strangers: int, n: int) -> float:
    """The p of so many strangers among `n` requests, were only `OWN_STRANGERS` of them to be expected."""
    from scipy.stats import binomtest

    return round(float(binomtest(strangers, n, OWN_STRANGERS, alternative="greater").pvalue), 6) if n else 1.0


def _clusters(strangers: Sequence[Asked], n: int, known: Mapping[str, Known]) -> tuple[Cluster, ...]:
    """What the strangers are about, largest first: k-means, as many clusters as the silhouette favours."""
    if len(strangers) < FEWEST:
        return ()
    vectors = np.stack([a.vector for a in strangers])
    labels = _labels(vectors)
    found = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        centre = vectors[rows].mean(axis=0)
        centre /= np.linalg.norm(centre) or 1.0
        central = rows[np.argsort(-(vectors[rows] @ centre), kind="stable")][:_CENTRAL]
        nearest, cosine = _nearest_arm(vectors[rows], known)
        ids = tuple(strangers[i].id for i in central)
        found.append(Cluster(n=len(rows), share=round(len(rows) / n, 4), nearest=nearest, cosine=cosine, ids=ids))
    return tuple(sorted(found, key=lambda cluster: -cluster.n))


def _labels(vectors: Vectors) -> npt.NDArray[Any]:
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    best, labels = 0.1, np.zeros(len(vectors), int)  # below it the parts are no clusters
    for k in range(2, min(_MOST_CLUSTERS, len(vectors) // FEWEST) + 1):
        tried = KMeans(k, n_init=4, random_state=0).fit_predict(vectors)
        score = float(silhouette_score(vectors, tried)) if len(set(tried.tolist())) > 1 else 0.0
        if score > best:
            best, labels = score, tried
    return labels


def _nearest_arm(vectors: Vectors, known: Mapping[str, Known]) -> tuple[str, float]:
    means = {
        arm: max(float(_nearest(vectors, view).mean()) for view in made.views if len(view))
        for arm, made in known.items()
        if any(map(len, made.views))
    }
    arm = max(means, key=lambda name: means[name])
    return arm, round(means[arm], 4)


# --- words ---------------------------------------------------------------------------------------------------------


def _todo(found: Drift) -> list[str]:
    """What to retrain and why; nothing where nothing moved."""
    said = []
    for row in found.arms:
        if row.moved:
            said.append(
                f"Retrain {row.arm}: its requests have left its training rows (nearest cosine {row.then:.2f} among the "
                f"rows, {row.now:.2f} now, p = {row.p:.2g}). Add rows like them, then `hybrid train`."
            )
        if row.disliked:
            said.append(
                f"Look at {row.arm}: its feedback fell from {row.feedback_before:.2f} to {row.feedback:.2f} "
                f"(p = {row.feedback_p:.2g})."
            )
    if found.n >= FEWEST and found.strangers > STRANGERS and found.p < ALPHA:
        told = f"{found.strangers:.0%} of the requests are like nothing that any arm was made from"
        where = ""
        if found.clusters:
            largest = found.clusters[0]
            where = f"; the largest group ({largest.n}) is nearest to {largest.nearest} (cosine {largest.cosine:.2f})"
        said.append(f"Retrain the gate: {told}{where}. Give it an adapter or a corpus for them.")
    return said


def words(found: Drift, days: float) -> str:
    """The drift as text."""
    lines = [f"{found.n} routed requests in the last {days:g} days, {found.before} in as many before."]
    if found.arms:
        lines += ["", "| arm | requests | share | before | rows | now | p | feedback | before |"]
        lines += ["|---|---:|---:|---:|---:|---:|---:|---:|---:|", *map(_line, found.arms)]
    lines += ["", f"Like nothing known: {found.strangers:.0%} (p = {found.p:.2g})."]
    for cluster in found.clusters:
        near = f"nearest to {cluster.nearest}, cosine {cluster.cosine:.2f}"
        lines.append(f"- a group of {cluster.n} ({cluster.share:.0%}), {near}: {', '.join(cluster.ids)}")
    quiet = "Too few requests to say." if found.n < FEWEST else "Nothing has drifted."
    lines += ["", *(found.todo or [quiet]), "", *(f"- {rule}" for rule in RULES)]
    return "\n".join(lines)


def _line(row: ArmDrift) -> str:
    shares = (_share(row.share), _share(row.share_before))
    numbers = (row.then, row.now, row.p, row.feedback, row.feedback_before)
    cells = [row.arm, str(row.n), *shares, *("–" if x is None else f"{x:.2g}" for x in numbers)]
    return f"| {' | '.join(cells)} |"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"
