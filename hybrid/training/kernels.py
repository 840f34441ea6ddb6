"""What makes training fast on a CPU: a LoRA layer, attention over a shared beginning, and a loss in one pass.

All compute what PEFT and transformers compute. The classes are made when first asked for, since they need torch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from hybrid.errors import SetupError

if TYPE_CHECKING:
    from torch import Tensor

ATTENTION = "hybrid_shared_prefix"
#: answer tokens whose logits are in float32 at once
LOSS_ROWS = 64
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


@cache
def fast_loss() -> Callable[[Tensor, Tensor, float], Tensor]:
    """`loss(logits [A, vocabulary], targets [A], scale)`: the summed cross-entropy times `scale`, in nats.

    The gradient is made in the same pass and takes the place of the logits, which are lost: with a vocabulary of
    tens of thousands, float32 copies of all logits would cost as much as a third of the model.
    """
    import torch

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor, targets: Tensor, scale: float) -> Tensor:
            total = torch.zeros((), device=logits.device)
            for start in range(0, len(logits), LOSS_ROWS):
                part, wanted = logits[start : start + LOSS_ROWS], targets[start : start + LOSS_ROWS]
                logprobs = part.float()
                logprobs -= logprobs.logsumexp(-1, keepdim=True)
                chosen = logprobs.gather(1, wanted[:, None])
                total -= chosen.sum()
                gradient = logprobs.exp_().scatter_(1, wanted[:, None], chosen.exp() - 1)
                part.copy_(gradient.mul_(scale))
            ctx.save_for_backward(logits)
            return total * scale

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
            (gradient,) = ctx.saved_tensors
            return gradient if float(grad) == 1 else gradient * grad, None, None

    def loss(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
        return Loss.apply(logits, targets, scale)  # type: ignore[no-any-return, no-untyped-call]

    return loss


def shared_prefix_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float,
    prefix_mask: Tensor,
    rows: int,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention of a `Pack`: query [1, heads, T, d], key and value [1, groups, T, d] to [1, T, heads, d].

    The prefix attends to itself under `prefix_mask` [1, 1, prefix, prefix]; each row to it and to itself, under
    `attention_mask` [1, 1, width, prefix + width]. Raises SetupError for a model whose attention is more than that.
    """
    import torch

    if options.get("softcap") or options.get("s_aux") is not None:
        raise SetupError("This base model's attention (soft caps or sinks) is not supported by the trainer yet.")
    prefix, width = prefix_mask.shape[2], attention_mask.shape[2]

    def own(x: Tensor) -> Tensor:
        return x[0, :, prefix:].reshape(x.shape[1], rows, width, -1).transpose(0, 1)

    if not prefix:
        out = _attend(own(query), own(key), own(value), attention_mask, scaling)
        return out.transpose(1, 2).flatten(0, 1)[None], None
    shared_key, shared_value = key[:, :, :prefix], value[:, :, :prefix]
    k = torch.cat([shared_key.expand(rows, -1, -1, -1), own(key)], 2)
    v = torch.cat([shared_value.expand(rows, -1, -1, -1), own(value)], 2)
    out = _attend(own(query), k, v, attention_mask, scaling).transpose(1, 2).flatten(0, 1)[None]
    head = _attend(query[:, :, :prefix], shared_key, shared_value, prefix_mask, scaling).transpose(1, 2)
    return torch.cat([head, out], 1), None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Attention of [n, heads, w, d] over [n, groups, s, d] under a mask [1, 1, w, s], to [n, heads, w, d].

    The heads of a group are folded into one long query, so its keys are never copied. Softmax is in float32.
    """
    import torch

    rows, heads, width, size = query.shape
    groups = key.shape[1]
    folded = query.reshape(rows, groups, heads // groups * width, size)
    if mask.numel() > MANY_SCORES:
        tall = mask.repeat(1, 1, heads // groups, 1)
        out = torch.nn.functional.scaled_dot_product_attention(folded, key, value, attn_mask=tall, scale=scaling)
    else:
        scores = (folded @ key.transpose(2, 3)).view(rows, groups, heads // groups, width, -1)
        weights = torch.add(mask, scores, alpha=scaling).softmax(-1, dtype=torch.float32).to(query.dtype)
        out = weights.flatten(2, 3) @ value
    return out.reshape(rows, heads, width, size)
