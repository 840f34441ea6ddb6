"""Safetensors read without trust and without torch: the header as a table, and whether every number is finite.

The format: 8 bytes, little-endian, the length of a JSON header; the header; the tensors' bytes, without gaps.
Every length is compared with what the file really holds before anything is allocated.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid.errors import Refused

Floats = npt.NDArray[np.float32]

MAX_HEADER = 16 << 20

#: bytes an element takes
WIDTHS: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip

#: dtype → (the unsigned view, the exponent's bits): all of them set spell infinity or NaN
EXPONENTS: Mapping[str, tuple[str, int]] = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where a tensor lies: `start` and `end` are byte offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name. Raises Refused when header and file do not agree."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(8)
        if len(first) < 8:
            raise Refused(f"{path.name} is truncated: it holds {size} bytes and no header. Copy it again, whole.")
        length = int.from_bytes(first, "little")
        if length > size - 8 or length > MAX_HEADER:
            raise Refused(
                f"{path.name} declares a header of {length:,} bytes, but the file has {size:,} "
                f"and a header may have {MAX_HEADER:,}. The file is truncated or forged; save it again."
            )
        header = _parse(file.read(length), path.name)
    tensors = {
        name: _tensor(name, entry, length + 8, path.name) for name, entry in header.items() if name != "__metadata__"
    }
    _check_tiling(tensors.values(), length + 8, size, path.name)
    return tensors


def _parse(text: bytes, file: str) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the header of {file} is not JSON; save the weights again as safetensors.") from error
    if not isinstance(header, dict):
        raise Refused(f"the header of {file} is not a JSON object; save the weights again as safetensors.")
    return header


def _tensor(name: str, entry: Any, origin: int, file: str) -> Tensor:
    """One header entry, checked: a known dtype, a shape of counts, and as many bytes as both ask for."""
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        counts = [start, end, *shape]
        sound = all(type(n) is int and n >= 0 for n in counts) and end - start == math.prod(shape) * WIDTHS[dtype]
    except (TypeError, KeyError, ValueError) as error:
        raise Refused(f"tensor {name[:120]!r} of {file} is described wrongly; save the weights again.") from error
    if not sound:
        raise Refused(f"tensor {name[:120]!r} of {file} does not have the bytes its shape asks for; save it again.")
    return Tensor(dtype, shape, origin + start, origin + end)


def _check_tiling(tensors: Iterable[Tensor], origin: int, size: int, file: str) -> None:
    """The tensors must fill the rest of the file exactly: no gap, no overlap, nothing missing at the end."""
    spans = sorted((t.start, t.end) for t in tensors)
    edges = [(origin, origin), *spans, (size, size)]
    for (_, end), (start, _) in pairwise(edges):
        if end > size:
            raise Refused(f"{file} is truncated: it ends {end - size:,} bytes too early. Copy it again, whole.")
        if start != end:
            raise Refused(f"the tensors of {file} overlap or leave gaps; save the weights again.")


def read_floats(path: Path) -> dict[str, Floats]:
    """The tensors of a safetensors file by name, as float32. Raises Refused for a file or a dtype that is not sound."""
    tensors = read_header(path)
    check_finite(path, tensors)
    found = {}
    with path.open("rb") as file:
        for name, tensor in tensors.items():
            file.seek(tensor.start)
            found[name] = _floats(file.read(tensor.end - tensor.start), tensor.dtype).reshape(tensor.shape)
    return found


def _floats(raw: bytes, dtype: str) -> Floats:
    """numpy has no bfloat16: its bits are the upper half of a float32."""
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(raw, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)


def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises Refused naming the first tensor that holds NaN or infinity, or is not of a floating type we can read."""
    with path.open("rb") as file:
        for name, tensor in tensors.items():
            if tensor.dtype not in EXPONENTS:
                raise Refused(f"tensor {name!r} has dtype {tensor.dtype}; save the adapter in F32, F16 or BF16.")
            view, mask = EXPONENTS[tensor.dtype]
            file.seek(tensor.start)
            bits = np.frombuffer(file.read(tensor.end - tensor.start), dtype=view)
            if bool(((bits & mask) == mask).any()):
                raise Refused(f"tensor {name!r} holds NaN or infinity: the training diverged. Lower the learning rate.")
