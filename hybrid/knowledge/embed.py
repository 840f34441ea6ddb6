"""The sentence embedder: unit vectors for passages by the thousand and for one query at a time.

Of a long query the beginning and the end are read (head and tail: Sun et al. 2019, arXiv 1905.05583): what is asked
stands there, and a layer's time grows with every token.

A Sentence-BERT (Reimers & Gurevych 2019, arXiv 1908.10084) in bfloat16 where the processor computes with it, which
leaves the vectors as they are: their cosine to float32 is above 0.9999, so the digest of an embedder names no number
format. The library reads the folder and pools; its `encode` is left aside, and a plain BERT computes through `bert.py`.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hybrid.errors import SetupError
from hybrid.knowledge.bert import MULTIPLE, Bert, precision
from hybrid.rooms import sha256_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Vectors = npt.NDArray[np.float32]
Encoding = list[int]

#: tokens in one batch, padding included: enough to fill the cores, small enough to stay in their caches
BATCH_TOKENS = 1024
QUERY_CACHE = 4096
#: tokens of a query that are read, markers included: half of them from its beginning, half from its end
QUERY_TOKENS = 64
#: characters of either end of a query that are looked at for these tokens: a long document is not cut to pieces first
_END = 16 * QUERY_TOKENS
_NO_LIMIT = 1 << 20
CORES = os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class _Model:
    """What a sentence-transformers folder comes to: `hidden` makes token vectors, `after` pools them.

    `limit` is the most tokens of a text that are read; `tokenizer` is a description of one, not one.
    """

    dim: int
    limit: int
    pad: int
    tokenizer: str
    hidden: Callable[[Tensor, Tensor], Tensor]
    after: Sequence[Any]


class Embedder:
    """Turns text into unit vectors. Loads the model when it is first needed; safe to call from many threads."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name
        self._loading = threading.Lock()
        self._loaded: _Model | None = None
        self._threads = 0  # what the rest of the process computes with
        self._pool = ThreadPoolExecutor(CORES, "embed")
        self._cached_query = lru_cache(QUERY_CACHE)(self._embed_query)

    @property
    def dim(self) -> int:
        """The length of a vector."""
        return self._model.dim

    @cached_property
    def digest(self) -> str:
        """What must be equal for two vectors to be comparable: the SHA-256 of the weights and the dimension."""
        digest = hashlib.sha256(str(self.dim).encode())
        for weights in _weights(self.path):
            digest.update(sha256_file(weights).encode())
        return digest.hexdigest()

    @property
    def query_digest(self) -> str:
        """As `digest`, of vectors of queries: they also rest on how much of one is read."""
        return f"{self.digest}-{QUERY_TOKENS}"

    def embed(self, texts: Sequence[str], progress: Callable[[int, int], None] | None = None) -> Vectors:
        """Unit vectors float32 [n, dim] in the order of `texts`; longer texts are read up to the model's limit.

        `progress(done, total)` is called after every batch. Batches hold texts of like length, so that little of
        them is padding.
        """
        return self._embed(self._encode(texts), progress)

    def embed_queries(self, texts: Sequence[str], progress: Callable[[int, int], None] | None = None) -> Vectors:
        """As `embed`, each text read as `embed_query` reads it: what queries are compared with as such."""
        return self._embed(self._encode_queries(texts), progress)

    def _embed(self, encodings: Sequence[Encoding], progress: Callable[[int, int], None] | None) -> Vectors:
        out = np.empty((len(encodings), self.dim), np.float32)
        running: deque[tuple[list[int], Future[Vectors]]] = deque()
        done = 0
        for batch in (*_batches([len(e) for e in encodings]), None):
            if batch:
                running.append((batch, self._pool.submit(self._forward, [encodings[i] for i in batch])))
            # few in flight: a second caller's batches are served in between, not after all of ours
            while len(running) > (CORES if batch else 0):
                rows, vectors = running.popleft()
                out[rows] = vectors.result()
                done += len(rows)
                if progress:
                    progress(done, len(encodings))
        return out

    def embed_query(self, text: str) -> Vectors:
        """The unit vector float32 [dim] of one query; read-only, because it is shared with the cache. Of one that is
        longer than `QUERY_TOKENS` the beginning and the end are read."""
        vector: Vectors = self._cached_query(text)
        return vector

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has, without the markers around it."""
        return [len(e.ids) for e in self._whole.encode_batch_fast(list(texts), add_special_tokens=False)]

    @cached_property
    def _whole(self) -> Any:
        return self._tokenizer(None)

    @cached_property
    def _reader(self) -> Any:
        return self._tokenizer(self._model.limit)

    def _tokenizer(self, limit: int | None) -> Any:
        """The model's tokenizer without padding, cut at `limit`: one copy a purpose.

        A tokenizer keeps its last cut as state, so a count after an encoding would call every long text short, and
        threads would change it under one another.
        """
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self._model.tokenizer)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        if limit is not None:
            tokenizer.enable_truncation(limit)
        return tokenizer

    def _embed_query(self, text: str) -> Vectors:
        vector: Vectors = self._forward(self._encode_queries([text]))[0].copy()
        vector.setflags(write=False)
        return vector

    def _encode(self, texts: Sequence[str]) -> list[Encoding]:
        return [encoding.ids for encoding in self._reader.encode_batch_fast(list(texts))]

    def _encode_queries(self, texts: Sequence[str]) -> list[Encoding]:
        ends = [text if len(text) <= 2 * _END else f"{text[:_END]} {text[-_END:]}" for text in texts]
        most = min(QUERY_TOKENS, self._model.limit)
        return [_ends(encoding.ids, most) for encoding in self._whole.encode_batch_fast(ends)]

    def _forward(self, encodings: Sequence[Encoding]) -> Vectors:
        """The model and what it pools with, over one padded batch; sums and norms in float32."""
        import torch

        model = self._model
        with torch.inference_mode(), one_thread(self._threads):
            ids, mask = padded(encodings, model.pad, model.limit)
            features = {"token_embeddings": model.hidden(ids, mask), "attention_mask": mask}
            for module in model.after:
                features = module(features)
            pooled: Tensor = torch.nn.functional.normalize(features["sentence_embedding"].float(), dim=1)
            return pooled.numpy()

    @property
    def _model(self) -> _Model:
        if self._loaded is None:
            with self._loading:
                if self._loaded is None:
                    import torch

                    self._threads = torch.get_num_threads()
                    self._loaded = _load(self.path)
        return self._loaded


@contextmanager
def one_thread(usual: int) -> Iterator[None]:
    """One core a batch, then `usual` again. Cores that share a batch wait for one another at every product: with a core
    busy elsewhere (the engine's) a query took 6 ms with one thread and 14 with two, and bulk work stood still.
    """
    import torch

    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def open_model(path: Path) -> Any:
    """The SentenceTransformer at `path`, in float32. Raises SetupError when it is none, or its weights are pickles."""
    _weights(path)
    from sentence_transformers import SentenceTransformer

    try:
        return SentenceTransformer(
            str(path), device="cpu", local_files_only=True, model_kwargs={"dtype": "float32"}
        ).eval()
    except (OSError, ValueError, KeyError) as error:
        raise SetupError(
            f"{path} cannot be loaded as a sentence embedder: {error}. "
            "Name a sentence-transformers folder in the setting `embedder`."
        ) from error


def _load(path: Path) -> _Model:
    """The sentence embedder at `path`. Raises SetupError."""
    model = open_model(path)
    _keep_memory()
    first, *after = model
    return _Model(
        dim=int(model.get_embedding_dimension()),
        limit=int(model.max_seq_length or _NO_LIMIT),
        pad=model.tokenizer.pad_token_id or 0,
        tokenizer=model.tokenizer.backend_tokenizer.to_str(),
        hidden=hidden_states(first, precision()),
        after=after,
    )


def _keep_memory() -> None:
    """Has the C library keep the memory that a batch frees for the next one, up to 62 MB a thread.

    glibc gives back what is larger than the largest block freed so far (mallopt(3), M_MMAP_THRESHOLD, at most 32 MB),
    and twice that at the end of its heap: without this a passage cost 2,300 page faults, a quarter of its time. The
    block itself is never touched, so it costs nothing; other C libraries take no notice.
    """
    import torch

    torch.empty(31 << 20, dtype=torch.uint8)


def hidden_states(first: Any, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """What a sentence-transformers model begins with, as a function of token ids and mask; any other than a BERT runs
    as it is.
    """
    if Bert.can_be(first.auto_model):
        return Bert(first.auto_model, dtype)
    first.to(dtype)

    def hidden(ids: Tensor, mask: Tensor) -> Tensor:
        vectors: Tensor = first({"input_ids": ids, "attention_mask": mask})["token_embeddings"]
        return vectors.float()

    return hidden


def _weights(path: Path) -> list[Path]:
    weights = sorted(path.rglob("*.safetensors"))
    if not weights:
        raise SetupError(
            f"{path} holds no .safetensors, so it is no embedder that can be used. "
            "Name a sentence-transformers folder with safetensors in the setting `embedder`."
        )
    return weights


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Positions by falling length, cut so that a padded batch holds BATCH_TOKENS tokens at most, or every core's share
    of a small lot.
    """
    room = min(BATCH_TOKENS, -(-sum(lengths) // CORES))
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        size = max(1, room // max(1, lengths[order[start]]))
        yield order[start : start + size]
        start += size


def _ends(encoding: Encoding, most: int) -> Encoding:
    """At most so many tokens: the first half and the last half, with the markers that stand there."""
    return encoding if len(encoding) <= most else encoding[: most // 2] + encoding[most // 2 - most :]


def padded(encodings: Sequence[Encoding], pad: int, limit: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 [n, longest], the longest rounded up within the limit."""
    import torch

    longest = max(len(e) for e in encodings)
    shape = len(encodings), min(-(-longest // MULTIPLE) * MULTIPLE, limit)
    ids, mask = np.full(shape, pad, np.int64), np.zeros(shape, np.int64)
    for row, encoding in enumerate(encodings):
        ids[row, : len(encoding)] = encoding
        mask[row, : len(encoding)] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)
