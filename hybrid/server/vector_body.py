"""The bodies of the routes under `/v1/vector_stores`: every field checked, and rows as OpenAI's objects."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hybrid.errors import BadRequest
from hybrid.lifecycle.corpora import DAY_S
from hybrid.server.body import kind_of
from hybrid.types import JSON
from hybrid.types.passage import Passage

MAX_PAIRS, MAX_KEY, MAX_VALUE = 16, 64, 512
MAX_NAME, MAX_DESCRIPTION = 256, 4_000
MAX_BATCH = 2_000
MAX_DAYS = 3_650
MAX_QUERIES, MAX_QUERY = 16, 20_000
MAX_RESULTS, RESULTS = 50, 10
MAX_SPOTS, SPOTS = 5_000, 2_000
_ID = re.compile(r"[^\x00-\x1f\x7f]{1,512}")


def text(body: Mapping[str, Any], field: str, limit: int) -> str | None:
    """A string of at most `limit` characters, or None where it is left out."""
    value = body.get(field)
    if value is None:
        return None
    if not isinstance(value, str) or not value or len(value) > limit:
        raise BadRequest(f"`{field}` is a string of 1 to {limit:,} characters, not {kind_of(value)}.", param=field)
    return value


def file_id(value: Any) -> str:
    """The id of a file."""
    if not isinstance(value, str) or not _ID.fullmatch(value):
        raise BadRequest("`file_id` is the id of an uploaded file.", param="file_id")
    return value


def file_ids(body: Mapping[str, Any]) -> list[str]:
    """The ids in `file_ids`, each once."""
    value = body.get("file_ids")
    if value is None:
        return []
    if not isinstance(value, list) or len(value) > MAX_BATCH:
        raise BadRequest(f"`file_ids` is a list of at most {MAX_BATCH:,} ids.", param="file_ids")
    return list(dict.fromkeys(map(file_id, value)))


def notes(body: Mapping[str, Any]) -> dict[str, str]:
    """`metadata`: strings by name."""
    return {key: str(value) for key, value in _pairs(body, "metadata", str).items()}


def attributes(body: Mapping[str, Any]) -> dict[str, Any]:
    """`attributes`: strings, numbers and booleans by name."""
    return _pairs(body, "attributes", (str, int, float, bool))


def _pairs(body: Mapping[str, Any], field: str, kinds: type | tuple[type, ...]) -> dict[str, Any]:
    value = body.get(field)
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_PAIRS:
        raise BadRequest(f"`{field}` is an object of at most {MAX_PAIRS} pairs.", param=field)
    for key, one in value.items():
        if not isinstance(one, kinds) or len(key) > MAX_KEY or (isinstance(one, str) and len(one) > MAX_VALUE):
            raise BadRequest(
                f"A pair of `{field}` is wrong: keys have at most {MAX_KEY} characters, strings {MAX_VALUE}; "
                f"{key[:80]!r} is {kind_of(one)}.",
                param=field,
            )
    return value


def groups(body: Mapping[str, Any]) -> list[str] | None:
    """`hybrid.groups`: who may read besides the caller; None where it is left out."""
    extras = body.get("hybrid")
    if extras is None:
        return None
    if not isinstance(extras, dict):
        raise BadRequest(f"`hybrid` is an object, not {kind_of(extras)}.", param="hybrid")
    value = extras.get("groups")
    if value is not None and not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
        raise BadRequest("`hybrid.groups` is a list of names.", param="hybrid")
    return value


def days(body: Mapping[str, Any]) -> int | None:
    """The days in `expires_after`."""
    value = body.get("expires_after")
    if value is None:
        return None
    count = value.get("days") if isinstance(value, dict) and value.get("anchor") == "last_active_at" else None
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_DAYS:
        raise BadRequest(
            f'`expires_after` is {{"anchor": "last_active_at", "days": 1 to {MAX_DAYS:,}}}.', param="expires_after"
        )
    return count


def chunking(body: Mapping[str, Any]) -> JSON | None:
    """`chunking_strategy` when it is static: `{"max_chunk_size_tokens", "chunk_overlap_tokens"}`; None for auto."""
    value = body.get("chunking_strategy")
    if value is None or (isinstance(value, dict) and value.get("type") == "auto"):
        return None
    static: Any = value.get("static") if isinstance(value, dict) and value.get("type") == "static" else None
    sizes = static if isinstance(static, dict) else {}
    size: Any = sizes.get("max_chunk_size_tokens")
    overlap: Any = sizes.get("chunk_overlap_tokens")
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (size, overlap))
    if not whole or not 100 <= size <= 4096 or not 0 <= 2 * overlap <= size:
        raise BadRequest(
            "`chunking_strategy` is auto, or static with `max_chunk_size_tokens` from 100 to 4096 and "
            "`chunk_overlap_tokens` of at most half of it.",
            param="chunking_strategy",
        )
    return {"max_chunk_size_tokens": size, "chunk_overlap_tokens": overlap}


def queries(body: Mapping[str, Any]) -> list[str]:
    """`query`: one, or several whose results are put together."""
    value = body.get("query")
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not 1 <= len(found) <= MAX_QUERIES:
        raise BadRequest(f"`query` is a string or a list of 1 to {MAX_QUERIES} strings.", param="query")
    if not all(isinstance(one, str) and one.strip() and len(one) <= MAX_QUERY for one in found):
        raise BadRequest(f"A query is a text of at most {MAX_QUERY:,} characters.", param="query")
    return found


def results(body: Mapping[str, Any]) -> int:
    """`max_num_results`."""
    value = body.get("max_num_results")
    if value is None:
        return RESULTS
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RESULTS:
        raise BadRequest(f"`max_num_results` is a whole number from 1 to {MAX_RESULTS}.", param="max_num_results")
    return value


def threshold(body: Mapping[str, Any]) -> float:
    """The least score of a result; 0 where none is asked for."""
    options = body.get("ranking_options") or {}
    value = options.get("score_threshold") if isinstance(options, dict) else options
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise BadRequest("`ranking_options.score_threshold` is a number from 0 to 1.", param="ranking_options")
    return float(value)


def spots(body: Mapping[str, Any]) -> int:
    """`limit`: passages on a map."""
    value = body.get("limit", SPOTS)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SPOTS:
        raise BadRequest(f"`limit` is a whole number from 1 to {MAX_SPOTS:,}.", param="limit")
    return value


# --- rows as OpenAI's objects ---------------------------------------------------------------------------------------


def store_object(row: JSON, counts: Mapping[str, int], size: int, more: JSON) -> JSON:
    """A `vector_store`; `hybrid.groups` says who sees it besides the key that made it, and `more` stands with it."""
    expires = None if row["days"] is None else int(row["active"] + row["days"] * DAY_S)
    return {
        "id": row["id"],
        "object": "vector_store",
        "created_at": int(row["created"]),
        "name": row["name"],
        "description": row["description"] or None,
        "usage_bytes": size,
        "file_counts": dict(counts),
        "status": "expired" if row["expired"] else "in_progress" if counts["in_progress"] else "completed",
        "expires_after": None if row["days"] is None else {"anchor": "last_active_at", "days": row["days"]},
        "expires_at": expires,
        "last_active_at": int(row["active"]),
        "metadata": row["notes"],
        "hybrid": {"corpus": row["name"], "groups": row["groups"], **more},
    }


def file_object(row: JSON) -> JSON:
    """A `vector_store.file`; `hybrid.progress` says how far one that is in progress is."""
    error = {"code": row["error_code"] or "server_error", "message": row["error"]} if row["error"] else None
    static = row["chunking"]
    return {
        "id": row["file"],
        "object": "vector_store.file",
        "created_at": int(row["created"]),
        "vector_store_id": row["corpus"],
        "usage_bytes": row["bytes"],
        "status": row["status"],
        "last_error": error,
        "attributes": row["attributes"],
        "chunking_strategy": {"type": "static", "static": static} if static else {"type": "other"},
        "hybrid": {"filename": row["filename"], "groups": row["groups"], "progress": row.get("progress")},
    }


def batch_object(row: JSON, counts: Mapping[str, int]) -> JSON:
    """A `vector_store.files_batch`."""
    ended = "failed" if counts["total"] and counts["failed"] == counts["total"] else "completed"
    status = "cancelled" if row["cancelled"] else "in_progress" if counts["in_progress"] else ended
    return {
        "id": row["id"],
        "object": "vector_store.files_batch",
        "created_at": int(row["created"]),
        "vector_store_id": row["corpus"],
        "status": status,
        "file_counts": dict(counts),
    }


def result_object(passage: Passage, found: Mapping[str, Any]) -> JSON:
    """One result of a search: `filename` is the passage's id, `file_id` its document's; `scores` are each stage's,
    `alike` counts those left out because they say almost the same."""
    return {
        "file_id": passage.document,
        "filename": passage.id,
        "score": round(min(max(passage.score, 0.0), 1.0), 6),
        "attributes": dict(found),
        "content": [{"type": "text", "text": passage.text}],
        "hybrid": {
            "title": passage.title,
            "scores": passage.scores.wire() if passage.scores else None,
            "alike": passage.alike,
        },
    }


def paged(
    objects: Sequence[JSON], *, after: str | None, before: str | None, limit: int, newest: bool
) -> tuple[list[JSON], bool]:
    """A page of objects that stand oldest first, and whether more follow. Raises BadRequest for a strange cursor."""
    ordered = list(reversed(objects)) if newest else list(objects)
    places = {one["id"]: i for i, one in enumerate(ordered)}
    for name, cursor in (("after", after), ("before", before)):
        if cursor is not None and cursor not in places:
            raise BadRequest(f"`{name}` is an id of the page before, and none of these has it.", param=name)
    start = places[after] + 1 if after is not None else 0
    end = places[before] if before is not None else len(ordered)
    if before is not None and after is None:
        start = max(end - limit, 0)
        return ordered[start:end], start > 0
    return ordered[start:end][:limit], end - start > limit
