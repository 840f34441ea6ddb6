"""The map of a corpus as a picture: pure functions from the gateway's JSON to SVG in which everything is escaped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hybrid.types import JSON
from hybrid.ui.library_views import place
from hybrid.ui.panels import esc

#: what points are coloured by
WAYS = ("document", "group")
EMPTY = (
    '<div class="hy-panel hy-empty">Each passage as a point, near those that say the like; what you search for lies '
    "among them. Press the button to draw it.</div>"
)
#: told apart on light and on dark ground alike, also by who sees few colours: light and dark ones take turns
COLOURS = ("#0d9488", "#d97706", "#6366f1", "#e11d48", "#65a30d", "#0284c7", "#c026d3", "#a16207")
OTHERS = "#94a3b8"
#: a document with fewer points than this has no colour of its own
FEW = 3
WIDTH, HEIGHT, EDGE = 560, 380, 16
#: what a point says is shown below the picture at once, not only where the pointer rests
HOVER_JS = """
element.addEventListener('pointerover', (event) => {
  const spot = event.target.closest('[data-pick]');
  const says = element.querySelector('.hy-says');
  if (spot && says) says.textContent = spot.querySelector('title').textContent;
});
"""


@dataclass(frozen=True, slots=True)
class _Frame:
    """The plane on the paper: one scale for both axes, so that far is far in every direction."""

    scale: float
    left: float
    top: float

    @classmethod
    def around(cls, spots: Sequence[Mapping[str, float]]) -> _Frame:
        """The frame that holds all of these."""
        xs, ys = [spot["x"] for spot in spots], [spot["y"] for spot in spots]
        wide, high = max(xs) - min(xs), max(ys) - min(ys)
        scale = min((WIDTH - 2 * EDGE) / max(wide, 1e-9), (HEIGHT - 2 * EDGE) / max(high, 1e-9), 1e4)
        return cls(scale, (WIDTH - scale * wide) / 2 - scale * min(xs), (HEIGHT - scale * high) / 2 - scale * min(ys))

    def at(self, spot: Mapping[str, float]) -> tuple[float, float]:
        return self.left + self.scale * spot["x"], HEIGHT - self.top - self.scale * spot["y"]


def picture(told: JSON, by: str, found: Sequence[str] = ()) -> str:
    """The map; `found` are the places of what a search found, best first: they are ringed and numbered."""
    spots: list[JSON] = told["data"]
    if not spots:
        return '<p class="hy-empty">Nothing to draw: the corpus is empty, or nothing in it is yours to read.</p>'
    query = told["query"]
    frame = _Frame.around([*spots, query] if query else spots)
    names = [_name(spot, by, told["groups"]) for spot in spots]
    colours = coloured(names, FEW if by == "document" else 1)
    ranks = {one: n for n, one in enumerate(found, 1)}
    drawn = [
        (ranks.get(place(spot["file_id"], spot["id"]), 0), frame.at(spot), colours.get(name, OTHERS), spot)
        for spot, name in zip(spots, names, strict=True)
    ]
    # what lies on top is drawn last: the best of what was found
    drawn.sort(key=lambda one: (one[0] > 0, -one[0]))
    points = "".join(_point(spot, at, colour, rank) for rank, at, colour, spot in drawn)
    star = _star(*frame.at(query)) if query else ""
    words = f"{len(spots):,} passages" + (" and your question" if query else "")
    return (
        f'<figure class="hy-map"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="A map of {words}">'
        f'{points}{star}</svg><figcaption><p class="hy-says" aria-live="polite">{_caption(told, words)}</p>'
        f"{_legend(names, colours, query is not None)}</figcaption></figure>"
    )


def coloured(names: Sequence[str], few: int) -> dict[str, str]:
    """A colour for each of the most frequent names that stand for `few` points or more."""
    common = [name for name, count in Counter(names).most_common(len(COLOURS)) if count >= few]
    return dict(zip(common, COLOURS, strict=False))


def _name(spot: JSON, by: str, groups: Mapping[str, Sequence[str]]) -> str:
    """What a point is coloured by, in words."""
    if by == "group":
        return ", ".join(groups.get(spot["file_id"], ())) or "everyone"
    return str(spot["title"]).partition(" › ")[0] or str(spot["file_id"])


def _point(spot: JSON, at: tuple[float, float], colour: str, rank: int) -> str:
    x, y = at
    says = esc(f"{spot['title']}\n{spot['text']}".strip())
    ring = f'<text x="{x:.1f}" y="{y - 9:.1f}">{rank}</text>' if rank else ""
    kind = ' class="hy-ringed"' if rank else ""
    return (
        f'<g data-pick="{esc(place(spot["file_id"], spot["id"]))}"{kind}><title>{says}</title>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{6 if rank else 3.2}" fill="{colour}"></circle>{ring}</g>'
    )


def _star(x: float, y: float) -> str:
    """Where the question lies."""
    return (
        f'<g class="hy-star"><title>Your question</title><path transform="translate({x:.1f} {y:.1f})" '
        'd="M0-9 2.2-2.8 8.6-2.8 3.4 1.1 5.3 7.3 0 3.6-5.3 7.3-3.4 1.1-8.6-2.8-2.2-2.8Z"></path></g>'
    )


def _caption(told: JSON, words: str) -> str:
    shown = 100 * sum(told["shares"])
    return f"{words}. The two axes show {shown:.0f} % of how they differ. Point at one to read it, pick it to open it."


def _legend(names: Sequence[str], colours: Mapping[str, str], asked: bool) -> str:
    counts = Counter(name if name in colours else "" for name in names)
    entries = [(colours[name], name, counts[name]) for name in colours]
    if counts[""]:
        entries.append((OTHERS, "others" if colours else "passages", counts[""]))
    items = [
        f'<li><i style="background:{colour}"></i>{esc(name)} <small>{n:,}</small></li>' for colour, name, n in entries
    ]
    if asked:
        items.append('<li><b class="hy-starred">★</b>your question</li>')
    return f'<ul class="hy-legend">{"".join(items)}</ul>'
