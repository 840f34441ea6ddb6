"""Pseudo-labels (Lee 2013): answers of the best arm at hand to unlabelled rows, kept where it is confident."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hybrid.errors import BadRequest
from hybrid.knowledge.embed import Embedder
from hybrid.prompts import task_message
from hybrid.training.data import Splits
from hybrid.training.endpoint import Endpoint, Said
from hybrid.training.formats import Example, Item
from hybrid.training.pool import Pool
from hybrid.training.probe import Probe
from hybrid.training.splits import is_closed
from hybrid.types.request import Message

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Labelled:
    """New task rows with `meta.pseudo`, `meta.confidence` and `meta.by`; `unsure` and `unlisted` were not kept."""

    rows: tuple[Row, ...]
    unsure: int
    unlisted: int = 0
    #: on dev: the share the head is confident about, and its accuracy there (None without a head)
    dev_share: float | None = None
    dev_accuracy: float | None = None


def answered(items: Sequence[Item]) -> tuple[list[str], list[str]]:
    """The inputs and the answers of chat rows. Raises BadRequest for texts and preferences, which have no answer."""
    examples = [item for item in items if isinstance(item, Example)]
    if len(examples) < len(items):
        raise BadRequest("This needs rows with an input and an answer; preference pairs and plain texts have none.")
    return [example.bare for example in examples], [example.answer for example in examples]


def label_by_head(splits: Splits, pool: Pool, above: float, embedder: Embedder) -> Labelled:
    """The answers of a linear head whose calibrated probability is at least `above`. Raises BadRequest (open task)."""
    texts, answers = answered(splits.train)
    if not is_closed(splits.train, splits.labels):
        raise BadRequest("A head answers closed tasks alone; name an --endpoint and a --model to label open ones.")
    dev_texts, dev_answers = answered(splits.dev)
    dev = embedder.embed(dev_texts)
    probe = Probe(embedder.embed(texts), answers).calibrate(dev, dev_answers)
    on_dev = [
        name == answer
        for (name, chance), answer in zip(probe.answers(dev), dev_answers, strict=True)
        if chance >= above
    ]
    found = [Said(name, chance) for name, chance in probe.answers(embedder.embed([row.text for row in pool.rows]))]
    rows = _rows(pool, found, above, "head")
    return Labelled(
        rows,
        unsure=len(found) - len(rows),
        dev_share=len(on_dev) / len(dev_answers),
        dev_accuracy=sum(on_dev) / len(on_dev) if on_dev else None,
    )


async def label_by_endpoint(splits: Splits, pool: Pool, above: float, endpoint: Endpoint) -> Labelled:
    """The endpoint's answers whose mean token probability is at least `above`; of a closed task only its labels.

    Raises BadRequest where the endpoint tells no token probabilities, and what the endpoint raises.
    """
    _, answers = answered(splits.train)
    asked = [[Message("user", task_message(splits.instruction, row.text))] for row in pool.rows]
    found = await endpoint.ask_all(asked, temperature=0.0, logprobs=True)
    if all(said.confidence is None for said in found):
        raise BadRequest(f"{endpoint.url} tells no token probabilities (logprobs); use an endpoint that does.")
    allowed = set(splits.labels or answers) if is_closed(splits.train, splits.labels) else None
    listed = [said if allowed is None or said.text in allowed else Said("", None) for said in found]
    rows = _rows(pool, listed, above, endpoint.model)
    unlisted = sum(not said.text for said in listed)
    return Labelled(rows, unsure=len(found) - unlisted - len(rows), unlisted=unlisted)


def _rows(pool: Pool, found: Sequence[Said], above: float, by: str) -> tuple[Row, ...]:
    return tuple(
        {
            "id": row.id,
            "input": row.text,
            "reference": said.text,
            "meta": {"pseudo": True, "confidence": round(said.confidence, 4), "by": by},
        }
        for row, said in zip(pool.rows, found, strict=True)
        if said.text and said.confidence is not None and said.confidence >= above
    )


def before_and_after(splits: Splits, rows: Sequence[Row], embedder: Embedder) -> dict[str, float] | None:
    """The dev accuracy of a head trained without and with new task rows; None for open tasks, which no head answers."""
    if not rows or splits.kind != "chat" or not is_closed(splits.train, splits.labels):
        return None
    texts, answers = answered(splits.train)
    dev_texts, dev_answers = answered(splits.dev)
    vectors = embedder.embed([*texts, *(row["input"] for row in rows)])
    dev = embedder.embed(dev_texts)
    before = Probe(vectors[: len(texts)], answers).accuracy(dev, dev_answers)
    after = Probe(vectors, [*answers, *(row["reference"] for row in rows)]).accuracy(dev, dev_answers)
    return {"before": round(before, 4), "after": round(after, 4), "dev_rows": len(dev_answers)}
