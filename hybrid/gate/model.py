"""The gate itself: shared weights over what each arm shows of a request, and a softmax over the arms.

A conditional logit (McFadden 1974): the utility of an arm is `weights[kind] · features(request, arm)`, and its
probability the softmax over all arms. The weights belong to kinds of arms, not to arms, so arms come and go without
retraining. Pure numpy.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from hybrid.gate.bandit import Bandit
from hybrid.gate.bank import PASSAGE_SAMPLE, Bank, Messages, sample
from hybrid.gate.features import COLUMNS, NEAREST, Corpus, Numbers, Search, Vectors
from hybrid.gate.glance import KNOWN, chances
from hybrid.gate.learned import Told
from hybrid.gate.lexicon import words
from hybrid.gate.logit import softmax
from hybrid.gate.noise import Pieces, believed, noise
from hybrid.gate.taught import TASK, Blend, Taught, task_owner
from hybrid.types.arm import PROMPT, Arm
from hybrid.types.passage import Passage

#: between which probabilities it is learned how sure the gate has to be of an arm
SURE = (0.4, 0.6)


@dataclass(frozen=True, eq=False, slots=True)
class Weights:
    """One weight a column of `features.COLUMNS`, by kind, and those of a glance. `sure` is how likely a well-known
    narrow arm must be to be taken, where no setting says so."""

    by_kind: Mapping[str, Numbers]
    sure: float = SURE[0]

    def utility(self, arm: Arm, features: Numbers) -> Numbers:
        """[rows] from [rows, columns]."""
        return features @ self.by_kind[kind(arm)]


#: Where training starts from and what it is drawn towards. Fitted once with the same loss over two dozen small homes of
#: zero to four adapters and zero to two corpora each, with people's own questions to the corpora, and with the requests
#: of everything that a home did not hold as its strangers.
DEFAULT = Weights(
    {
        "messages": np.array([-2.1, 1.1, 2.1, -1.3, 0.6, -0.4, 0.9, -1.3]),
        "passages": np.array([-2.6, -0.2, 0.1, 2.8, 1.2, 1.4, -4.6]),
        "general": np.array([1.1, 1.4]),
        "glance": np.array([-3.1, 2.5, 1.3, -1.6, 4.5]),
    }
)
assert all(len(DEFAULT.by_kind[k]) == len(columns) for k, columns in COLUMNS.items())  # noqa: S101


#: a smaller move of a score is none
_NOTHING = 0.005


def kind(arm: Arm) -> str:
    """Which weights an arm shares."""
    if arm == PROMPT:
        return "general"
    return "messages" if arm.adapter or arm.strategy == TASK else "passages"


@dataclass(frozen=True, slots=True)
class Scores:
    """What the gate says of one request: each arm's expected share of the best arm's score, 0 to 1.

    `stranger` is how much of `prompt`'s score comes from the request being nobody's (None: all of it). `costs` are
    expected ones where outcomes tell. `why` says in words what each arm showed; `neighbours` are the messages that
    lie nearest, those that were measured with the scores of their arms. `adjusted` is how far feedback moved a score;
    `sure` says by ("adapter" or "rag", name) how likely it must be to be taken. `glanced`: words alone told.
    """

    by_arm: Mapping[Arm, float]
    why: Mapping[Arm, str] = field(default_factory=dict)
    neighbours: Sequence[Mapping[str, Any]] = ()
    stranger: float | None = None
    costs: Mapping[Arm, float] = field(default_factory=dict)
    adjusted: Mapping[Arm, float] = field(default_factory=dict)
    sure: Mapping[tuple[str, str], float] = field(default_factory=dict)
    glanced: bool = False

    def needed(self, arm: Arm) -> float:
        """How likely an arm must be to be taken, by what it answers with."""
        parts = [(strategy if strategy == "rag" else "adapter", name) for strategy, name in arm.parts]
        return min((self.sure[part] for part in parts if part in self.sure), default=SURE[0])

    def moved(self, by: Mapping[str, float]) -> Scores:
        """The scores moved by what feedback says of arms, within 0 to 1; the reasons tell of it."""
        moves = {arm: by[str(arm)] for arm in self.by_arm if abs(by.get(str(arm), 0.0)) >= _NOTHING}
        scores = {arm: min(max(score + moves.get(arm, 0.0), 0.0), 1.0) for arm, score in self.by_arm.items()}
        why = {arm: f"{self.why.get(arm, 'it scores best')}; feedback moved it by {m:+.2f}" for arm, m in moves.items()}
        return replace(self, by_arm=scores, why={**self.why, **why}, adjusted=moves)

    @property
    def confidence(self) -> float:
        return max(self.by_arm.values(), default=0.0)

    @classmethod
    def only(cls, arms: Iterable[Arm]) -> Scores:
        """The scores where there is nothing to choose between."""
        arms = list(arms)
        return cls({arm: 1 / len(arms) for arm in arms}, dict.fromkeys(arms, "no adapter or corpus is enrolled yet"))


#: the column that says how near an adapter's messages are, times four
_MEAN5 = COLUMNS["messages"].index("mean5")


class Gate:
    """Arms and weights. Enrolling and scoring may happen in different threads: a score uses one bank throughout.

    `pieces` counts the word pieces of the embedder, by which noise is known; without it nothing is taken for noise.
    """

    def __init__(self, weights: Weights = DEFAULT, pieces: Pieces | None = None) -> None:
        self.weights = weights
        self.pieces = pieces
        self.taught: Taught | None = None
        self.bandit: Bandit | None = None
        self.bank = Bank.of({PROMPT: Messages()}, {}, Messages())
        self._lock = threading.Lock()

    def enrol_general(self, texts: Sequence[str], vectors: Vectors) -> None:
        """Teaches what general requests look like, the prototypes of `prompt`: texts and their unit vectors [n, d]."""
        self._change({PROMPT: Messages.of(texts, vectors)})

    def enrol_outside(self, texts: Sequence[str], vectors: Vectors) -> None:
        """Gives training requests of many trades that belong to no arm: texts and their unit vectors [n, d]."""
        with self._lock:
            self.bank = Bank.of(self.bank.messages, self.bank.corpora, Messages.of(texts, vectors))

    def enrol_adapter(
        self,
        name: str,
        texts: Sequence[str],
        vectors: Vectors,
        bare: Vectors | None = None,
        *,
        corpus: str | None = None,
    ) -> Arm:
        """Makes an adapter routable by its training messages. Returns its arm.

        `texts` are the full messages, `vectors` [n, d] their unit vectors, `bare` [m, d] those of the inputs without
        the instruction. An adapter that was trained with passages names its `corpus`.
        """
        arm = Arm("adapter+rag", (name, corpus)) if corpus else Arm("adapter", (name,))
        views = (vectors,) if bare is None else (vectors, bare)
        self._change({arm: Messages.of(texts, *views)})
        return arm

    def enrol_task(self, name: str, texts: Sequence[str], vectors: Vectors) -> Arm:
        """Makes the requests of a measured task known, with their unit vectors [n, d]. Returns their owner, no arm."""
        owner = task_owner(name)
        self._change({owner: Messages.of(texts, vectors)})
        return owner

    def enrol_corpus(
        self, name: str, passages: Sequence[Passage], vectors: Vectors, search: Search | None = None
    ) -> Arm:
        """Makes a corpus routable. Returns its arm.

        `passages` and their unit `vectors` [n, d] may be a sample; `search(vector, k)` asks all of the corpus, and
        without it the sample is what is searched.
        """
        arm = Arm("rag", (name,))
        kept = sample(len(passages), PASSAGE_SAMPLE)
        rows = np.ascontiguousarray(vectors[kept], dtype=np.float32)
        self._change(corpora={arm: Corpus.of([passages[i] for i in kept], rows, search)})
        return arm

    def forget(self, arm: Arm) -> None:
        """Takes an arm away; one that is not enrolled is no error. `prompt` stays, its prototypes go."""
        with self._lock:
            messages = {a: m for a, m in self.bank.messages.items() if a != arm}
            corpora = {a: c for a, c in self.bank.corpora.items() if a != arm}
            self.bank = Bank.of(messages, corpora, self.bank.outside)

    def arms(self) -> tuple[Arm, ...]:
        """Every arm that can be chosen; `prompt` is always one."""
        own = (a for a in (*self.bank.messages, *self.bank.corpora) if a.strategy != TASK)
        return tuple(dict.fromkeys((PROMPT, *own, *(self.taught.served if self.taught else ()))))

    def glance(self, query: str, least: float) -> tuple[Arm, Scores] | None:
        """Whose a request is by its words alone, with the scores that follow; None where that is less likely than
        `least` (0 to 1), its arm is little known, or outcomes want to see more of a request than its task."""
        bank, weights, taught = self.bank, self.weights, self.taught
        owners = chances(bank, query, weights.by_kind["glance"])
        owner = max(owners, key=lambda arm: owners[arm])
        if owner == PROMPT or owners[owner] < least or bank.known["adapter", owner.args[0]] < KNOWN:
            return None
        owners |= dict.fromkeys(bank.corpora, 0.0)
        why = {owner: f"the words are those of {owner.args[0]}, {owners[owner]:.3f} sure at a glance"}
        sure = self._sure(bank, weights)
        if taught is None:
            return owner, Scores(owners, why, sure=sure, glanced=True)
        if (heard := taught.of_owner(owner)) is None:
            return None
        blend = taught.blend(owners, heard)
        told = {arm: f"{text}; {why[owner]}" for arm, text in _expectations(blend).items()}
        return owner, Scores(blend.shares, told, (), blend.stranger, blend.costs, sure=sure, glanced=True)

    def score(self, query: str, vector: Vectors, retrieved: Mapping[str, Sequence[Passage]] | None = None) -> Scores:
        """Scores every arm for one request with its unit vector [d].

        `retrieved` holds the best passages by corpus where they were searched already; the others are searched here.
        """
        bank, weights, taught = self.bank, self.weights, self.taught
        given = retrieved or {}
        found = {
            arm: given[arm.args[0]] if arm.args[0] in given else corpus.retrieve(vector)
            for arm, corpus in bank.corpora.items()
        }
        cosines = bank.similarities(vector[None, :])
        features = bank.features([query], cosines, {arm: [p] for arm, p in found.items()})
        utilities = np.array([weights.utility(arm, x)[0] for arm, x in features.items()])
        owners = dict(zip(features, softmax(utilities).tolist(), strict=True))
        why = _reasons(bank, features, found)
        if amount := self._noise(bank, query, found):
            owners = _quietened(owners, bank, amount)
            why[PROMPT] = f"nothing here knows its words, and {amount:.0%} of it looks like noise"
        near = tuple(
            {"arm": str(arm), "text": text, "similarity": round(cosine, 4)}
            for arm, text, cosine in bank.neighbours(cosines[0], NEAREST)
        )
        sure = self._sure(bank, weights)
        if taught is None:
            return Scores(owners, why, near, sure=sure)
        heard = taught.look(query, vector, owners)
        blend = taught.blend(owners, heard)
        reasons = {**why, **_expectations(blend)}
        told = (*_measured(heard), *near)
        return Scores(blend.shares, reasons, told, blend.stranger, blend.costs, sure=sure)

    @staticmethod
    def _sure(bank: Bank, weights: Weights) -> dict[tuple[str, str], float]:
        return {part: SURE[0] + (weights.sure - SURE[0]) * known for part, known in bank.known.items()}

    def _noise(self, bank: Bank, query: str, found: Mapping[Arm, Sequence[Passage]]) -> float:
        """How much of a request is noise, 0 to 1, to all that is enrolled and to the passages found for it."""
        if self.pieces is None:
            return 0.0
        amount = noise(query, bank.knows, self.pieces)
        if not amount:
            return 0.0
        shown = set[str]().union(*(words(f"{p.title} {p.text}") for passages in found.values() for p in passages))
        return noise(query, lambda stem: stem in shown or bank.knows(stem), self.pieces)

    def _change(
        self, messages: Mapping[Arm, Messages] | None = None, corpora: Mapping[Arm, Corpus] | None = None
    ) -> None:
        with self._lock:
            old = self.bank
            self.bank = Bank.of({**old.messages, **(messages or {})}, {**old.corpora, **(corpora or {})}, old.outside)


def _quietened(owners: Mapping[Arm, float], bank: Bank, amount: float) -> dict[Arm, float]:
    """The owners' probabilities where so much of a request is noise: what they lose is nobody's, and so `prompt`'s."""
    usual = {arm: messages.noise for arm, messages in bank.messages.items()}
    kept = {arm: chance * believed(amount, usual.get(arm, 0.0)) for arm, chance in owners.items() if arm != PROMPT}
    return {**owners, **kept, PROMPT: 1 - sum(kept.values())}


