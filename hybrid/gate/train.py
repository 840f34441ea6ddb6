"""Trains the gate's shared weights from the arms' own material, with no labels but whose material it is.

Rows are an arm's own messages (each left out of its own neighbours), general requests, and for a corpus questions
made out of its passages. Each row is also shown with its owner taken away, and then belongs to `prompt`: that is how
the gate learns what a stranger looks like. A penalised conditional logit (`logit.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from hybrid.gate.bank import Bank, Own, sample
from hybrid.gate.features import COLUMNS, Corpus, Embed, Numbers, Vectors
from hybrid.gate.glance import Said, learn
from hybrid.gate.lexicon import bare_input, tokens
from hybrid.gate.logit import Labels, fitted, softmax
from hybrid.gate.model import DEFAULT, SURE, Weights, kind
from hybrid.types.arm import PROMPT, Arm
from hybrid.types.passage import Passage

#: kinds whose arms are alternatives of one choice
KINDS = ("messages", "passages", "general")
#: rows made in all, shared out among the arms
_ROWS = 1200
#: how strongly weights are drawn towards the defaults, in rows: messages are what will be asked, while questions made
#: out of passages only resemble it
_PENALTY = {"messages": 5.0, "passages": 300.0, "general": 30.0}
#: a row whose owner is taken away is a stranger only while no other arm shows more than this of it (a probability under
#: the defaults): two arms of one subject must not be taught to refuse each other's questions
_KINDRED = 0.5
#: so many of the arms' own messages may be less likely than is asked of a narrow arm
_TURNED_AWAY = 0.03
_OPENINGS = ("who {}?", "what is {}?", "when did {}?", "how does {}?", "{}?", "{}", "{}", "tell me about {}", "{}")
_PREFIXES = ("Answer briefly.\n\n", "Answer the question.\n\n", "Reply with a short phrase.\n\n")
_TITLED, _PREFIXED, _FOREIGN = 0.5, 0.3, 0.3
#: people put things in their own words: this share of the overlap of a made question is sure, the rest is chance
_PARAPHRASED = 0.3
_SENTENCE = re.compile(r"(?<=[.!?。])\s+")
_TOKEN = re.compile(r"\w[\w'’-]*")


@dataclass(frozen=True, slots=True)
class Row:
    """One self-made example: a request, its vector [d], the arm it belongs to and, for messages, which one it is."""

    query: str
    vector: Vectors
    arm: Arm
    own: Own | None = None


def train_gate(bank: Bank, embed: Embed) -> Weights:
    """Weights fitted to what is enrolled; the defaults where there is nothing to tell apart.

    `embed` gives unit vectors [n, d] for the questions made from passages. The same bank gives the same weights.
    """
    rows = list(_rows(bank, embed))
    if len({row.arm for row in rows}) < 2:
        return DEFAULT
    features = _features(bank, rows)
    label = np.array([list(features).index(row.arm) for row in rows])
    ours = np.array([row.arm == PROMPT and row.own is None for row in rows])
    kept = ~(ours & _kindred(features, np.full(len(rows), -1)))
    by_kind = _fitted(*_with_orphans({arm: x[kept] for arm, x in features.items()}, label[kept]))
    said = [Said(row.query, row.arm if row.own else PROMPT, row.own) for row in rows]
    weights = Weights({**by_kind, "glance": learn(bank, said, DEFAULT.by_kind["glance"])})
    own = np.array([row.arm != PROMPT and row.own is not None for row in rows])
    return replace(weights, sure=_sure(weights, {arm: x[own] for arm, x in features.items()}))


def _sure(weights: Weights, features: Mapping[Arm, Numbers]) -> float:
    """The highest probability that may be asked of a narrow arm, within `SURE`, for all but a few of the arms' own
    messages to reach it."""
    chance = softmax(np.column_stack([weights.utility(arm, x) for arm, x in features.items()]))
    narrow = np.delete(chance, list(features).index(PROMPT), axis=1).max(axis=1)
    return float(np.clip(np.quantile(narrow, _TURNED_AWAY), *SURE)) if len(narrow) else SURE[0]


def _with_orphans(
    features: dict[Arm, Numbers], label: Labels
) -> tuple[dict[Arm, Numbers], npt.NDArray[np.bool_], Labels]:
    """Adds each arm's rows once more without that arm to choose: features, open choices [rows, arms], labels."""
    prompt = list(features).index(PROMPT)
    orphans = np.flatnonzero((label != prompt) & ~_kindred(features, np.where(label == prompt, -1, label)))
    open_ = np.ones((len(label) + len(orphans), len(features)), dtype=bool)
    open_[np.arange(len(label), len(open_)), label[orphans]] = False
    more = {arm: np.concatenate([x, x[orphans]]) for arm, x in features.items()}
    return more, open_, np.concatenate([label, np.full(len(orphans), prompt)])


def pseudo_questions(corpus: Corpus, n: int, seed: int = 0) -> list[tuple[str, Passage]]:
    """`n` questions made from passages: some of the rarer words of a sentence, often with the title."""
    rng = np.random.default_rng(seed)
    passages = [p for p in corpus.passages if len(_TOKEN.findall(p.text)) > 3]
    if not passages:
        return []
    chosen = [passages[i] for i in rng.integers(len(passages), size=n)]
    return [(_question(corpus, passage, rng), passage) for passage in chosen]


