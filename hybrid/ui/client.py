"""The face's one way to the gateway: HTTP, as any client. What a caller may not do, the face may not do for them."""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp

from hybrid.errors import EngineError, Forbidden, HybridError, NotReady, RateLimited, Unauthorized
from hybrid.types import JSON

#: a chunk that carries the passages is one line of a stream
_LINE_BYTES = 4 << 20
_SHORT = aiohttp.ClientTimeout(total=10)
#: for what waits: an engine that loads, a step that ends, rows that are looked through
_LONG = aiohttp.ClientTimeout(total=120)
#: no limit on the whole: the gateway has its own, and says so
_STREAM = aiohttp.ClientTimeout(total=None, sock_connect=10)
_JOBS = "/v1/fine_tuning/jobs"
_EVALUATIONS = "/v1/evaluations"
_STORES = "/v1/vector_stores"
#: the objects of one page of a list, and of a list that is read whole
_PAGE, _ALL = 100, 1_000
_LEAVES: Mapping[int, type[HybridError]] = {
    401: Unauthorized,
    403: Forbidden,
    429: RateLimited,
    503: NotReady,
}


def caller_key(typed: str | None, authorization: str | None) -> str:
    """The caller's own API key: the one typed into the page, or the one the browser came in with ("" without any)."""
    if typed and typed.strip():
        return typed.strip()
    scheme, _, value = (authorization or "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        with contextlib.suppress(binascii.Error, UnicodeDecodeError):
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
    return ""


def key_of(request: Any, typed: str | None) -> str:
    """The same for a `gradio.Request`."""
    return caller_key(typed, request.headers.get("authorization") if request else None)


class Client:
    """Calls `base_url` (`http://host:port`). Every method takes the caller's key and raises `hybrid.errors`."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url

    async def status(self, key: str) -> JSON:
        """`GET /v1/status`."""
        return await self._json("GET", "/v1/status", key)

    async def models(self, key: str) -> list[str]:
        """The names that `model` may take, in the gateway's order."""
        answer = await self._json("GET", "/v1/models", key)
        return [str(entry["id"]) for entry in answer.get("data", [])]

    async def feedback(self, key: str, decision_id: str, score: float) -> None:
        """Says how good an answer was, 0 to 1."""
        await self._json("POST", "/v1/feedback", key, {"decision_id": decision_id, "score": score})

    async def adapter(self, key: str, name: str, verb: str, body: JSON) -> JSON:
        """`POST /v1/adapters/{name}/…`: promote, rollback or retire."""
        return await self._json("POST", f"/v1/adapters/{quote(name, safe='')}/{verb}", key, body, _LONG)

    async def upload(self, key: str, path: Path, purpose: str = "fine-tune") -> JSON:
        """Sends a file to train on, or to read, under its own name; the object `file`."""
        form = aiohttp.FormData()
        form.add_field("purpose", purpose)
        with _unreachable(), path.open("rb") as file:
            form.add_field("file", file, filename=path.name)
            async with (
                aiohttp.ClientSession(self.base_url, timeout=_STREAM) as session,
                session.post("/v1/files", data=form, headers=_headers(key)) as response,
            ):
                return await _answer(response)

    async def check(self, key: str, file_id: str) -> JSON:
        """What training would make of an upload."""
        return await self._json("GET", f"/v1/files/{file_id}/check", key, patience=_LONG)

    async def train(self, key: str, body: JSON) -> JSON:
        """Orders a fine-tuning job."""
        return await self._json("POST", _JOBS, key, body)

    async def job(self, key: str, job_id: str) -> JSON:
        """A job of the caller's."""
        return await self._json("GET", f"{_JOBS}/{job_id}", key)

    async def steer(self, key: str, job_id: str, verb: str) -> JSON:
        """Pauses, resumes or cancels a job, and waits for it as long as the gateway does."""
        return await self._json("POST", f"{_JOBS}/{job_id}/{verb}", key, {}, _LONG)

    async def events(self, key: str, job_id: str, *, newer_than: int = 0) -> list[JSON]:
        """The events of a job after the one numbered `newer_than`, oldest first."""
        found: list[JSON] = []
        after = ""
        while True:
            page = await self._json("GET", f"{_JOBS}/{job_id}/events?limit=500{after}", key)
            fresh = [event for event in page["data"] if event_number(event) > newer_than]
            found += fresh
            if len(fresh) < len(page["data"]) or not page["has_more"]:
                return found[::-1]
            after = f"&after={page['last_id']}"

    async def suites(self, key: str) -> JSON:
        """What can be evaluated."""
        return await self._json("GET", "/v1/suites", key)

    async def plan(self, key: str, body: JSON) -> JSON:
        """What an evaluation would train and ask, and the minutes."""
        return await self._json("POST", f"{_EVALUATIONS}/plan", key, body, _LONG)

    async def evaluate(self, key: str, body: JSON) -> JSON:
        """Orders an evaluation."""
        return await self._json("POST", _EVALUATIONS, key, body)

    async def evaluations(self, key: str) -> list[JSON]:
        """The evaluations of the home, newest first."""
        return list((await self._json("GET", _EVALUATIONS, key))["data"])

    async def evaluation(self, key: str, row_id: str) -> JSON:
        """One of them."""
        return await self._json("GET", f"{_EVALUATIONS}/{quote(row_id, safe='')}", key)

    async def end_evaluation(self, key: str, row_id: str) -> JSON:
        """Cancels one."""
        return await self._json("POST", f"{_EVALUATIONS}/{quote(row_id, safe='')}/cancel", key, {})

    async def reports(self, key: str) -> list[JSON]:
        """The reports of the home, newest first."""
        return list((await self._json("GET", "/v1/reports", key, patience=_LONG))["data"])

    async def report(self, key: str, name: str) -> JSON:
        """The numbers of one."""
        return await self._json("GET", f"/v1/reports/{quote(name, safe='')}", key)

    async def examples(self, key: str, name: str, task: str) -> list[JSON]:
        """The examples of a task of a report with each arm's score."""
        path = f"/v1/reports/{quote(name, safe='')}/examples?task={quote(task, safe='')}"
        return list((await self._json("GET", path, key, patience=_LONG))["data"])

    async def example(self, key: str, name: str, task: str, example: str) -> JSON:
        """One of them with every arm's answer."""
        query = f"task={quote(task, safe='')}&id={quote(example, safe='')}"
        return await self._json("GET", f"/v1/reports/{quote(name, safe='')}/examples?{query}", key, patience=_LONG)

    async def stores(self, key: str) -> list[JSON]:
        """The corpora that the caller sees, newest first."""
        return (await self._listed(key, _STORES, most=_ALL))[0]

    async def store(self, key: str, store: str) -> JSON:
        """One of them."""
        return await self._json("GET", _store(store), key)

    async def create_store(self, key: str, name: str) -> JSON:
        """A new, empty corpus."""
        return await self._json("POST", _STORES, key, {"name": name})

    async def delete_store(self, key: str, store: str) -> None:
        """Takes a corpus away."""
        await self._json("DELETE", _store(store), key, patience=_LONG)

    async def rebuild(self, key: str, store: str, *, end: bool = False) -> JSON:
        """Has the vectors of a corpus made again, or calls that off."""
        return await self._json("POST", f"{_store(store)}/rebuild{'/cancel' if end else ''}", key, {})

    async def documents(self, key: str, store: str, status: str, most: int) -> tuple[list[JSON], bool]:
        """At most `most` files of a corpus, newest first, of a status ("" for all); and whether there are more."""
        return await self._listed(key, f"{_store(store)}/files{f'?filter={status}' if status else ''}", most=most)

    async def attach(self, key: str, store: str, file_id: str) -> JSON:
        """Puts an upload in line for a corpus."""
        return await self._json("POST", f"{_store(store)}/files", key, {"file_id": file_id})

    async def document(self, key: str, store: str, file_id: str) -> tuple[JSON, list[JSON]]:
        """A file of a corpus, and its passages in order."""
        path = f"{_store(store)}/files/{quote(file_id, safe='')}"
        return await self._json("GET", path, key), (await self._json("GET", f"{path}/content", key))["data"]

    async def delete_document(self, key: str, store: str, file_id: str) -> None:
        """Takes a file out of a corpus; the upload stays."""
        await self._json("DELETE", f"{_store(store)}/files/{quote(file_id, safe='')}", key, patience=_LONG)

    async def discard(self, key: str, file_id: str) -> None:
        """Deletes an upload."""
        await self._json("DELETE", f"/v1/files/{file_id}", key)

    async def search(self, key: str, store: str, query: str, most: int) -> list[JSON]:
        """The best passages of a corpus, each with the scores of every stage."""
        body = {"query": query, "max_num_results": most}
        return list((await self._json("POST", f"{_store(store)}/search", key, body, _LONG))["data"])

    async def chart(self, key: str, store: str, query: str, limit: int) -> JSON:
        """A map of a sample of a corpus, with a query in it ("" for none)."""
        body = {"limit": limit, **({"query": query} if query else {})}
        return await self._json("POST", f"{_store(store)}/map", key, body, _LONG)

    @contextlib.asynccontextmanager
    async def chat(self, key: str, body: JSON) -> AsyncIterator[tuple[Mapping[str, str], AsyncIterator[JSON]]]:
        """A streamed chat completion: the response's headers and its chunks. Leaving the block ends the work."""
        with _unreachable():
            async with (
                aiohttp.ClientSession(self.base_url, timeout=_STREAM, read_bufsize=_LINE_BYTES) as session,
                session.post("/v1/chat/completions", json=body, headers=_headers(key)) as response,
            ):
                await _raise_for(response)
                yield response.headers, _chunks(response)

    async def _json(
        self, method: str, path: str, key: str, body: JSON | None = None, patience: aiohttp.ClientTimeout = _SHORT
    ) -> JSON:
        with _unreachable():
            async with (
                aiohttp.ClientSession(self.base_url, timeout=patience) as session,
                session.request(method, path, json=body, headers=_headers(key)) as response,
            ):
                return await _answer(response)

    async def _listed(self, key: str, path: str, *, most: int) -> tuple[list[JSON], bool]:
        """At most `most` objects of a list that comes in pages, and whether there are more."""
        found: list[JSON] = []
        after = ""
        while True:
            limit = f"{'&' if '?' in path else '?'}limit={min(_PAGE, most - len(found))}"
            page = await self._json("GET", f"{path}{limit}{after}", key)
            found += page["data"]
            if len(found) >= most or not page["has_more"]:
                return found, bool(page["has_more"])
            after = f"&after={quote(str(page['last_id']), safe='')}"


def event_number(event: JSON) -> int:
    """What orders the events of a job."""
    return int(str(event["id"]).rpartition("-")[2])


def _store(store: str) -> str:
    return f"{_STORES}/{quote(store, safe='')}"


def _headers(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


@contextlib.contextmanager
def _unreachable() -> Any:
    """Turns a broken connection into a sentence."""
    try:
        yield
    except (aiohttp.ClientError, TimeoutError) as error:
        raise NotReady("The gateway does not answer. Is it stopping? Reload the page in a moment.") from error


async def _answer(response: aiohttp.ClientResponse) -> JSON:
    await _raise_for(response)
    answer: JSON = await response.json(content_type=None)
    return answer


async def _raise_for(response: aiohttp.ClientResponse) -> None:
    if response.status < 400:
        return
    try:
        message = str(json.loads(await response.text())["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"The gateway answered {response.status}."
    raise _LEAVES.get(response.status, HybridError)(message)


async def _chunks(response: aiohttp.ClientResponse) -> AsyncIterator[JSON]:
    """The data of a server-sent stream. Raises EngineError when it carries an error or breaks off."""
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        chunk: JSON = json.loads(data)
        if error := chunk.get("error"):
            raise EngineError(str(error.get("message", error)) if isinstance(error, dict) else str(error))
        yield chunk
    raise EngineError("The answer broke off before its end. Retry it.")
