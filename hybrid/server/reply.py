"""One answer on its way to an HTTP client: the fold of its events into headers, a body, or server-sent events.

Nothing is sent before the first token is there, so that whatever fails until then is a plain error with its status.
After it the engine's own bytes go out unparsed; only what must change is taken apart.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hybrid.errors import EngineError
from hybrid.knowledge.support import support
from hybrid.server import errors
from hybrid.server.asking import Asked
from hybrid.server.metrics import Metrics
from hybrid.types import JSON
from hybrid.types.decision import Decision
from hybrid.types.event import Decided, Drafted, Event, Failed, Finished, Quoted, Retrieved, Token, Usage
from hybrid.types.passage import Passage


class Reply:
    """An answer under way: everything before its first token is read, the tokens are to come."""

    def __init__(self, events: AsyncGenerator[Event], metrics: Metrics) -> None:
        self._events = events
        self._metrics = metrics
        self._asked_at = time.perf_counter()  # when the engine's turn came
        self.decision: Decision | None = None
        self.retrieved = Retrieved(())
        self._said: list[str] = []
        self.drafts: list[Drafted] = []
        self._quoted: Quoted | None = None
        self.usage: Usage | None = None
        self.first_at = self._asked_at
        self._first: Token

    async def begin(self) -> None:
        """Reads up to the first token. Raises the error of an answer that fails before it."""
        try:
            token = await self._next()
            if token is None:
                raise EngineError("The engine ended its answer without a token; try again.")
        except BaseException:
            await self.aclose()
            raise
        self.first_at = time.perf_counter()
        self._metrics.ttft.observe(self.first_at - self._asked_at)
        self._first = token

    async def aclose(self) -> None:
        """Stops whatever still works on the answer."""
        await self._events.aclose()

    async def tokens(self) -> AsyncIterator[Token]:
        """Every token, the first too; `usage` is known after the last. Raises the error of a failed answer."""
        token: Token | None = self._first
        while token is not None:
            yield token
            token = await self._next()
        if self.usage is None:
            raise EngineError("The answer broke off; try again.")

    async def _next(self) -> Token | None:
        """The next token, or None at the end; what comes between is kept."""
        async for event in self._events:
            match event:
                case Token():
                    self._said += [event.text] * (event.index == 0)
                    return event
                case Decided():
                    self.decision = event.decision
                    self._asked_at = time.perf_counter()
                    self._metrics.decided(event.decision)
                case Retrieved():
                    self.retrieved = event
                    if not self.drafts:  # between drafts and this the engine worked, the search was theirs
                        before, self._asked_at = self._asked_at, time.perf_counter()
                        self._metrics.retrieval.observe(self._asked_at - before)
                case Drafted():
                    self.drafts.append(event)
                case Quoted():
                    self._quoted = event
                case Finished():
                    self.usage = event.usage
                case Failed():
                    raise event.error
        return None

    @property
    def passages(self) -> tuple[Passage, ...]:
        """What the answer may cite; nothing where it says that what was found does not answer."""
        return () if self.retrieved.refused else self.retrieved.passages

    def explained(self) -> JSON:
        """The object `hybrid` for those who ask why."""
        decision, found = self.decision.wire() if self.decision else {}, self.retrieved
        quoted = self._quoted
        own = "".join(self._said).removesuffix(quoted.text if quoted else "")
        held = support(own, found.query, [f"{p.title}\n{p.text}" for p in self.passages])
        return {
            **decision,
            "calls": self.usage.calls if self.usage else None,
            "passages": [
                {**_citation(p), "score": round(p.score, 4), "supports": at in held.by, "cited": at in held.cited}
                for at, p in enumerate(found.passages)
            ],
            "answerable": None if found.answerable is None else round(found.answerable, 4),
            "refused": found.refused,
            "quoted": {"text": quoted.text, "passage": quoted.at + 1} if quoted else None,
            "support": held.wire() if self.passages else None,
            "drafts": [{"arm": d.arm, "text": d.text, "usage": d.usage.wire(), "note": d.note} for d in self.drafts],
        }

    def annotations(self) -> list[JSON]:
        """What the answer may cite, shaped as OpenAI's file citations."""
        return [{"type": "file_citation", "file_citation": _citation(p)} for p in self.passages]

    def overhead_s(self, began: float) -> float:
        """Everything but the engine, until the first byte: the gate, the search, and what follows the first token."""
        return self._asked_at - began + time.perf_counter() - self.first_at


