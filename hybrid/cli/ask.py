"""`hybrid ask`: one answer with its decision."""

from __future__ import annotations

import asyncio
import uuid
from typing import Annotated, Any

import typer

from hybrid import reach
from hybrid.boot import open_gateway, wait_ready
from hybrid.cli.say import bar, data, say, text
from hybrid.gateway import Gateway
from hybrid.lifecycle.rating import Raters
from hybrid.settings import Settings
from hybrid.types.answer import Answer, fold
from hybrid.types.event import Event
from hybrid.types.request import Message, Request


def ask(
    question: Annotated[str, typer.Argument(help="what to ask")],
    model: Annotated[str, typer.Option(help="auto, base, rag:CORPUS, an adapter, … as `model` in the API")] = "auto",
    max_tokens: Annotated[int, typer.Option(min=1, help="the longest answer, in tokens")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy")] = 0.0,
    json_: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """One answer with its decision, from the server of this home, or starting an engine for it.

    hybrid ask "What is an arm?"
    hybrid ask "Where is my parcel 4411?" --model tickets --json
    """
    settings = Settings.load()
    sampling = {"max_tokens": max_tokens, "temperature": temperature}
    server = reach.find(settings.rooms.server_file)
    if server is not None:
        body = {"model": model, "messages": [{"role": "user", "content": question}], "hybrid": {"explain": True}}
        answer = asyncio.run(server.post("/v1/chat/completions", {**body, **sampling}))
        found = _from_server(answer)
    else:
        say("No server runs in this home; starting an engine for one answer (`hybrid serve` keeps it running).")
        messages = (Message("user", question),)
        request = Request(id=f"ask-{uuid.uuid4().hex[:12]}", model=model, messages=messages, sampling=sampling)
        found = asyncio.run(_from_engine(settings, request))
    if json_:
        data(found)
    else:
        text(found["answer"])
        decision = found["decision"]
        say(f"{decision['arm']}: {decision['reason']}")
        for passage in found["passages"]:
            say(f"  [{passage['id']}] {passage['title']}")


def _from_server(body: dict[str, Any]) -> dict[str, Any]:
    explained = dict(body["hybrid"])
    passages = explained.pop("passages", [])
    explained.pop("drafts", None)
    shown = [{"id": p["filename"], "title": p["title"], "text": p["quote"], "score": p["score"]} for p in passages]
    return {
        "answer": body["choices"][0]["message"]["content"],
        "decision": explained,
        "passages": shown,
        "usage": body.get("usage", {}),
    }


async def _from_engine(settings: Settings, request: Request) -> dict[str, Any]:
    with bar() as progress:
        async with open_gateway(settings, progress, Raters(settings)) as gateway:
            await wait_ready(gateway, settings.engine.start_timeout_s, progress)
            answer = await _fold(gateway, request)
    if answer.error is not None:
        raise answer.error
    assert answer.decision is not None  # noqa: S101  every answer starts with its decision
    passages = [{"id": p.id, "title": p.title, "text": p.text, "score": p.score} for p in answer.passages]
    return {
        "answer": answer.text,
        "decision": answer.decision.wire(),
        "passages": passages,
        "usage": answer.usage.wire(),
    }


async def _fold(gateway: Gateway, request: Request) -> Answer:
    events: list[Event] = [event async for event in gateway.answer(request)]
    return fold(events)
