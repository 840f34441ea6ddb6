"""`gate`: what the gate of this home is worth, told from a report of a test split; nothing is generated.

Five questions: what its decisions would have scored and cost, whether a request finds its own task's arms, whether an
adapter that is new to the gate gets its requests, what happens to requests that are nobody's (`strangers.jsonl`), and
how long a decision takes.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from hybrid.bench.house import NARROW, House, Verdict, open_house
from hybrid.bench.newcomer import Newcomer, arrival, total
from hybrid.bench.plain import auroc, baselines, material, nearness
from hybrid.bench.result import Goal, Result
from hybrid.bench.routed import Field
from hybrid.bench.routing import wilson
from hybrid.errors import BadRequest
from hybrid.evaluation.statistics import paired
from hybrid.gate.lexicon import bare_input
from hybrid.gate.outcomes import read_outcomes
from hybrid.models import ModelFiles
from hybrid.rooms import write_json
from hybrid.settings import Settings
from hybrid.types import JSON
from hybrid.types.arm import PROMPT, Arm

KNOB = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
WARM_UPS = 5
#: requests that are decided once more, their vectors known, and that are searched for
AGAIN, SEARCHED = 1000, 50

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Stranger:
    """A request that is nobody's, of a kind, in a language (ISO 639; `zxx`: none)."""

    text: str
    kind: str
    language: str