def _citation(passage: Passage) -> JSON:
    """`filename` is the passage's id and `file_id` its document's, as in the results of a vector store search."""
    return {
        "file_id": passage.document or passage.id,
        "filename": passage.id,
        "title": passage.title,
        "quote": passage.text,
        "corpus": passage.corpus,
    }


def headers(decision: Decision) -> dict[str, str]:
    """The decision as headers; a value is empty where there is nothing to say."""
    adapter, _, version = (decision.adapter or "").partition("@")
    return {
        "x-hybrid-decision-id": decision.id,
        "x-hybrid-selected-arm": str(decision.arm),
        "x-hybrid-selected-adapter": adapter,
        "x-hybrid-selected-version": version,
        "x-hybrid-confidence": f"{decision.confidence:.4g}",
        "x-hybrid-fallback": decision.fallback or "",
        "x-hybrid-route-ms": f"{decision.route_ms:.2f}",
    }


async def whole(reply: Reply, asked: Asked) -> bytes:
    """The body of an answer that does not stream: the engine's own, with summed usage, citations and reasons."""
    pieces = [token async for token in reply.tokens()]
    last, total = pieces[-1], reply.usage or Usage()
    same = last.usage is not None and last.usage.wire() == total.wire()
    if same and not reply.passages and not asked.explain:
        return last.raw
    body: JSON = json.loads(last.raw)
    body["usage"] = {**(body.get("usage") or {}), **total.wire()}
    if reply.passages:
        for choice in body.get("choices", ()):
            choice.setdefault("message", {})["annotations"] = reply.annotations()
    if asked.explain:
        body["hybrid"] = reply.explained()
    return _dump(body)


async def stream(reply: Reply, asked: Asked) -> AsyncGenerator[bytes]:
    """The answer as server-sent events. `[DONE]` only after success; an error is an object, and the last thing sent."""
    try:
        async for chunk in _chunks(reply, asked):
            yield b"data: " + chunk + b"\n\n"
        yield b"data: [DONE]\n\n"
    except Exception as error:
        yield errors.frame(errors.known(error))


async def _chunks(reply: Reply, asked: Asked) -> AsyncIterator[bytes]:
    """The engine's chunks, with ours: citations after the first, usage or reasons in the last."""
    first = held = b""
    async for token in reply.tokens():
        if token.usage is not None and not json.loads(token.raw).get("choices"):
            continue  # the engine's own count; the client gets the sum of every call, if it asked
        if not token.raw:
            continue  # a further choice of a chunk that went out already
        if held:
            yield held
        held = token.raw
        if not first:
            first = held
            if reply.passages:
                yield held
                held = _dump({**_frame(first), "choices": _cited(reply, asked)})
        if not asked.explain or asked.include_usage:
            yield held
            held = b""
    if asked.include_usage:
        usage = {**_frame(first), "choices": [], "usage": (reply.usage or Usage()).wire()}
        yield _dump({**usage, "hybrid": reply.explained()} if asked.explain else usage)
    elif held:
        yield _dump({**json.loads(held), "hybrid": reply.explained()})


def _frame(chunk: bytes) -> JSON:
    """What all chunks of one answer share, read from one of them."""
    known = json.loads(chunk) if chunk else {}
    return {key: value for key, value in known.items() if key in ("id", "object", "created", "model")}


def _cited(reply: Reply, asked: Asked) -> list[JSON]:
    count = asked.request.sampling.get("n") or 1
    delta: dict[str, Any] = {"annotations": reply.annotations()}
    return [{"index": i, "delta": delta, "logprobs": None, "finish_reason": None} for i in range(count)]


def _dump(value: JSON) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


class EventStream(Response):
    """Sends an answer as it comes: the socket's backpressure reaches the engine, and the answer is always closed."""

    media_type = "text/event-stream"

    def __init__(self, reply: Reply, asked: Asked, headers: dict[str, str]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        del self.headers["content-length"]
        self._reply = reply
        self._asked = asked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._reply), aclosing(stream(self._reply, self._asked)) as pieces:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
