"""The two products that make training fast on a CPU: a LoRA layer, and attention over a shared beginning.

Both compute what PEFT and transformers compute. The classes are made when first asked for, since they need torch.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from hybrid.errors import SetupError

if TYPE_CHECKING:
    from torch import Tensor

ATTENTION = "hybrid_shared_prefix"
#: scores of one head above which the blocked kernel, which never holds them all, is the better one
MANY_SCORES = 1 << 16


@cache
def fast_linear() -> type:
    """PEFT's LoRA layer with a forward and backward of its own.

    PEFT multiplies in the float32 of its matrices and casts activations back and forth; here the small matrices are
    cast instead, and their products are added into the big one's result. The float32 masters get the gradients.
    """
    import torch
    from peft.tuners.lora.layer import Linear

    class Product(torch.autograd.Function):
        """y = x Wᵀ + bias + s (x Aᵀ) Bᵀ, with gradients for x, A and B alone."""

        @staticmethod
        def forward(ctx: Any, x: Tensor, layer: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float) -> Tensor:
            flat = x.reshape(-1, x.shape[-1])
            down, up = a.to(x.dtype), (b * s).to(x.dtype)
            low = flat @ down.t()
            out = torch.nn.functional.linear(flat, layer, bias).addmm_(low, up.t())
            ctx.save_for_backward(flat, layer, down, up, low)
            ctx.scale, ctx.shape = s, x.shape
            return out.view(*x.shape[:-1], -1)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
            flat, layer, down, up, low = ctx.saved_tensors
            grad = grad.reshape(-1, grad.shape[-1])
            grad_low = grad @ up
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x = (grad @ layer).addmm_(grad_low, down).view(ctx.shape)
            return grad_x, None, None, (grad_low.t() @ flat).float(), (grad.t() @ low).float().mul_(ctx.scale), None

    class FastLinear(Linear):  # type: ignore[misc]
        """PEFT's layer, fast where it has one live adapter without dropout, PEFT's own otherwise."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            base, active = self.get_base_layer(), self.active_adapters
            dropping = self.training and any(p.p for p in self.lora_dropout.values() if hasattr(p, "p"))
            if args or kwargs or dropping or self.merged or self.disable_adapters or len(active) != 1:
                return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
            down, up = self.lora_A[active[0]].weight, self.lora_B[active[0]].weight
            out: Tensor = Product.apply(  # type: ignore[no-untyped-call]
                x, base.weight, base.bias, down, up, self.scaling[active[0]]
            )
            return out

    return FastLinear


def shared_prefix_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float,
    prefix: int,
    rows: int,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention of a `Pack`: query [1, heads, T, d], key and value [1, groups, T, d] to [1, T, heads, d].

    The prefix attends to itself; each row to it and to itself, under `attention_mask` [1, 1, width, prefix + width].
    Raises SetupError for a model whose attention is more than that.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    if options.get("softcap") or options.get("s_aux") is not None:
        raise SetupError("This base model's attention (soft caps or sinks) is not supported by the trainer yet.")
    heads, groups, size = query.shape[1], key.shape[1], query.shape[3]
    width = attention_mask.shape[2]

    def own(x: Tensor) -> Tensor:
        return x[0, :, prefix:].reshape(x.shape[1], rows, width, size).transpose(0, 1)

    q = own(query).reshape(rows, groups, heads // groups * width, size)  # a group's heads share its keys
    k, v = own(key), own(value)
    if prefix:
        k = torch.cat([key[:, :, :prefix].expand(rows, -1, -1, -1), k], 2)
        v = torch.cat([value[:, :, :prefix].expand(rows, -1, -1, -1), v], 2)
    if attention_mask.numel() > MANY_SCORES:
        mask = attention_mask.repeat(1, 1, heads // groups, 1)
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    else:
        scores = (q @ k.transpose(2, 3)).view(rows, groups, heads // groups, width, -1)
        weights = torch.add(attention_mask, scores, alpha=scaling).softmax(-1, dtype=torch.float32).to(q.dtype)
        out = weights.view(rows, groups, heads // groups * width, -1) @ v
    out = out.reshape(rows, heads, width, size).transpose(1, 2).reshape(1, rows * width, heads, size)
    if not prefix:
        return out, None
    q, k, v = query[:, :, :prefix], key[:, :, :prefix], value[:, :, :prefix]
    head = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=heads > groups)
    return torch.cat([head.transpose(1, 2), out], 1), None
