"""The material of every enrolled arm, laid out so that one matrix product compares a request with all of it.

A bank never changes: enrolling makes a new one, so a request that is being scored keeps the one it began with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid.gate.features import (
    Corpus,
    Numbers,
    Vectors,
    View,
    fitting,
    form_features,
    general_features,
    message_features,
    passage_features,
)
from hybrid.gate.lexicon import Lexicon, Wording, look, template
from hybrid.gate.noise import own_noise
from hybrid.types.arm import PROMPT, Arm
from hybrid.types.passage import Passage

#: prototypes kept of one view of one arm: a seeded sample, enough for the neighbours, small enough for a millisecond
PROTOTYPES = 600
#: rows that make an arm known by two thirds; a few dozen say little of how else its requests may be worded
_WELL_KNOWN = 150
#: passages kept of one corpus, for training and for corpora that bring no search of their own
PASSAGE_SAMPLE = 4000


@dataclass(frozen=True, eq=False, slots=True)
class Messages:
    """Messages an arm was trained on, as views of the same `texts`: row i of every view is text i.

    A view of another length stands beside them without texts. `noise` is what is usual in them (0 to 1).
    """

    texts: tuple[str, ...] = ()
    views: tuple[View, ...] = ()
    lexicon: Lexicon = field(default_factory=Lexicon)
    noise: float = 0.0

    @classmethod
    def of(cls, texts: Sequence[str], *views: Vectors) -> Messages:
        """A seeded sample of at most `PROTOTYPES` rows of each view [n, d]; empty views are left out."""
        usable = [np.ascontiguousarray(v, dtype=np.float32) for v in views if len(v)]
        kept = [sample(len(v), PROTOTYPES) for v in usable]
        rows = kept[0].tolist() if kept else []
        return cls(
            tuple(texts[i] for i in rows) if usable and len(texts) == len(usable[0]) else (),
            tuple(View.of(v[rows_of]) for v, rows_of in zip(usable, kept, strict=True)),
            Lexicon.of(texts),
            own_noise([texts[i] for i in rows if i < len(texts)]),
        )

    def text(self, view: int, row: int) -> str:
        """The message of a row, or nothing where it is not known."""
        same = len(self.texts) == len(self.views[view].vectors)
        return self.texts[row] if same else ""


def sample(n: int, most: int) -> np.ndarray[Any, np.dtype[np.intp]]:
    """Which `most` of `n` rows are kept: always the same ones, in order."""
    return np.sort(np.random.default_rng(0).permutation(n)[:most])


@dataclass(frozen=True, slots=True)
class Own:
    """Says that a request is row `row` of view `view` of an arm's messages, so that it is not its own neighbour."""

    arm: Arm
    view: int
    row: int


