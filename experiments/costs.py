"""What a step costs besides time: memory and operations. And attention as released in 2021."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from vit import Attention


def kept_bytes(loss: Callable) -> int:
    """The memory that a loss keeps for its backward pass."""
    kept: list[Tensor] = []  # held, so that no address is used twice
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss()
    storages = [tensor.untyped_storage() for tensor in kept]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def operations(work: Callable) -> int:
    """Additions and multiplications of matrix products and convolutions, attention on a CPU included."""
    aten, counts = torch.ops.aten, {}
    counts[aten._scaled_dot_product_flash_attention_for_cpu] = lambda *x, **_: sdpa_flop_count(*x[:3])
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    counts[backward] = lambda *x, **_: sdpa_backward_flop_count(*x[:4])
    with FlopCounterMode(display=False, custom_mapping=counts) as counter:
        work()
    return counter.get_total_flops()


def written_out(model: nn.Module) -> nn.Module:
    """Make a model's attention compute the whole matrix, as the releases of 2021 do; returns the model."""

    def forward(self: Attention, x: Tensor, row: bool = False, first: bool = False) -> tuple:
        q, k, v = self.split(x)
        A = self.weights(q[:, :, :1] if first else q, k)  # (B, heads, T, T)
        return self.proj((A @ v).transpose(1, 2).flatten(2)), A[:, :, 0] if row else None

    for module in model.modules():
        if isinstance(module, Attention):
            module.forward = partial(forward, module)
    return model
