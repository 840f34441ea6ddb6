"""What `hybrid data check` finds: complaints, counts, lengths and balance of a source, with pictures."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid.training.balance import Balance, Distribution, balance
from hybrid.training.data import Splits, read_splits
from hybrid.training.files import rows_suffix
from hybrid.training.lengths import Lengths, lengths
from hybrid.training.reader import BAD_LIMIT
from hybrid.training.splits import GROUP

_BARS = 40


@dataclass(frozen=True, slots=True)
class Checked:
    """A source as training would see it."""

    splits: Splits
    lengths: Lengths | None
    balance: Balance

    @property
    def ok(self) -> bool:
        """Whether training would take it: not too many bad, leaked or overlong rows, and something to learn from."""
        splits = self.splits
        long = self.lengths.over if self.lengths else 0
        rows = len(splits.train)
        return rows > 0 and max(splits.bad_share, splits.leaked_share, long / rows) <= BAD_LIMIT

    def wire(self) -> dict[str, Any]:
        """The report as JSON."""
        splits = self.splits
        sizes = {name: len(getattr(splits, name)) for name in ("train", "dev", "test")}
        return {
            "ok": self.ok,
            "name": splits.name,
            "kind": splits.kind,
            "rows": sizes,
            "counts": splits.counts.wire(),
            "tokens": self.lengths and self.lengths.wire(),
            "balance": self.balance.wire(),
            "complaints": list(splits.counts.complaints),
            "removed": list(splits.counts.removed),
        }

    def draw(self, folder: Path) -> list[Path]:
        """Writes the pictures: `lengths.png`, and `labels.png` for a closed task."""
        folder.mkdir(parents=True, exist_ok=True)
        drawn: list[Path] = []
        if self.lengths:
            drawn.append(_histogram(self.lengths, folder / "lengths.png"))
        if self.balance.labels:
            drawn.append(_bars(self.balance.labels, folder / "labels.png"))
        return drawn


def check(source: Path, *, tokenizer: Any = None, limit: int = 0, seed: int = 0, group: str = "") -> Checked:
    """Reads a source and reports everything about it. Without a tokenizer, lengths are left out.

    Raises DataError only where there is nothing to report on.
    """
    splits = read_splits(source, seed=seed, group=group, bad_limit=1.0)
    key = group or str(splits.task.get("group") or GROUP)
    return Checked(
        splits,
        lengths(tokenizer, splits.train, limit) if tokenizer is not None else None,
        balance(splits.train, splits.labels, key),
    )


def check_upload(path: Path, filename: str) -> Checked:
    """The same for an uploaded file, whose name is not that of its bytes. Raises DataError."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / (Path(filename).stem[:60] + rows_suffix(filename))
        shutil.copyfile(path, source)  # documents are not read through links
        return check(source)


def _histogram(found: Lengths, path: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.hist(found.tokens, bins=50)
    axes.axvline(found.limit, color="grey", linewidth=0.8, linestyle="--", label=f"max_length {found.limit}")
    axes.set_xlabel("tokens of a row")
    axes.set_ylabel("rows")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    return path


def _bars(found: Distribution, path: Path) -> Path:
    from matplotlib.figure import Figure

    shown = found.counts if len(found.counts) <= _BARS else (*found.counts[: _BARS // 2], *found.counts[-_BARS // 2 :])
    figure = Figure(figsize=(6, 1 + 0.2 * len(shown)), layout="constrained")
    axes = figure.subplots()
    axes.barh([name[:40] for name, _ in shown], [count for _, count in shown])
    axes.invert_yaxis()
    axes.set_xlabel(f"training rows ({len(found.counts)} labels)")
    figure.savefig(path, dpi=120)
    return path