@lru_cache(maxsize=1)
def strangers() -> tuple[Stranger, ...]:
    """The lines of `strangers.jsonl`."""
    lines = files("hybrid.bench").joinpath("strangers.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(Stranger(**json.loads(line)) for line in lines)


async def measure(
    settings: Settings,
    report: Path,
    *,
    embedding: ModelFiles,
    gate: str | None,
    out: Path | None,
    progress: Progress,
) -> Result:
    """Decides every example of a report and every stranger. Writes `out` and a picture beside it.

    `embedding` is the home's embedder, `gate` a taught gate (default: the live one). Raises DataError for a report
    without texts, NotFound and Refused for the gate, BadRequest where the report's tasks have no arm of their own here.
    """
    field = Field(read_outcomes([report], teach=False))
    progress("enrolling", 0, 1)
    async with open_house(settings, embedding, gate) as house:
        bench = _Bench(house, field, progress)
        bench.check()
        result = await bench.run()
    if out is not None:
        await asyncio.to_thread(_write, out, result)
    return result


class _Bench:
    """The measurements, each from the same decisions where it can be."""

    def __init__(self, house: House, field: Field, progress: Progress) -> None:
        self._house, self._field, self._progress = house, field, progress
        table = field.table
        self._queries, self._groups = table.queries, table.groups
        arms = house.gate.arms()
        self._owners = [
            task for task in field.tasks if any(house.own(task, a) and a.strategy != "few_shot" for a in arms)
        ]
        self._owned = np.array([group in self._owners for group in self._groups])

    def check(self) -> None:
        """Raises BadRequest where nothing of the report can be routed to an arm of its own."""
        if not self._owners:
            raise BadRequest(
                "No task of the report has an adapter or corpus of its name in this home; "
                "name the home that the report was measured in (HYBRID_HOME)."
            )

    async def run(self) -> Result:
        """Everything, timings first: only then is no request known."""
        house, field = self._house, self._field
        times, verdicts = await self._timed()
        arms = [verdict.arm for verdict in verdicts]
        taken = field.taken(arms)
        router, costs = field.router(taken), field.costs(taken)
        knob = await self._knob()
        found = self._found(arms)
        bare = await self._bare()
        newcomers = await self._newcomers()
        strange = await self._strange(verdicts)
        rows = tuple({**field.row(task, taken, arms), **self._own_row(task, arms)} for task in field.tasks)
        taught = house.gate.taught
        summary = {
            "n": len(field.table),
            "arms": len(house.gate.arms()),
            "gate": {"kind": taught.learned.kind, "version": taught.version} if taught else None,
            "embedder": house.embedder.name,
            "router": router,
            "tokens": costs,
            "knob": knob,
            "own_arm": found,
            "bare": bare,
            "newcomers": newcomers,
            "strangers": strange,
            "glance": self._glanced(verdicts),
            "time": times,
        }
        return Result("gate", rows, summary, _goals(summary))

    # --- time --------------------------------------------------------------------------------------------------------

    async def _timed(self) -> tuple[JSON, list[Verdict]]:
        """How long decisions take, and the decisions of all examples."""
        house = self._house
        for number in range(WARM_UPS):
            await house.decide(f"Warm-up {number}")
        self._progress("deciding", 0, 1)
        fresh = list(dict.fromkeys(self._queries))
        verdicts = await house.judge(fresh)
        doubtful = [query for query, verdict in zip(fresh, verdicts, strict=True) if verdict.embedded]
        again = await house.judge(doubtful[-AGAIN:])
        times = {
            "requests": len(fresh),
            "embedded": len(doubtful),
            "ms": _spread(verdicts),
            "ms_embedded": _spread([verdict for verdict in verdicts if verdict.embedded]),
            "ms_vector_known": _spread(again),
            "later_than_deadline": sum(v.ms > house.settings.gate.deadline_ms for v in verdicts),
            "embedded_by_search": self._searched(fresh[-SEARCHED:]),
        }
        by_query = dict(zip(fresh, verdicts, strict=True))
        return times, [by_query[query] for query in self._queries]

    def _searched(self, queries: Sequence[str]) -> int | None:
        """How many queries a search embeds that a decision had embedded; None where there is nothing to search."""
        house = self._house
        if not house.library.names():
            return None
        before = house.embedder.again
        for query in queries:
            house.library.search(None, query, house.settings.retrieval.shown())
        return house.embedder.again - before

    # --- scores ------------------------------------------------------------------------------------------------------

    async def _knob(self) -> JSON:
        """The score and the cost at each setting of the knob."""
        curve = []
        for number, quality in enumerate(KNOB):
            self._progress("turning the knob", number, len(KNOB))
            taken = self._field.taken(await self._house.arms(self._queries, quality_cost=quality))
            score, cost = self._field.mean(taken.score), self._field.mean(taken.cost)
            curve.append({"quality_cost": quality, "score": round(score, 4), "tokens": round(cost, 1)})
        steps = {key: np.diff([point[key] for point in curve]) for key in ("score", "tokens")}
        return {
            "curve": curve,
            "monotone": all(bool((step >= 0).all()) for step in steps.values()),
            "largest_dip": round(float(max(0.0, -steps["score"].min())), 4),
        }

    # --- own arms ----------------------------------------------------------------------------------------------------

    def _own_row(self, task: str, arms: Sequence[Arm]) -> JSON:
        if task not in self._owners:
            return {"own": None, "own_ci95": None}
        hits = [self._house.own(task, arms[row]) for row in self._field.tasks[task]]
        return {"own": round(sum(hits) / len(hits), 4), "own_ci95": wilson(sum(hits), len(hits))}

    def _found(self, arms: Sequence[Arm]) -> JSON:
        """How often a request got an arm of its own task; beside it classifiers, where adapters brought examples."""
        hits = np.array([self._house.own(group, arm) for group, arm in zip(self._groups, arms, strict=True)])
        train = material(self._house.gate, self._house.tasks)
        rows = np.array([i for i in np.flatnonzero(self._owned) if self._groups[i] in train], dtype=np.intp)
        vectors = [self._house.embedder.embed_query(self._queries[row]) for row in rows]
        said = baselines(train, np.stack(vectors)) if vectors else {}
        right = {
            name: sum(found == self._groups[row] for found, row in zip(answers, rows, strict=True))
            for name, answers in said.items()
        }
        return {
            **_share(int(hits[self._owned].sum()), int(self._owned.sum())),
            "with_examples": {
                name: _share(n, len(rows)) for name, n in {"gate": int(hits[rows].sum()), **right}.items()
            },
        }

    async def _bare(self) -> JSON:
        """The same requests as people put them who do not know the instruction: their inputs alone."""
        self._progress("leaving the instructions out", 0, 1)
        arms = await self._house.arms([bare_input(query) for query in self._queries])
        hits = [self._house.own(group, arm) for group, arm in zip(self._groups, arms, strict=True)]
        own_share = _share(int(np.array(hits)[self._owned].sum()), int(self._owned.sum()))
        return {"own": own_share, "score": round(self._field.mean(self._field.taken(arms).score), 4)}

    def _glanced(self, verdicts: Sequence[Verdict]) -> JSON:
        """How many requests words alone told, and how many of these got an arm of their own task."""
        seen = np.array([not verdict.embedded for verdict in verdicts])
        owners = zip(self._groups, verdicts, strict=True)
        right = seen & np.array([self._house.own(group, verdict.arm) for group, verdict in owners])
        return {"told": _share(int(seen.sum()), len(seen)), "own": _share(int(right.sum()), int(seen.sum()))}

    async def _newcomers(self) -> JSON:
        """Every adapter as if it had just been published."""
        enrolled = [arm for arm in self._house.gate.bank.messages if arm.adapter]
        adapters = [arm for arm in enrolled if self._house.tasks[str(arm.adapter)] in self._field.tasks]
        found: list[Newcomer] = []
        for number, arm in enumerate(adapters):
            self._progress("publishing anew", number, len(adapters))
            found.append(await arrival(self._house, self._field.table, arm))
        if not found:
            return {"adapters": {}}
        told = {one.adapter: _told(one) for one in found}
        return {"adapters": told, "all": _told(total(found)), "before": self._unknown(found)}

    def _unknown(self, newcomers: Sequence[Newcomer]) -> JSON:
        """What routing brought the requests of tasks that nothing had been made for yet, less what `prompt` did."""
        arms = [PROMPT] * len(self._queries)
        pairs = {}
        for one in newcomers:
            rows = self._field.tasks[self._house.tasks[one.adapter]]
            for row, arm in zip(rows, one.before, strict=True):
                arms[row] = arm
        taken, alone = self._field.taken(arms), self._field.taken([PROMPT] * len(arms))
        for one in newcomers:
            rows = self._field.tasks[self._house.tasks[one.adapter]]
            pairs[one.adapter] = (taken.score[rows].tolist(), alone.score[rows].tolist())
        gain = paired(list(pairs.values())).wire()
        by_task = {name: round(float(np.mean(a) - np.mean(b)), 4) for name, (a, b) in pairs.items()}
        return {"over_prompt": gain, "by_task": by_task}

    # --- strangers ---------------------------------------------------------------------------------------------------

    async def _strange(self, verdicts: Sequence[Verdict]) -> JSON:
        """What became of requests that are nobody's, and of those that are somebody's."""
        self._progress("asking as a stranger", 0, 1)
        lines, house = strangers(), self._house
        judged = await house.judge([line.text for line in lines])
        kept = [verdict.arm.strategy not in NARROW for verdict in judged]
        mine = [verdict for verdict, owned in zip(verdicts, self._owned, strict=True) if owned]
        queries = [query for query, owned in zip(self._queries, self._owned, strict=True) if owned]
        away = sum(verdict.turned_away for verdict in mine)
        usual = nearness(house.gate, np.stack([house.embedder.embed_query(query) for query in queries]))
        near = nearness(house.gate, np.stack([house.embedder.embed_query(line.text) for line in lines]))
        return {
            "kept_out": _share(sum(kept), len(kept)),
            "by_kind": _shares([line.kind for line in lines], kept),
            "by_language": _shares([line.language for line in lines], kept),
            "turned_away": _share(away, len(mine)),
            "auroc": {
                "gate": auroc([v.stranger for v in judged], [v.stranger for v in mine]),
                "nearest_five": auroc([-s for s in near], [-s for s in usual]),
            },
            "glanced": sum(not verdict.embedded for verdict in judged),
            "let_in": [
                {"text": line.text[:120], "arm": str(verdict.arm)}
                for line, verdict, out in zip(lines, judged, kept, strict=True)
                if not out
            ],
        }


def _goals(summary: JSON) -> tuple[Goal, ...]:
    router, tokens, strange = summary["router"], summary["tokens"], summary["strangers"]
    newcomers, before, time = *map(summary["newcomers"].get, ("all", "before")), summary["time"]
    found = [
        ("auto by the best arm of each task", router["of_best_per_task"]["share"], 0.98, True),
        ("auto above the best single arm, low end of the interval", router["over_best_single"]["ci95"][0], 0.0, True),
        ("recovered", router["recovered"], 0.6, True),
        ("share that got an arm of its own task", summary["own_arm"]["share"], 0.99, True),
        ("tokens by those of always retrieving", tokens["ratio"], 1.0, False),
        ("new adapters: share of their own requests", newcomers and newcomers["own"]["share"], 0.95, True),
        ("new adapters: share of others' requests", newcomers and newcomers["others"]["share"], 0.02, False),
        ("tasks that have nothing here: routed less `prompt`", before and before["over_prompt"]["diff"], -0.01, True),
        ("strangers that no narrow arm got", strange["kept_out"]["share"], 0.95, True),
        ("own requests turned away", strange["turned_away"]["share"], 0.03, False),
        ("median of a decision, ms", time["ms"]["p50"], 5.0, False),
        ("queries that a search embedded again", time["embedded_by_search"], 0.0, False),
    ]
    return tuple(Goal(what, value, limit, at_least) for what, value, limit, at_least in found if value is not None)


def _told(one: Newcomer) -> JSON:
    own_share, others = _share(one.right, one.n), _share(one.wrong, one.others)
    return {"own": own_share, "to_its_corpus": one.corpus, "others": others}


def _share(hits: int, n: int) -> JSON:
    return (
        {"share": round(hits / n, 4), "ci95": wilson(hits, n), "n": n} if n else {"share": None, "ci95": None, "n": 0}
    )


def _shares(names: Sequence[str], kept: Sequence[bool]) -> JSON:
    found: dict[str, list[bool]] = {}
    for name, one in zip(names, kept, strict=True):
        found.setdefault(name, []).append(one)
    return {name: _share(sum(ones), len(ones)) for name, ones in found.items()}


def _spread(verdicts: Sequence[Verdict]) -> JSON | None:
    if not verdicts:
        return None
    p50, p95 = np.percentile([verdict.ms for verdict in verdicts], (50, 95))
    return {"p50": round(float(p50), 2), "p95": round(float(p95), 2)}


def _write(out: Path, result: Result) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result.wire())
    _draw(result.summary, result.rows, out.with_suffix(".png"))


