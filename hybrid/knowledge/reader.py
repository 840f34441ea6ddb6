"""A reader: question and passage read together, by the embedder's own network taught which passage answers.

An embedder sees the two apart, so it cannot tell a passage that answers from one about the same matter; what reads both
at once can (Nogueira & Cho 2019, arXiv 1901.04085). This one begins as the embedder and learns from a corpus's own
questions. Beside how likely the passage answers it points at the words that do (Devlin et al. 2019, arXiv 1810.04805,
4.2), and nowhere in a passage without an answer (Rajpurkar et al. 2018, arXiv 1806.03822).
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hybrid.errors import DataError
from hybrid.knowledge.bert import precision
from hybrid.knowledge.embed import CORES, Embedder, hidden_states, one_thread, open_model, padded
from hybrid.knowledge.logistic import Logistic
from hybrid.knowledge.ranking import Floats
from hybrid.rooms import write_bytes
from hybrid.types.passage import Passage

if TYPE_CHECKING:
    from torch import Tensor

FILE = "reader.safetensors"
#: tokens of a question and a passage that are read; a longer passage is cut
PAIR_TOKENS = 224
#: tokens of an answer, at most
LONGEST = 16
#: what a reader says of a pair: the log-odds that the passage answers, and those of its best words over none
SAYS = ("answers", "points")
#: the tensors that no embedder has
HEADS = ("answers.weight", "answers.bias", "points.weight", "points.bias")
#: how the network's own tensors are called
NETWORK = "network."
_AGAIN = "Run `hybrid corpora tune --reader` again."


class Reader:
    """Reads pairs with `tensors` in the place of the embedder's own. Loads when it is first asked; safe to call from
    many threads. `first` tells by what question and passage share which candidates are worth reading."""

    def __init__(self, embedder: Embedder, tensors: Mapping[str, Tensor], first: Logistic) -> None:
        self._embedder = embedder
        self._tensors = tensors
        self.first = first
        self._loading = threading.Lock()
        self._loaded: _Network | None = None

    def read(self, question: str, passages: Sequence[str]) -> Floats:
        """float64 [n, 2]: the columns of `SAYS` for each passage."""
        if not passages:
            return np.empty((0, len(SAYS)))
        network = self._network
        encodings = network.tokenizer.encode_batch([(question, text) for text in passages])
        # a core each, the long ones apart from the short ones: little is padded
        order = sorted(range(len(encodings)), key=lambda n: len(encodings[n].ids))
        parts = [part for part in np.array_split(order, CORES) if len(part)]
        out = np.empty((len(passages), len(SAYS)))
        for part, rows in zip(
            parts, network.pool.map(lambda p: self._read([encodings[n] for n in p]), parts), strict=True
        ):
            out[part] = [row[: len(SAYS)] for row in rows]
        return out

    def _read(self, encodings: Sequence[Any]) -> list[tuple[float, float, int, int]]:
        """Of some pairs, read by one core, the columns of `SAYS` and the places of the best words' first and last
        token; zeros where the passage has none."""
        import torch

        network = self._network
        with torch.inference_mode(), one_thread(network.threads):
            ids, mask = padded([e.ids for e in encodings], network.pad, PAIR_TOKENS)
            answers, begins, ends = said(network.hidden(ids, mask), mask, network.heads)
        return [
            (float(answers[n]), *_pointed(begins[n].numpy(), ends[n].numpy(), passage_tokens(encoding)))
            for n, encoding in enumerate(encodings)
        ]

    def point(self, question: str, passage: str) -> tuple[int, int]:
        """Where the words stand in a passage that answer best: characters from, and to before; (0, 0) of an empty one.
        They are the best even where none answers."""
        encoding = self._network.tokenizer.encode(question, passage)
        [(*_, first, last)] = self._read([encoding])
        return (encoding.offsets[first][0], encoding.offsets[last][1]) if first else (0, 0)

    def load(self) -> None:
        """Makes the network now, so that no question waits for it."""
        if self._loaded is None:
            with self._loading:
                if self._loaded is None:
                    self._loaded = _Network(self._embedder.path, self._tensors)

    @property
    def _network(self) -> _Network:
        self.load()
        assert self._loaded is not None  # noqa: S101  load made it
        return self._loaded

    def save(self, file: Path) -> str:
        """Writes it in one step; returns the SHA-256 of the file."""
        from safetensors.torch import save

        metadata = {"embedder": self._embedder.digest, "first": json.dumps(asdict(self.first))}
        data = save(dict(self._tensors), metadata=metadata)
        write_bytes(file, data)
        return hashlib.sha256(data).hexdigest()

    @classmethod
    def open(cls, file: Path, embedder: Embedder) -> Reader:
        """The reader that `save` wrote. Raises DataError for a damaged one, and one taught from another embedder."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as opened:
                told = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  no iterator of its own
            first = Logistic.read(json.loads(told["first"]))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file} cannot be read: {error}. {_AGAIN}") from error
        if told.get("embedder") != embedder.digest:
            raise DataError(f"{file} was taught from another embedder. {_AGAIN}")
        if missing := [name for name in HEADS if name not in tensors]:
            raise DataError(f"{file} holds no {', '.join(missing)}. {_AGAIN}")
        return cls(embedder, tensors, first)


class _Network:
    """The embedder's network with other weights, ready to compute."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        import torch

        self.threads = torch.get_num_threads()
        model = open_model(path)
        own = {name.removeprefix(NETWORK): value for name, value in tensors.items() if name.startswith(NETWORK)}
        model[0].auto_model.load_state_dict(own, strict=False)
        self.hidden = hidden_states(model[0], precision())
        self.heads = {name: tensors[name].float() for name in HEADS}
        self.pad: int = model.tokenizer.pad_token_id or 0
        self.tokenizer = pair_tokenizer(model.tokenizer.backend_tokenizer.to_str())
        self.pool = ThreadPoolExecutor(CORES, "reader")


def as_read(passage: Passage) -> str:
    """A passage's words as they stand beside a question."""
    return f"{passage.title}\n{passage.text}".strip()


def pair_tokenizer(description: str) -> Any:
    """The tokenizer of pairs, from its description: a long passage is cut, a question never."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(description)
    tokenizer.no_padding()
    tokenizer.enable_truncation(PAIR_TOKENS, strategy="only_second")
    return tokenizer


def said(hidden: Tensor, mask: Tensor, heads: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(log-odds that each passage answers [n], of each token to begin the answer and to end it [n, length]), from the
    last hidden states [n, length, width] of pairs; padding is -inf nearly."""
    there = mask[..., None].float()
    mean = (hidden * there).sum(1) / there.sum(1)
    points = (hidden @ heads["points.weight"].T + heads["points.bias"]).masked_fill(there == 0, -1e4)
    return mean @ heads["answers.weight"] + heads["answers.bias"], points[..., 0], points[..., 1]


def passage_tokens(encoding: Any) -> list[int]:
    """The places of a pair's tokens that are the passage's."""
    return [place for place, of in enumerate(encoding.sequence_ids) if of == 1]


def _pointed(begins: Floats, ends: Floats, places: Sequence[int]) -> tuple[float, int, int]:
    """The best words' log-odds over none, which is the first marker's, and the places of their first and last token;
    zeros where there are none."""
    if not places:
        return 0.0, 0, 0
    both = np.add.outer(begins[places], ends[places])
    allowed = np.tril(np.triu(np.ones(both.shape, bool)), LONGEST - 1)
    first, last = divmod(int(np.where(allowed, both, -np.inf).argmax()), len(places))
    return float(both[first, last] - begins[0] - ends[0]), places[first], places[last]
