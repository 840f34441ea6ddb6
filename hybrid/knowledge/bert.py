"""BERT's encoder (Devlin et al. 2019, arXiv 1810.04805) as plain tensors, for a processor that has little time.

A short query spends more time around the products of a framework's BERT than in them. Here a layer is its arithmetic
and no more. Its weights lie in the order in which the processor's kernels read them, packed once and not at every
product, and attention is written out: torch's fused kernel is half as fast with heads as narrow as a small embedder's.
Of a softmax only its powers are computed, in `dtype`: their sum comes out of the product that weighs the values, as
one value more, so that the scores of a batch are gone through twice and never copied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: padded lengths are multiples: a kernel is made for each shape, which takes longer than a query
MULTIPLE = 8
#: attention's scores are cut at so many powers of two: a sum of them is still a finite number
_MOST = 115.0

Step = Callable[["Tensor"], "Tensor"]


@dataclass(frozen=True, slots=True)
class _Layer:
    """One block: attention and a feed-forward net, each added to its input and normed."""

    qkv: Step
    out: Step
    normed: Step
    wide: Step
    narrow: Step
    normed_again: Step


class Bert:
    """The encoder of a transformers `BertModel`, computing in `dtype`; embeddings and norms in float32."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        state = {name: tensor.detach().float() for name, tensor in model.state_dict().items()}
        config = model.config
        norm = _norms(state, config.layer_norm_eps)
        self._dtype = dtype
        self._heads: int = config.num_attention_heads
        self._words = state["embeddings.word_embeddings.weight"]
        # every text is a first segment
        kinds = state["embeddings.token_type_embeddings.weight"]
        self._places = state["embeddings.position_embeddings.weight"] + kinds[0]
        self._normed = norm("embeddings.LayerNorm")
        self._layers = [
            _layer(state, f"encoder.layer.{i}", self._heads, norm, dtype) for i in range(config.num_hidden_layers)
        ]

    @staticmethod
    def can_be(model: Any) -> bool:
        """Whether a transformers model is the plain BERT that this computes."""
        config = model.config
        return (
            type(model).__name__ == "BertModel"
            and config.hidden_act == "gelu"
            and not config.is_decoder
            and getattr(config, "position_embedding_type", "absolute") == "absolute"
        )

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The last hidden states, float32 [n, length, width], of int64 `ids` and `mask` [n, length]."""
        import torch

        n, length = ids.shape
        x = self._normed(torch.nn.functional.embedding(ids, self._words) + self._places[:length])
        x = x.to(self._dtype).view(n * length, -1)
        read = mask.to(self._dtype).view(n, 1, length, 1)
        for layer in self._layers:
            x = layer.normed(layer.out(self._attend(layer.qkv(x), read)).add_(x))
            x = layer.normed_again(layer.narrow(layer.wide(x)).add_(x))
        return x.view(n, length, -1).float()

    def _attend(self, qkv: Tensor, read: Tensor) -> Tensor:
        """Attention of all heads, [rows, width] from their queries, keys and values side by side.

        `read` [n, 1, length, 1] is 1 for a token and 0 for padding, which gets no weight and adds nothing to their sum.
        """
        import torch

        n, _, length, _ = read.shape
        parts = qkv.view(n, length, 3, self._heads, -1)
        # scores count from that of the first token, which changes no weight: their powers add up to one at least
        parts[:, :, 1] -= parts[:, :1, 1].clone()
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        width = q.shape[-1]
        q, k = (each.reshape(-1, length, width) for each in (q, k))
        valued = qkv.new_empty(n, self._heads, length, width + 1)
        torch.mul(v, read, out=valued[..., :width])
        valued[..., width:] = read
        powers = torch.bmm(q, k.transpose(1, 2)).clamp_(max=_MOST).exp2_()
        mixed = torch.bmm(powers, valued.view(-1, length, width + 1)).view(valued.shape).transpose(1, 2)
        out = qkv.new_empty(n, length, self._heads, width)
        return torch.div(mixed[..., :width], mixed[..., width:], out=out).view(n * length, -1)


def _layer(state: Mapping[str, Tensor], name: str, heads: int, norm: Callable[[str], Step], dtype: Any) -> _Layer:
    def product(*parts: str, gelu: bool = False, scale: Sequence[float] = (1.0,)) -> Step:
        import torch

        pairs = [(state[f"{name}.{part}.weight"], state[f"{name}.{part}.bias"]) for part in parts]
        weight = torch.cat([w * s for (w, _), s in zip(pairs, scale, strict=True)])
        bias = torch.cat([b * s for (_, b), s in zip(pairs, scale, strict=True)])
        return _product(weight.to(dtype), bias.to(dtype), gelu)

    own = "attention.self"
    width = len(state[f"{name}.{own}.query.bias"]) // heads
    # queries are scaled here once, not their scores every time; powers of two are cheaper than those of e
    asked = math.log2(math.e) / math.sqrt(width)
    return _Layer(
        qkv=product(f"{own}.query", f"{own}.key", f"{own}.value", scale=(asked, 1.0, 1.0)),
        out=product("attention.output.dense"),
        normed=norm(f"{name}.attention.output.LayerNorm"),
        wide=product("intermediate.dense", gelu=True),
        narrow=product("output.dense"),
        normed_again=norm(f"{name}.output.LayerNorm"),
    )


def _norms(state: Mapping[str, Tensor], eps: float) -> Callable[[str], Step]:
    import torch

    def norm(name: str) -> Step:
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return lambda x: torch.nn.functional.layer_norm(x, weight.shape, weight, bias, eps)

    return norm


def precision() -> torch.dtype:
    """What this processor computes fastest in without harm: bfloat16 where its kernels have it, else float32."""
    import torch

    if onednn() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return torch.float32


def onednn() -> bool:
    """Whether this torch was built with oneDNN, and it is not switched off."""
    import torch

    backend: Any = torch.backends.mkldnn
    return bool(backend.is_available() and backend.enabled)


def _product(weight: Tensor, bias: Tensor, gelu: bool) -> Step:
    """`x @ weight.T + bias`, with or without GELU after it."""
    return _packed(weight, bias, gelu) if onednn() else _plain(weight, bias, gelu)


def _packed(weight: Tensor, bias: Tensor, gelu: bool) -> Step:
    import torch

    ops: Any = torch.ops.mkldnn
    packed = ops._reorder_linear_weight(weight)
    after = "gelu" if gelu else "none"
    return lambda x: ops._linear_pointwise(x, packed, bias, after, [], "none")


def _plain(weight: Tensor, bias: Tensor, gelu: bool) -> Step:
    import torch

    linear = torch.nn.functional.linear
    if gelu:
        return lambda x: torch.nn.functional.gelu(linear(x, weight, bias))
    return lambda x: linear(x, weight, bias)
