"""`rag[:CORPUS]` and `adapter+rag:NAME[:CORPUS]`: retrieve, put the passages before the question, ask.

Retrieval-augmented generation, Lewis et al. 2020 (arXiv 2005.11401), with passages in the prompt. What was found too
weak is not answered from: the answer says that it is not in the documents.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from hybrid.errors import BadRequest
from hybrid.prompts import instructed, last_user, replace_last_user, with_passages
from hybrid.strategies.followup import bare, search_query
from hybrid.strategies.said import said
from hybrid.strategies.tools import Tools
from hybrid.types.arm import Arm
from hybrid.types.event import Event, Retrieved
from hybrid.types.request import Request

#: what asks for another shape than words; a refusal in words would break who reads it
_SHAPES = ("tools", "functions", "response_format", "structured_outputs", "guided_json", "guided_regex",
           "guided_choice", "guided_grammar")  # fmt: skip


async def run(request: Request, arm: Arm, tools: Tools) -> AsyncIterator[Event]:
    """Searches with the last user message; the passages that fit the budget are shown and cited.

    An adapter that the gate chose gets its task's instruction too, as in its training. In a panel nothing is refused:
    the others may know.
    """
    if not request.messages:
        raise BadRequest("rag answers chat requests; send `messages` to /v1/chat/completions.", param="model")
    named = arm.args[1:] if arm.adapter else arm.args
    corpus = request.knobs.corpus or (named[0] if named else None)
    # in a panel the messages are drafts, and the question stands beside them
    query = bare(request.about) if request.about else search_query(request.messages)
    found = await tools.search(corpus, query, request.knobs.top_k or tools.top_k)
    passages = tools.fit(found.passages)
    if found.weak and tools.refusal and _may_refuse(request):
        yield Retrieved(passages, found.answerable, True, query)
        for token in said(request, str(arm), tools.refusal):
            yield token
        return
    yield Retrieved(passages, found.answerable, False, query)
    asked = instructed(request.messages, tools.instruction)
    messages = replace_last_user(asked, with_passages(last_user(asked), passages))
    async for token in tools.generate(messages, adapter=arm.adapter):
        yield token


def _may_refuse(request: Request) -> bool:
    return not request.about and not any(request.sampling.get(name) for name in _SHAPES)
