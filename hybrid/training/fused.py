"""LoRA's forward and backward as one autograd function: fewer passes over memory than PEFT's chain of small ops.

y = x Wᵀ + s · (x Aᵀ) Bᵀ, with the frozen W never asked for a gradient. Same numbers, about half the overhead on a CPU.
"""

from __future__ import annotations

from typing import Any


def register_fused_lora(config: Any) -> None:
    """Makes PEFT build its linear LoRA layers with the fused product. The exported adapter is the same."""
    import torch
    from peft.tuners.lora.layer import Linear as PeftLinear

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, weight: Any, a: Any, b: Any, scale: float) -> Any:
            flat = x.reshape(-1, x.shape[-1])
            a_low, b_low = a.to(x.dtype), (b * scale).to(x.dtype)
            hidden = flat @ a_low.t()
            y = torch.nn.functional.linear(flat, weight).addmm_(hidden, b_low.t())
            ctx.save_for_backward(flat, weight, a_low, b_low, hidden)
            ctx.scale, ctx.shape = scale, x.shape
            return y.view(*x.shape[:-1], -1)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            flat, weight, a_low, b_low, hidden = ctx.saved_tensors
            dy = grads[0].reshape(-1, grads[0].shape[-1])
            through = dy @ b_low
            da = (through.t() @ flat).float()
            db = (dy.t() @ hidden).float().mul_(ctx.scale)
            dx = (dy @ weight).addmm_(through, a_low).view(ctx.shape) if ctx.needs_input_grad[0] else None
            return dx, None, da, db, None

    class FusedLinear(PeftLinear):  # type: ignore[misc]
        def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
            name = self.active_adapters[0]
            if self.base_layer.bias is not None or self.disable_adapters or self.merged:
                return super().forward(x, *args, **kwargs)
            a, b = self.lora_A[name].weight, self.lora_B[name].weight
            return Product.apply(x, self.base_layer.weight, a, b, self.scaling[name])  # type: ignore[no-untyped-call]

    config._register_custom_module({torch.nn.Linear: FusedLinear})
