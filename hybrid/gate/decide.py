"""From a request to a decision: glance at its words, embed it once where they leave a doubt, score every arm, let the
policy choose, within the deadline.

Whatever goes wrong here costs quality, never the answer: the default arm is taken and the decision says why.
"""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from hybrid.errors import HybridError
from hybrid.gate.conversations import Conversations
from hybrid.gate.features import PASSAGES, Vectors
from hybrid.gate.model import Gate, Scores
from hybrid.gate.policy import Choice, Policy
from hybrid.gate.turns import Turns
from hybrid.knowledge.search import Library
from hybrid.settings import GateSettings
from hybrid.types.arm import PROMPT, Arm
from hybrid.types.decision import Decision
from hybrid.types.passage import Passage
from hybrid.types.request import Request
from hybrid.types.rights import Rights

log = logging.getLogger("hybrid.gate")


class Decider:
    """`gate` gives numbers, `policy` rules. `library` embeds the query and scores the corpora with the same vector."""

    def __init__(self, gate: Gate, policy: Policy, library: Library, settings: GateSettings) -> None:
        self.gate = gate
        self._policy = policy
        self._library = library
        self._settings = settings
        self._turns = Turns(settings.deadline_ms / 1000)
        self._conversations = Conversations()

    async def decide(self, request: Request, *, whole: bool = False) -> Decision:
        """The decision for `model="auto"`: a gate that fails or is late falls back to the default arm.

        With `whole` every arm's own score is wanted, not only the best one, and a glance is not enough. Raises
        BadRequest when the request allows none of the arms there are.
        """
        began = time.perf_counter()
        try:
            scores, choice = await self._chosen(request, self._score if whole else self._looked)
            if scores.glanced and (choice.fallback or choice.arm.confers):
                scores, choice = await self._chosen(request, self._score)
        except HybridError:
            raise  # the request's own fault, and said in words
        except TimeoutError:
            late = f"the gate took longer than {self._settings.deadline_ms:g} ms"
            return self._default("deadline", late, began, request.rights)
        except Exception as error:
            # the gate is learned and fed by users' artefacts: no failure of it may cost an answer
            log.exception("the gate failed; the default arm answers")
            return self._default("error", f"the gate failed ({type(error).__name__})", began, request.rights)
        self._conversations.keep(request, choice.arm)
        return Decision(
            id=new_id(),
            arm=choice.arm,
            scores={str(arm): round(float(score), 4) for arm, score in scores.by_arm.items()},
            confidence=round(float(choice.confidence), 4),
            reason=choice.reason,
            fallback=choice.fallback,
            route_ms=_since(began),
            neighbours=tuple(scores.neighbours),
            vector=self._kept(request.query),
            first=choice.first,
            propensity=choice.propensity,
            adjusted={str(arm): round(moved, 4) for arm, moved in scores.adjusted.items()},
            gate=self.gate.taught.version if self.gate.taught else None,
        )

    async def _chosen(self, request: Request, look: Callable[[Request], Scores]) -> tuple[Scores, Choice]:
        """The scores that the caller may know, and what the rules choose by them."""
        scores = permitted(await self._turns.run(partial(look, request)), request.rights)
        if any(not math.isfinite(score) for score in scores.by_arm.values()):
            raise ValueError("the gate gave a score that is not a number")
        kept = self._conversations.arm(request)
        return scores, self._policy.choose(scores, allowed=request.rights.may, knobs=request.knobs, kept=kept)

    def _looked(self, request: Request) -> Scores:
        """The scores by a glance where that tells whose the request is, else by all of it. Feedback moves scores by
        what was asked, and limits may leave its owner out: then all of it is looked at."""
        least, knobs = self._settings.glance_above, request.knobs
        free = knobs.arms is None and knobs.corpus is None and self.gate.bandit is None
        found = self.gate.glance(request.query, least) if free and least < 1 else None
        if found is None or not request.rights.may(found[0]):
            return self._score(request)
        if not knobs.explain:
            return found[1]
        return replace(found[1], neighbours=self._score(request).neighbours)  # who asks why sees what lies nearest

    def _score(self, request: Request) -> Scores:
        arms = self.gate.arms()
        if len(arms) <= 1:  # nothing to choose between: nothing to compute
            return Scores.only(arms)
        vector = self._library.embedder.embed_query(request.query)
        found = None if request.rights.admin else self._found(arms, vector, request.rights)
        scores, bandit = self.gate.score(request.query, vector, found), self.gate.bandit
        return scores.moved(bandit.adjust(vector, self._settings.adjust_within)) if bandit else scores

    def _found(self, arms: Sequence[Arm], vector: Vectors, rights: Rights) -> dict[str, Sequence[Passage]]:
        """The best passages by corpus that the caller may see: a corpus is not judged by what is hidden in it."""
        named = [arm.corpus for arm in arms if arm.strategy == "rag" and arm.corpus]
        return {
            name: self._library.search(name, vector, PASSAGES, rights=rights) if rights.sees(name) else ()
            for name in named
        }

    def _kept(self, query: str) -> Callable[[], bytes] | None:
        """Makes the query's vector as it is logged, behind the answer: a glance needs none."""
        if not self._settings.log_vectors or len(self.gate.arms()) <= 1:
            return None
        return lambda: self._library.embedder.embed_query(query).astype(np.float16).tobytes()

    def _default(self, fallback: str, reason: str, began: float, rights: Rights) -> Decision:
        usual = Arm.parse(self._settings.default_arm)
        return Decision(
            id=new_id(),
            arm=usual if rights.may(usual) else PROMPT,
            confidence=0.0,
            reason=f"{reason}, so the default arm answers",
            chosen_by="fallback",
            fallback=fallback,
            route_ms=_since(began),
        )


def permitted(scores: Scores, rights: Rights) -> Scores:
    """What a caller may know of the scores: the arms that are not theirs are not there."""
    if rights.admin or not (rights.hidden or rights.arms is not None):
        return scores
    ours = {arm: score for arm, score in scores.by_arm.items() if rights.may(arm)}
    named = set(map(str, ours))
    near = [neighbour for neighbour in scores.neighbours if neighbour.get("arm") in named]
    moved = {arm: by for arm, by in scores.adjusted.items() if arm in ours}
    return replace(scores, by_arm=ours, neighbours=near, adjusted=moved)


def new_id() -> str:
    """A new decision id."""
    return f"dec_{uuid.uuid4().hex}"


def _since(began: float) -> float:
    return round((time.perf_counter() - began) * 1000, 2)
