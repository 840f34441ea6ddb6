"""`rag[:CORPUS]` and `adapter+rag:NAME[:CORPUS]`: retrieve, put the passages before the question, ask.

Retrieval-augmented generation, Lewis et al. 2020 (arXiv 2005.11401), with passages in the prompt. What was found too
weak is not answered from: the answer says that it is not in the documents. Where it is known that what was found does
answer, and a small model without an adapter says something else, the sentence follows that it should have said.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from hybrid.errors import BadRequest
from hybrid.prompts import instructed, last_user, replace_last_user, tame, with_passages
from hybrid.strategies.followup import bare, search_query
from hybrid.strategies.said import lengthened, said
from hybrid.strategies.tools import Tools
from hybrid.types.arm import Arm
from hybrid.types.event import Event, Quoted, Retrieved, Token
from hybrid.types.passage import Passage
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
    tokens = tools.generate(messages, adapter=arm.adapter)
    if passages and found.answerable is not None and not found.weak and not arm.adapter and _may_quote(request):
        events = _quoting(tokens, tools, query, passages[0])
    else:
        events = tokens
    async for event in events:
        yield event


async def _quoting(tokens: AsyncIterator[Token], tools: Tools, query: str, passage: Passage) -> AsyncIterator[Event]:
    """The answer, and after one that ended by itself the passage's own words where it does not say them."""
    own = ""
    async for token in tokens:
        own += token.text
        quote = await tools.quote(query, passage) if token.finish_reason == "stop" else None
        if quote is None or quote.is_said_in(own):
            yield token
            continue
        more = f"\n\n> {tame(quote.text)} [1]"
        yield Quoted(more)
        for piece in lengthened(token, more):
            yield piece


def _may_refuse(request: Request) -> bool:
    return not request.about and not any(request.sampling.get(name) for name in _SHAPES)


def _may_quote(request: Request) -> bool:
    """Not beside several answers, nor beside the log-probabilities of one."""
    asked = request.sampling
    return _may_refuse(request) and (asked.get("n") or 1) == 1 and not asked.get("logprobs")