def _question(corpus: Corpus, passage: Passage, rng: np.random.Generator) -> str:
    """Words of one sentence, and words of elsewhere: who asks does not know how the answer is put."""
    spoken = _sentence(passage, rng)
    rare = np.array([corpus.rarity.get(tokens(t)[0], 1.0) for t in spoken]) + 0.1
    many = min(int(rng.integers(3, 9)), len(spoken))
    picked = rng.choice(len(spoken), size=many, replace=False, p=rare / rare.sum())
    chosen = [spoken[i] for i in np.sort(picked)]
    for _ in range(round(_FOREIGN * many)):
        elsewhere = _sentence(corpus.passages[rng.integers(len(corpus.passages))], rng)
        chosen.insert(int(rng.integers(len(chosen) + 1)), elsewhere[rng.integers(len(elsewhere))])
    text = " ".join(chosen).lower()
    if passage.title and rng.random() < _TITLED:
        text = f"{text} {passage.title}"
    text = _OPENINGS[rng.integers(len(_OPENINGS))].format(text)
    return (_PREFIXES[rng.integers(len(_PREFIXES))] if rng.random() < _PREFIXED else "") + text


def _sentence(passage: Passage, rng: np.random.Generator) -> list[str]:
    """The words of one sentence of a passage, or of its title where it has none."""
    split = [_TOKEN.findall(s)[:40] for s in _SENTENCE.split(passage.text)]
    split = [s for s in split if len(s) > 3] or [_TOKEN.findall(f"{passage.text} {passage.title}")[:40] or ["?"]]
    return split[rng.integers(len(split))]


def _asked(corpus: Corpus, n: int, embed: Embed) -> Iterator[tuple[str, Vectors]]:
    """Pseudo-questions with their vectors; those that do not find their own passage are no questions to it
    (round-trip consistency, Alberti et al. 2019, arXiv 1906.05416)."""
    made = pseudo_questions(corpus, n)
    vectors = embed([question for question, _ in made]) if made else ()
    for (question, passage), vector in zip(made, vectors, strict=True):
        if any(p.id == passage.id for p in corpus.nearest(vector @ corpus.vectors.T)):
            yield question, vector


def _rows(bank: Bank, embed: Embed) -> Iterator[Row]:
    each = max(40, _ROWS // max(1, len(bank.messages) + len(bank.corpora)))
    for arm, messages in bank.messages.items():
        for v, view in enumerate(messages.views):
            for i in sample(len(view.vectors), each // (1 if arm == PROMPT else len(messages.views))):
                text = messages.text(v, int(i))
                yield Row(bare_input(text) if v else text, view.vectors[i], arm, Own(arm, v, int(i)))
    for view in bank.outside.views:
        yield from (Row(q, v, PROMPT) for q, v in zip(bank.outside.texts, view.vectors, strict=True))
    for arm, corpus in bank.corpora.items():
        yield from (Row(question, vector, arm) for question, vector in _asked(corpus, each, embed))


def _features(bank: Bank, rows: Sequence[Row]) -> dict[Arm, Numbers]:
    vectors = np.stack([row.vector for row in rows])
    found = {
        arm: [corpus.nearest(cosines) for cosines in vectors @ corpus.vectors.T] for arm, corpus in bank.corpora.items()
    }
    own = [row.own for row in rows]
    features = bank.features([row.query for row in rows], bank.similarities(vectors, own), found, own)
    overlap = COLUMNS["passages"].index("overlap")
    shares = np.random.default_rng(0).uniform(_PARAPHRASED, 1.0, len(rows))
    for arm in bank.corpora:
        mine = [row.arm == arm for row in rows]
        features[arm][mine, overlap] *= shares[mine]
    return features


def _kindred(features: Mapping[Arm, Numbers], owner: Labels) -> npt.NDArray[np.bool_]:
    """[rows]: whether another arm than the owner (-1: nobody) looks like a request's own to the defaults."""
    utility = np.column_stack([DEFAULT.utility(arm, x) for arm, x in features.items()])
    owned = np.flatnonzero(owner >= 0)
    utility[owned, owner[owned]] = -np.inf
    return softmax(utility)[:, list(features).index(PROMPT)] < _KINDRED


def _fitted(features: Mapping[Arm, Numbers], open_: npt.NDArray[np.bool_], label: Labels) -> dict[str, Numbers]:
    """By kind, the weights that make the labels likeliest. `open_` [rows, arms] says which arms a row may choose."""
    start = np.concatenate([DEFAULT.by_kind[k] for k in KINDS])
    penalty = np.concatenate([np.full(len(COLUMNS[k]), _PENALTY[k]) for k in KINDS])
    design = np.zeros((*open_.shape, len(start)))
    offsets = dict(zip(KINDS, np.cumsum([0, *(len(COLUMNS[k]) for k in KINDS)]), strict=False))
    for a, (arm, x) in enumerate(features.items()):
        first = offsets[kind(arm)]
        design[:, a, first : first + x.shape[1]] = x
    theta = fitted(design, open_, label, start, penalty)
    return {k: theta[offsets[k] : offsets[k] + len(COLUMNS[k])] for k in KINDS}