@dataclass(frozen=True, eq=False)
class Bank:
    """Everything enrolled. `stack` [N, d] holds all views one below another; `spans` says which rows are whose.

    `outside` are requests that belong to no arm: they teach, and are never neighbours.
    """

    messages: Mapping[Arm, Messages] = field(default_factory=dict)
    corpora: Mapping[Arm, Corpus] = field(default_factory=dict)
    stack: Vectors = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    spans: Mapping[tuple[Arm, int], slice] = field(default_factory=dict)
    outside: Messages = field(default_factory=Messages)

    @classmethod
    def of(cls, messages: Mapping[Arm, Messages], corpora: Mapping[Arm, Corpus], outside: Messages) -> Bank:
        """Lays the material out, each arm measured against general requests and those from `outside`."""
        far = [v.vectors for m in (messages.get(PROMPT, outside), outside) for v in m.views]
        strangers = np.concatenate(far) if far else None
        measured = {arm: m if arm == PROMPT else _against(m, strangers) for arm, m in messages.items()}
        keys = [(arm, i) for arm, m in measured.items() for i in range(len(m.views))]
        blocks = [measured[arm].views[i].vectors for arm, i in keys]
        ends = np.cumsum([0, *(len(b) for b in blocks)]).tolist()
        spans = {key: slice(*pair) for key, pair in zip(keys, pairwise(ends), strict=True)}
        stack = np.concatenate(blocks) if blocks else np.zeros((0, 0), np.float32)
        return cls(measured, {arm: c.against(strangers) for arm, c in corpora.items()}, stack, spans, outside)

    @cached_property
    def _spoken(self) -> Wording:
        """The words of every arm that has messages, made when a request first asks: a bank is often replaced before."""
        named = [self.messages[arm].lexicon for arm in self.narrow]
        return Wording.of(named, self.messages[PROMPT].lexicon if PROMPT in self.messages else Lexicon())

    @cached_property
    def known(self) -> Mapping[tuple[str, str], float]:
        """By ("adapter" or "rag", name) how well messages or passages make it known, 0 to 1; tasks are as adapters."""
        views = {arm: self.messages[arm].views for arm in self.narrow}
        counts = {("adapter", arm.args[0]): max(len(view.vectors) for view in own) for arm, own in views.items()}
        counts |= {("rag", arm.args[0]): len(corpus.passages) for arm, corpus in self.corpora.items()}
        return {part: 1 - math.exp(-((count / _WELL_KNOWN) ** 2)) for part, count in counts.items()}

    @cached_property
    def narrow(self) -> tuple[Arm, ...]:
        """The arms that are known by messages of their own, tasks included."""
        return tuple(arm for arm, m in self.messages.items() if arm != PROMPT and m.views)

    @cached_property
    def _templates(self) -> list[Mapping[str, float]]:
        return [self.messages[arm].lexicon.templates for arm in self.narrow]

    def knows(self, stem: str) -> bool:
        """Whether anything that is enrolled, or any general request, holds a word of this stem."""
        general = self.messages[PROMPT].lexicon.counts if PROMPT in self.messages else {}
        if stem in self._spoken.places or stem in general or stem in self.outside.lexicon.counts:
            return True
        return any(stem in corpus.rarity for corpus in self.corpora.values())

    def similarities(self, vectors: Vectors, own: Sequence[Own | None] = ()) -> Vectors:
        """Cosines [rows, N] of unit vectors [rows, d] with all messages; a request and itself are -inf apart."""
        if not len(self.stack):
            return np.zeros((len(vectors), 0), np.float32)
        # BLAS would split one row's small product over threads, and wait for cores that the engine is using
        one = len(vectors) == 1
        cosines = np.einsum("nd,d->n", self.stack, vectors[0])[None, :] if one else vectors @ self.stack.T
        for row, mine in enumerate(own):
            if mine is None:
                continue
            views = self.messages[mine.arm].views
            for i, view in enumerate(views):
                if i == mine.view or len(view.vectors) == len(views[mine.view].vectors):
                    cosines[row, self.spans[mine.arm, i].start + mine.row] = -np.inf
        return cosines

    def features(
        self,
        queries: Sequence[str],
        cosines: Vectors,
        found: Mapping[Arm, Sequence[Sequence[Passage]]],
        own: Sequence[Own | None] = (),
    ) -> dict[Arm, Numbers]:
        """What each arm shows of each request: [rows, columns of its kind]. `found[corpus][row]` are passages."""
        form = form_features(queries)
        out: dict[Arm, Numbers] = {PROMPT: general_features(self._of(PROMPT, cosines))}
        if self.narrow:
            views, spans, places = self._views
            near = fitting(message_features(views, [cosines[:, span] for span in spans]), places)
            bias = np.ones((len(queries), len(self.narrow), 1))
            told = np.concatenate([bias, near, self._worded(queries, own)], axis=2)
            out |= {arm: told[:, i] for i, arm in enumerate(self.narrow)}
        for arm, corpus in self.corpora.items():
            rows = zip(queries, form, found[arm], strict=True)
            out[arm] = np.stack([passage_features(corpus, q, f, p) for q, f, p in rows])
        return out

    @cached_property
    def _views(self) -> tuple[list[View], list[slice], npt.NDArray[np.intp]]:
        """The views of the narrow arms with their spans, and by arm the places of its own among them [arms, most]."""
        keys = [key for key in self.spans if key[0] != PROMPT]
        own = [[place for place, (arm, _) in enumerate(keys) if arm == narrow] for narrow in self.narrow]
        most = max(map(len, own))
        views = [self.messages[arm].views[view] for arm, view in keys]
        places = np.array([mine + mine[:1] * (most - len(mine)) for mine in own], dtype=np.intp)
        return views, [self.spans[key] for key in keys], places

    def glance(self, queries: Sequence[str], own: Sequence[Own | None] = ()) -> Numbers:
        """What the words alone of each request show of each narrow arm: [rows, arms, columns of "glance"]."""
        worded = self._worded(queries, own)
        shares = [[t.get(begun, 0.0) for t in self._templates] for begun in map(template, queries)]
        told = np.array(shares).reshape(*worded.shape[:2], 1)
        return np.concatenate([np.ones_like(told), worded, told], axis=2)

    def _worded(self, queries: Sequence[str], own: Sequence[Own | None]) -> Numbers:
        """[rows, arms, 3]: how the words of each request lean to each narrow arm, its phrases, and its length. An arm's
        own messages are asked without their own words."""
        asked = [look(query) for query in queries]
        lexicons = [self.messages[arm].lexicon for arm in self.narrow]
        out = np.empty((len(queries), len(lexicons), 3))
        out[:, :, :2] = np.stack([self._spoken.familiarity(words) for words in asked])
        out[:, :, 2] = [[lexicon.oddity(words) for lexicon in lexicons] for words in asked]
        general = self.messages[PROMPT].lexicon if PROMPT in self.messages else Lexicon()
        for row, mine in enumerate(own):
            if mine is not None and mine.arm in self.narrow:
                place = self.narrow.index(mine.arm)
                out[row, place, :2] = lexicons[place].familiarity(asked[row], general, own=True)
        return out

    def _of(self, arm: Arm, cosines: Vectors) -> Vectors:
        span = self.spans.get((arm, 0))
        return cosines[:, span] if span is not None else cosines[:, :0]

    def neighbours(self, cosines: Vectors, k: int) -> list[tuple[Arm, str, float]]:
        """The messages nearest to one request, from its cosines [N]: (arm, text, cosine), best first."""
        if not len(cosines):
            return []
        twice = min(2 * k, len(cosines))  # the two views of one message are one neighbour
        best = np.argpartition(-cosines, twice - 1)[:twice]
        out: dict[tuple[Arm, str], float] = {}
        for row in best[np.argsort(-cosines[best], kind="stable")]:
            arm, view = next(key for key, span in self.spans.items() if span.start <= row < span.stop)
            text = self.messages[arm].text(view, int(row) - self.spans[arm, view].start)
            if text:
                out.setdefault((arm, text), float(cosines[row]))
        return [(arm, text, cosine) for (arm, text), cosine in out.items()][:k]


def _against(messages: Messages, strangers: Vectors | None) -> Messages:
    return replace(messages, views=tuple(view.against(strangers) for view in messages.views))