def _reasons(bank: Bank, features: Mapping[Arm, Numbers], found: Mapping[Arm, Sequence[Passage]]) -> dict[Arm, str]:
    out = {PROMPT: "nothing that was trained or indexed is nearer than general requests"}
    for arm, messages in bank.messages.items():
        if arm.strategy not in (PROMPT.strategy, TASK) and messages.views:
            count = min(NEAREST, len(messages.views[0].vectors))
            near = features[arm][0, _MEAN5] / 4
            out[arm] = f"nearest to {count} training messages of {arm.adapter}, similarity {near:.2f}"
    for arm, passages in found.items():
        title = (passages[0].title or passages[0].id) if passages else ""
        best = f"“{title}”, similarity {passages[0].score:.2f}" if passages else "none"
        out[arm] = f"best passage of {arm.args[0]}: {best}"
    return out


def _expectations(blend: Blend) -> dict[Arm, str]:
    """What outcomes promise of each arm, in words."""
    if blend.expected is None:
        return {}
    return {arm: f"outcomes on requests like this promise {arm} {score:.2f}" for arm, score in blend.expected.items()}


def _measured(told: Told) -> list[Mapping[str, Any]]:
    """The measured requests nearest to this one, with what each arm scored there."""
    return [
        {"text": text, "similarity": round(similarity, 4), "scores": dict(scores)}
        for text, similarity, scores in told.nearest
    ]
