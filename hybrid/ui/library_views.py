"""What the tab Library shows: pure functions from the gateway's JSON to HTML in which everything is escaped."""

from __future__ import annotations

import json
from collections.abc import Sequence

from hybrid.types import JSON
from hybrid.ui.house import pick_button, table
from hybrid.ui.panels import esc, percent

NO_CORPUS = (
    "None yet. Give one a name above and drop documents into it, or let <code>hybrid index DIR --name NAME</code> "
    "read a folder; it appears here by itself."
)
NO_DOCUMENT = "Nothing here. Drop documents above: Markdown, text, HTML, PDF, Word, tables, JSON rows."
NOTHING_FOUND = '<p class="hy-empty">Nothing was found: the corpus is empty, or nothing in it is yours to read.</p>'
#: the stages of a search in their order, as they are called in its scores and by people
STAGES = (
    ("lexical", "words"),
    ("dense", "meaning"),
    ("fused", "together"),
    ("rerank", "closer look"),
    ("mmr", "spread"),
)
#: passages around an open one that are shown with it, and those before and after that can be folded out
NEAR, FOLDED = 2, 200
_JOINT = " › "
_BEGINNING = 220


def place(file_id: str, passage_id: str = "") -> str:
    """What a passage, or a whole document, is picked by."""
    return json.dumps([file_id, passage_id])


def picked_place(picked: str) -> tuple[str, str]:
    """The document and the passage that `place` named; two times nothing where it named none."""
    try:
        file_id, passage_id = json.loads(picked)
    except (ValueError, TypeError):
        return "", ""
    return str(file_id), str(passage_id)


def corpora_table(stores: Sequence[JSON], picked: str) -> str:
    """The corpora that the caller sees; the one that is looked at is marked."""
    rows = [
        (
            str(one["id"]),
            [
                pick_button(one["name"]),
                f"{one['file_counts']['completed']:,}",
                f"{one['hybrid']['passages']:,}",
                _state(one),
            ],
        )
        for one in stores
    ]
    painted = table("Corpora", ("corpus", "documents", "passages", "state"), rows, NO_CORPUS)
    return f'<div data-picked="{esc(picked)}">{painted}</div>'


def at_work(store: JSON) -> bool:
    """Whether something of a corpus changes by itself."""
    return bool(store["file_counts"]["in_progress"]) or rebuilding(store) or store["hybrid"]["stage"] == "words"


def rebuilding(store: JSON) -> bool:
    """Whether its vectors are being made again, or will be."""
    return (store["hybrid"]["rebuild"] or {}).get("status") in ("queued", "running")


def _state(store: JSON) -> str:
    """A corpus in a few words; what has failed stands last."""
    told, counts = store["hybrid"], store["file_counts"]
    rebuild = told["rebuild"] or {}
    bits: list[str] = []
    if rebuild.get("status") == "queued":
        bits.append("waits to be re-indexed")
    elif rebuild.get("status") == "running":
        bits.append(f"re-indexing {_bar(rebuild['done'], rebuild['total'])}")
    elif told["stale"]:
        bits.append('<span class="hy-warn">made by another embedder: re-index it</span>')
    elif told["stage"] == "words":
        bits.append("searched by its words while vectors are made")
    if counts["in_progress"]:
        bits.append(f"reading {counts['in_progress']:,}")
    if store["status"] == "expired":
        bits.append("expired")
    bits = bits or ["ready" if told["passages"] else "empty"]
    if counts["failed"]:
        bits.append(f'<span class="hy-bad">{counts["failed"]:,} failed</span>')
    if rebuild.get("error"):
        bits.append(f'<small class="hy-bad">{esc(rebuild["error"])}</small>')
    return ", ".join(bits)


def _bar(done: float, total: float) -> str:
    share = percent(done / total) if total else 0.0
    return f'<span class="hy-bar"><i style="width:{share:.0f}%"></i></span> {share:.0f} %'