def _draw(summary: Any, rows: Sequence[Any], path: Path) -> None:
    """Left the knob's curve beside the fixed choices; right each task's score beside its best arm and the oracle."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    curve, router = summary["knob"]["curve"], summary["router"]
    left.plot([point["tokens"] for point in curve], [point["score"] for point in curve], "o-")
    left.set_title("auto, by the knob", fontsize=10)
    for point in curve:
        left.annotate(f"{point['quality_cost']:g}", (point["tokens"], point["score"]), fontsize=8)
    single = router["best_single"]
    for name, score, side in (
        ("random", router["random"], "left"), (single["arm"], single["score"], "right"),
        ("best of each task", router["best_per_task"], "left"), ("oracle", router["oracle"], "right"),
    ):  # fmt: skip
        left.axhline(score, color="grey", linewidth=0.8, linestyle=":")
        place = (0.01 if side == "left" else 0.99, score)
        left.annotate(name, place, xycoords=("axes fraction", "data"), ha=side, va="bottom", fontsize=8)
    left.set_xlabel("tokens an answer")
    left.set_ylabel("score")
    for offset, key, colour in (
        (-0.3, "best_single", "C7"),
        (-0.1, "auto", "C0"),
        (0.1, "best", "C1"),
        (0.3, "oracle", "C2"),
    ):
        right.bar(np.arange(len(rows)) + offset, [row[key] for row in rows], 0.2, color=colour, label=key)
    right.set_xticks(range(len(rows)), [row["task"] for row in rows], rotation=40, ha="right", fontsize=8)
    right.legend(fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    figure.savefig(path, dpi=120)
