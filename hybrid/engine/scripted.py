"""The scripted engine: a server that speaks vLLM's HTTP dialect and needs no model.

    python -m hybrid.engine.scripted --uds PATH|--port N [--model NAME] [--max-model-len N] [--max-lora-rank R]
                                     [--max-cpu-loras N] [--start-delay S] [--load-delay S] [--crash-if FILE]

Fast tests and fault injection run on it; `hybrid serve --engine scripted` shows the whole product without a model.
Answers are deterministic: a sentence made of the question, or, with an adapter whose folder holds `examples.jsonl`,
the recorded answer to exactly that message. Token = word. The last user message (or the raw prompt) may direct it:

    @tokens 200      answer with 200 tokens                 @stall [K]       say nothing more after K (0) tokens
    @delay 50ms      wait before each token                 @reset [K]       drop the connection after K (0) tokens
    @status 400 why  answer with that error                 @hang, @wake     every answer stalls; until woken

An adapter whose lora_B is all zeros changes no log-probability, and NaN weights make them NaN, as in a real engine.
The N adapters that were asked last are in memory. Another is read again when its turn comes, and where its files are
gone by then the server dies of it, as vLLM does.
`GET /scripted/log` tells what reached the server and how it ended. `--crash-if FILE` exits at the start, with FILE's
text on stderr, while FILE exists.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from hybrid.engine import WEIGHTS
from hybrid.engine.script import Adapter, Answer, BadScript, answers, logprob, prompts_of, read_adapter, words


@dataclass
class Log:
    """What reached the engine. A request is started, active, and then finished or aborted (the client went)."""

    started: int = 0
    finished: int = 0
    aborted: int = 0
    loads: int = 0
    reads: int = 0
    seen: int = 0
    requests: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=50))

    @property
    def active(self) -> int:
        return self.started - self.finished - self.aborted

    def wire(self) -> dict[str, Any]:
        return {**asdict(self), "active": self.active, "requests": list(self.requests)}


class Server:
    """The state of one scripted engine, and its routes."""

    def __init__(
        self, model: str, max_model_len: int, max_lora_rank: int, load_delay: float = 0.0, max_cpu_loras: int = 32
    ) -> None:
        self.model = model
        self.max_model_len = max_model_len
        self.max_lora_rank = max_lora_rank
        self.load_delay = load_delay
        self.max_cpu_loras = max_cpu_loras
        self.adapters: dict[str, Adapter] = {}
        self.memory: OrderedDict[str, None] = OrderedDict()
        self.log = Log()
        self.awake = asyncio.Event()
        self.awake.set()

    def app(self) -> Starlette:
        """The ASGI app: the routes of vLLM that the gateway uses, and `/scripted/log`."""
        return Starlette(
            routes=[
                Route("/health", self.health),
                Route("/v1/models", self.models),
                Route("/v1/chat/completions", self.generate, methods=["POST"]),
                Route("/v1/completions", self.generate, methods=["POST"]),
                Route("/v1/load_lora_adapter", self.load, methods=["POST"]),
                Route("/v1/unload_lora_adapter", self.unload, methods=["POST"]),
                Route("/tokenize", self.tokenize, methods=["POST"]),
                Route("/metrics", self.metrics),
                Route("/scripted/log", self.show_log),
            ]
        )

    async def health(self, _request: Request) -> Response:
        return Response()

    async def metrics(self, _request: Request) -> Response:
        return PlainTextResponse(f"vllm:num_requests_running {self.log.active}.0\n")

    async def show_log(self, _request: Request) -> Response:
        return JSONResponse(self.log.wire())

    async def models(self, _request: Request) -> Response:
        base: dict[str, Any] = {
            "id": self.model,
            "root": self.model,
            "parent": None,
            "max_model_len": self.max_model_len,
        }
        cards = [base, *({"id": a.name, "root": a.path, "parent": self.model} for a in self.adapters.values())]
        return JSONResponse({"object": "list", "data": [{"object": "model", "owned_by": "vllm", **c} for c in cards]})

    async def tokenize(self, request: Request) -> Response:
        body = await request.json()
        tokens = words(prompts_of(body)[0])
        return JSONResponse(
            {"count": len(tokens), "max_model_len": self.max_model_len, "tokens": list(range(len(tokens)))}
        )

    async def load(self, request: Request) -> Response:
        body = await request.json()
        name, path = body.get("lora_name"), body.get("lora_path")
        self.log.loads += 1
        await asyncio.sleep(self.load_delay)
        if not name or not path:
            return _error(400, "Both 'lora_name' and 'lora_path' must be provided.", "InvalidUserInput")
        if name in self.adapters:
            return _error(400, f"The lora adapter '{name}' has already been loaded.", "InvalidUserInput")
        try:
            self.adapters[name] = await asyncio.to_thread(read_adapter, name, Path(path), self.max_lora_rank)
        except FileNotFoundError:
            return _error(404, f"Loading lora {name} failed: No adapter found for {path}", "NotFoundError")
        except (OSError, ValueError, KeyError) as error:
            return _error(500, str(error), "InternalServerError")
        self.bring(self.adapters[name])
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    def bring(self, adapter: Adapter) -> None:
        """Has an adapter in memory, in place of the one that was not asked for longest."""
        if adapter.name not in self.memory:
            self.log.reads += 1
            if not Path(adapter.path, WEIGHTS).is_file():
                sys.stderr.write(f"No adapter found for {adapter.path}\n")
                sys.stderr.flush()
                os._exit(1)
        self.memory[adapter.name] = None
        self.memory.move_to_end(adapter.name)
        while len(self.memory) > self.max_cpu_loras:
            self.memory.popitem(last=False)

    async def unload(self, request: Request) -> Response:
        name = (await request.json()).get("lora_name")
        if self.adapters.pop(name, None) is None:
            return _error(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    async def generate(self, request: Request) -> Response:
        """Chat and raw completions. What is wrong with the request is answered as vLLM answers it."""
        try:
            body = await request.json()
            self._note(request, body)
            adapter = self.adapters.get(body.get("model"))
            if adapter is None and body.get("model") not in (self.model, None):
                return _error(404, f"The model `{body['model']}` does not exist.", "NotFoundError", "model")
            spoken = answers(body, adapter, self.max_model_len, self.adapters.values())
        except json.JSONDecodeError as error:
            return _error(400, f"Invalid JSON: {error}")
        except BadScript as error:
            return _error(error.status, str(error))
        return Reply(self, body, adapter, spoken)

    def _note(self, request: Request, body: Any) -> None:
        if not isinstance(body, dict):
            raise BadScript("The body must be a JSON object.")
        headers = {k: v for k, v in request.headers.items() if k.startswith("x-") or k in ("authorization", "host")}
        self.log.seen += 1
        self.log.requests.append({"path": request.url.path, "headers": headers, "body": body})


class Reply(Response):
    """One answer, streamed or whole; work stops the moment the client goes."""

    def __init__(self, server: Server, body: dict[str, Any], adapter: Adapter | None, spoken: list[Answer]) -> None:
        self.server, self.asked, self.adapter, self.spoken = server, body, adapter, spoken
        self.chat = "messages" in body
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        log = self.server.log
        log.started += 1
        over = False
        try:
            over = await _until_gone(receive, self._stream(send) if self.asked.get("stream") else self._whole(send))
        except ConnectionAbortedError:
            over = True  # @reset: a fault of ours, not of the client
            raise
        finally:
            log.finished += over
            log.aborted += not over

    async def _whole(self, send: Send) -> None:
        async for _ in self._paced():
            pass
        choices = [self._choice(i, answer) for i, answer in enumerate(self.spoken)]
        body = {**self._frame(""), "choices": choices, "usage": self._usage()}
        status = 200
        try:
            content = json.dumps(body, allow_nan=False).encode()
        except ValueError as error:  # as vLLM answers when it has computed NaN
            status, content = 400, json.dumps({"error": {"message": str(error), "code": 400}}).encode()
        await send({"type": "http.response.start", "status": status, "headers": _JSON})
        await send({"type": "http.response.body", "body": content})

    async def _stream(self, send: Send) -> None:
        async def say(event: Any) -> None:
            data = event if isinstance(event, str) else json.dumps(event)
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})

        begun = False
        async for index, token, reason in self._paced():
            if not begun:  # like vLLM, nothing is sent before the first token exists
                begun = True
                await send({"type": "http.response.start", "status": 200, "headers": _SSE})
                if self.chat:
                    await say(self._chunk(0, {"role": "assistant", "content": ""}, None))
            await say(self._chunk(index, {"content": token}, reason))
        if (self.asked.get("stream_options") or {}).get("include_usage"):
            await say({**self._frame(".chunk"), "choices": [], "usage": self._usage()})
        await say("[DONE]")
        await send({"type": "http.response.body", "body": b""})

    async def _paced(self) -> AsyncIterator[tuple[int, str, str | None]]:
        """(choice, token, finish reason) in the order they are sent, with the script's waits and faults."""
        script = self.spoken[0].script
        if script.hang is not None:
            (self.server.awake.clear if script.hang else self.server.awake.set)()
        for step in range(max(len(a.tokens) for a in self.spoken)):
            await self.server.awake.wait()
            await asyncio.sleep(script.delay)
            if self.adapter:
                self.server.bring(self.adapter)
            if step == script.reset:
                raise ConnectionAbortedError("@reset")
            if step == script.stall:
                await asyncio.Event().wait()
            for index, answer in enumerate(self.spoken):
                if step < len(answer.tokens):
                    last = step == len(answer.tokens) - 1
                    yield index, answer.tokens[step], answer.finish_reason if last else None

    def _frame(self, suffix: str) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self.chat else "text_completion"
        return {
            "id": "scripted-0",
            "object": kind,
            "created": int(time.time()),
            "model": self.asked.get("model") or self.server.model,
        }

    def _chunk(self, index: int, delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
        said = {"delta": delta} if self.chat else {"text": delta["content"]}
        choice = {"index": index, **said, "logprobs": self._logprobs([delta["content"]]), "finish_reason": reason}
        return {**self._frame(".chunk"), "choices": [choice]}

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        text = "".join([*answer.echoed, *answer.tokens])
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        prompt = answer.prompt_logprobs if self.asked.get("prompt_logprobs") is not None else None
        return {
            "index": index,
            **said,
            "logprobs": self._logprobs(list(answer.tokens), list(answer.echoed)),
            "finish_reason": answer.finish_reason,
            "stop_reason": None,
            "prompt_logprobs": prompt,
        }

    def _logprobs(self, tokens: list[str], echoed: Sequence[str] = ()) -> dict[str, Any] | None:
        """Those of an answer's tokens, after those of a prompt that is repeated, whose first token has none."""
        if self.asked.get("logprobs") in (None, False):
            return None
        values: list[float | None] = [logprob(self.adapter, i, token) for i, token in enumerate([*echoed, *tokens])]
        if self.chat:
            pairs = zip(tokens, values, strict=True)
            return {"content": [{"token": t, "logprob": v, "bytes": None, "top_logprobs": []} for t, v in pairs]}
        said = [*echoed, *tokens]
        if echoed:
            values[0] = None
        top = [None if value is None else {token: value} for token, value in zip(said, values, strict=True)]
        offsets = [sum(map(len, said[:i])) for i in range(len(said))]
        return {"tokens": said, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}

    def _usage(self) -> dict[str, int]:
        prompt = self.spoken[0].prompt_tokens
        completion = sum(len(a.tokens) for a in self.spoken)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


_JSON = [(b"content-type", b"application/json")]
_SSE = [(b"content-type", b"text/event-stream; charset=utf-8")]


async def _until_gone(receive: Receive, work: Awaitable[None]) -> bool:
    """Runs `work` to its end, or cancels it when the client disconnects; whether it ended."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        return task.done()
    finally:
        for future in (task, gone):
            future.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _error(status: int, message: str, kind: str = "BadRequestError", param: str | None = None) -> Response:
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": status}}, status)


def main(argv: list[str] | None = None) -> None:
    """Serves on a UNIX socket, or a port, until SIGTERM."""
    parser = argparse.ArgumentParser(prog="hybrid.engine.scripted")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--uds")
    where.add_argument("--port", type=int)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--model", default="scripted")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--max-lora-rank", type=int, default=32)
    parser.add_argument("--max-cpu-loras", type=int, default=32)
    parser.add_argument("--start-delay", type=float, default=0.0)
    parser.add_argument("--load-delay", type=float, default=0.0)
    parser.add_argument("--crash-if", type=Path)
    args = parser.parse_args(argv)
    if args.crash_if and args.crash_if.exists():
        sys.exit(args.crash_if.read_text(encoding="utf-8").strip() or "told to crash")
    time.sleep(args.start_delay)
    server = Server(args.model, args.max_model_len, args.max_lora_rank, args.load_delay, args.max_cpu_loras)
    where_to = {"uds": args.uds} if args.uds else {"host": args.host, "port": args.port}
    uvicorn.run(server.app(), **where_to, log_level="warning", access_log=False, timeout_keep_alive=5)


if __name__ == "__main__":
    main()