def corpus_head(store: JSON) -> str:
    """The corpus that is looked at: its name, who sees it and how to ask it."""
    groups = store["hybrid"]["groups"]
    bits = [f"ask it as <code>rag:{esc(store['name'])}</code>", size(store["usage_bytes"])]
    if groups:
        bits.append(f"for {esc(', '.join(groups))}")
    return f'<div class="hy-house"><h4>{esc(store["name"])}</h4><p class="hy-empty">{" · ".join(bits)}</p></div>'


def documents_table(files: Sequence[JSON], more: bool) -> str:
    """Documents and how far each is; one that failed says why."""
    rows = [(place(str(one["id"])), [_document_name(one), _progress(one), _size_of(one)]) for one in files]
    note = '<p class="hy-empty">There are more.</p>' if more else ""
    return table("Documents", ("document", "state", "size"), rows, NO_DOCUMENT) + note


def _document_name(file: JSON) -> str:
    """Its title; with the id, where that says more than that it was uploaded."""
    name, file_id = str(file["hybrid"]["filename"] or file["id"]), str(file["id"])
    known = file_id == name or file_id.startswith("file-")
    return pick_button(name) + ("" if known else f"<small>{esc(file_id)}</small>")


def _progress(file: JSON) -> str:
    status = str(file["status"])
    if status == "in_progress":
        told = file["hybrid"]["progress"] or {"phase": "waiting", "total": 0}
        return esc(told["phase"]) + (f" {_bar(told['done'], told['total'])}" if told["total"] else "")
    if status == "failed":
        return f'<span class="hy-bad">failed</span><small class="hy-bad">{esc(file["last_error"]["message"])}</small>'
    return "ready" if status == "completed" else esc(status)


def _size_of(file: JSON) -> str:
    return size(file["usage_bytes"]) if file["status"] == "completed" else "–"


