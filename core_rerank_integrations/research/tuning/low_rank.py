"""Products with adapted weights, fused so that training costs little more than the model itself.

PEFT multiplies every input with the two narrow matrices of an adapter, in float32, which takes
about a quarter of a step on a CPU. Here the adapter is added to the weights first, in their own
precision, as it is when the heads are used; the narrow products are left to the gradients.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core_rerank_integrations.errors import requires_extra

with requires_extra("tune"):
    from peft.tuners.lora import Linear


class _AdaptedLinear(torch.autograd.Function):
    """``input @ (weight + scale * up @ down).T``, with gradients for all but the weight."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        adapted = weight + (scale * (up @ down)).to(weight.dtype)
        ctx.save_for_backward(states, adapted, down, up)
        ctx.scale = scale
        return F.linear(states, adapted)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        states, adapted, down, up = ctx.saved_tensors
        rows, outputs = states.flatten(0, -2), gradient.flatten(0, -2)
        dtype = adapted.dtype
        down_gradient = (outputs @ up.to(dtype)).T @ rows
        up_gradient = outputs.T @ (rows @ down.to(dtype).T)
        return (
            gradient @ adapted if ctx.needs_input_grad[0] else None,
            None,
            ctx.scale * down_gradient.to(down.dtype),
            ctx.scale * up_gradient.to(up.dtype),
            None,
        )


def fuse_adapters(model: nn.Module) -> None:
    """Replace the forward pass of every linear layer that PEFT adapted.

    Args:
        model: A model with one LoRA adapter, without dropout.
    """
    for module in model.modules():
        if isinstance(module, Linear):
            module.forward = partial(_forward, module)  # type: ignore[method-assign]


def _forward(module: Linear, states: Tensor) -> Tensor:
    (name,) = module.active_adapters
    base = cast(nn.Linear, module.get_base_layer())
    output: Tensor = _AdaptedLinear.apply(  # type: ignore[no-untyped-call]
        states,
        base.weight,
        module.lora_A[name].weight,
        module.lora_B[name].weight,
        module.scaling[name],
    )
    return output if base.bias is None else output + base.bias