def size(count: int) -> str:
    """Bytes as a person reads them."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" or value >= 9.95 else f"{value:.1f} {unit}"


def arrived(count: int, refused: Sequence[tuple[str, str]], left: int = 0) -> str:
    """What became of the files that were dropped: how many were taken, and why others were not."""
    bits = [f"{count} received"] if count else []
    bits += [f"{left} to be sent"] if left else []
    items = "".join(f"<li>{esc(name)}: {esc(why)}</li>" for name, why in refused)
    words = f'<p class="hy-empty">{", ".join(bits)}.</p>' if bits else ""
    return words + (f'<ul class="hy-bad hy-refused" role="alert">{items}</ul>' if items else "")


# --- a search -------------------------------------------------------------------------------------------------------


def hits_list(hits: Sequence[JSON]) -> str:
    """What a search found, best first, each with the score of every stage and its place by that score alone."""
    if not hits:
        return NOTHING_FOUND
    ranks = {stage: _ranks([_score(hit, stage) for hit in hits]) for stage, _ in STAGES}
    items = "".join(_hit(n, hit, {stage: ranks[stage][n] for stage in ranks}) for n, hit in enumerate(hits))
    note = "Best first. Each stage shows its score and the place it alone would give; – marks a stage that is off."
    return f'<p class="hy-empty">{note}</p><ol class="hy-hits">{items}</ol>'


def _hit(n: int, hit: JSON, ranks: dict[str, int]) -> str:
    text = str(hit["content"][0]["text"])
    beginning = text[:_BEGINNING] + ("…" if len(text) > _BEGINNING else "")
    title, others = hit["hybrid"]["title"] or hit["filename"], hit["hybrid"]["alike"]
    alike = f' <small class="hy-empty">and {others:,} almost the same</small>' if others else ""
    stages = "".join(_stage(words, _score(hit, stage), ranks[stage], stage) for stage, words in STAGES)
    return (
        f'<li data-pick="{esc(place(hit["file_id"], hit["filename"]))}"><span class="hy-nth">{n + 1}</span>'
        f'<div>{pick_button(title)}{alike}<p>{esc(beginning)}</p><dl class="hy-stages">{stages}</dl></div></li>'
    )


def _stage(words: str, score: float | None, rank: int, stage: str) -> str:
    if score is None:
        return f'<div class="hy-off"><dt>{words}</dt><dd>–</dd></div>'
    shown = f"{score:.1f}" if stage == "lexical" else f"{score:.2f}"
    nth = f" <small>#{rank}</small>" if rank and stage != "mmr" else ""
    return f"<div><dt>{words}</dt><dd>{shown}{nth}</dd></div>"


def _score(hit: JSON, stage: str) -> float | None:
    value = (hit["hybrid"]["scores"] or {}).get(stage)
    return None if value is None else float(value)


def _ranks(scores: Sequence[float | None]) -> list[int]:
    """By place, the rank from 1 of each score; 0 for one that is none, or nothing."""
    return [0 if not score else 1 + sum(other is not None and other > score for other in scores) for score in scores]


# --- a document -----------------------------------------------------------------------------------------------------


def document_view(file: JSON, parts: Sequence[JSON], passage: str = "") -> str:
    """A document as it was cut, a passage of it marked, under its headings and between its neighbours."""
    name = str(file["hybrid"]["filename"] or file["id"])
    head = f'<div class="hy-panel hy-document"><h4>{esc(name)} <small>{_facts(file, parts)}</small></h4>'
    if not parts:
        why = (file["last_error"] or {}).get("message") or "It is not read yet; it can be opened when it is."
        return f'{head}<p class="hy-empty">{esc(why)}</p></div>'
    at = next((i for i, part in enumerate(parts) if part["hybrid"]["id"] == passage), -1)
    first, last = (max(0, at - NEAR), at + NEAR + 1) if at >= 0 else (0, 2 * NEAR + 1)
    paths = ["", *(_path(part, name) for part in parts)]
    shown = [
        _section(part, paths[i + 1] if paths[i + 1] != paths[i] or i == first else "", here=i == at)
        for i, part in enumerate(parts)
    ]
    before, after = shown[max(0, first - FOLDED) : first], shown[last : last + FOLDED]
    return (
        f"{head}{_fold(before, first, 'before')}{''.join(shown[first:last])}"
        f"{_fold(after, len(parts) - min(last, len(parts)), 'after')}</div>"
    )


def _facts(file: JSON, parts: Sequence[JSON]) -> str:
    attributes = [f"{esc(key)} {esc(value)}" for key, value in file["attributes"].items()]
    counted = f"{len(parts):,} passage{'' if len(parts) == 1 else 's'}"
    return " · ".join([counted, size(file["usage_bytes"]), *attributes, *map(esc, file["hybrid"]["groups"])])


def _path(part: JSON, name: str) -> str:
    """The headings above a passage, without the document's own name."""
    title = str(part["hybrid"]["title"])
    return title.removeprefix(name).removeprefix(_JOINT) if title.startswith(name) else title


def _section(part: JSON, path: str, *, here: bool) -> str:
    heading = f"<h5>{esc(path)}</h5>" if path else ""
    text = esc(part["text"])
    if here:
        return f'<section class="hy-here" aria-current="true">{heading}<p><mark>{text}</mark></p></section>'
    return f"<section>{heading}<p>{text}</p></section>"


def _fold(sections: Sequence[str], count: int, where: str) -> str:
    """What lies further off, behind a line that opens."""
    if not sections:
        return ""
    left = f'<p class="hy-empty">{count - len(sections):,} more are not shown.</p>' if count > len(sections) else ""
    inner = f"{left if where == 'before' else ''}{''.join(sections)}{left if where == 'after' else ''}"
    summary = f"{count:,} passage{'' if count == 1 else 's'} {where}"
    return f'<details class="hy-more"><summary>{summary}</summary>{inner}</details>'
