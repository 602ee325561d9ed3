"""SimPool: one attention step that pools patches, in a ViT or convnet (Psomas et al. 2023, arXiv 2309.06891).

A ViT pools its patches through a CLS token in every block, a convnet averages them after the last one.
SimPool replaces both by one step of attention at the end, whose query is the mean of the patches. In
X (D, N) they are columns, as in the paper; in the code they are rows:

    u0 = mean of X                             (12)        a = softmax(K^T q / sqrt(d))             (15)
    q  = W_Q u0                                (13)        V = LN(X) - min LN(X)                    (16)
    K  = W_K LN(X)                             (14)        u = f^-1(f(V) a),  f(v) = v^gamma        (17)

gamma = (1 - alpha) / 2: 1 is the mean, infinity the maximum; the paper uses 1.25 for ViTs and 2 for convnets.
SimPool has no value weights, so only attention can select; the authors find that it outlines objects.

The paper's Algorithm 1 writes many poolings (its Table 1) as one loop: a vector u attends to the patches with
weights a = h(q . k) and becomes the mean of their values, weighted by a:

               u starts as    q . k                   a                     u becomes                  steps
    ViT's CLS  learned        W_Q LN(u) . W_K LN(X)   softmax, by head      u + W_O (W_V LN(X) a),     depth
                                                                            then an MLP (`vit.py`)
    GAP        mean of X      -                       1 / N                 X a                        1
    SimPool    mean of X      W_Q u . W_K LN(X)       softmax               (V^gamma a)^(1/gamma)      1

Where we differ from the published code: the minimum in (16) is over each image, not over the batch, so that
an embedding does not depend on the other images; the learned offset beta of u is left out. Powers are
computed in float32, relative to the maximum, so that neither they nor their gradients overflow.
"""

import math

import torch
from torch import Tensor, nn


class SimPool(nn.Module):
    """SimPool, equations (12)-(17): patches to one vector, and the attention that pooled them.

    dim: D. gamma: the exponent in (17); None: the weighted mean of LN(X), no (16). num_heads: each head
    attends with its own slice of the dimensions. Parameter names are the published ones. Raises ValueError
    if gamma is outside 0.1 to 10, or num_heads does not divide dim.
    """

    def __init__(self, dim: int, gamma: float | None = None, num_heads: int = 1):
        super().__init__()
        if gamma is not None and not 0.1 <= gamma <= 10:
            raise ValueError(f"SimPool: gamma {gamma} must lie between 0.1 and 10 (None: the plain mean)")
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"SimPool: num_heads {num_heads} must divide dim {dim}: change either")
        self.gamma, self.num_heads = gamma, num_heads
        self.norm_patches = nn.LayerNorm(dim, eps=1e-6)
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(dim, dim, bias=False)

    def heads(self, x: Tensor) -> Tensor:
        """Vectors (B, n, D) by head: (B, heads, n, d) with d = D / heads."""
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Patches (B, N, D) or maps (B, D, H, W) to pooled (B, D) and attention (B, N), or (B, heads, N).

        Raises ValueError for other shapes.
        """
        x = x.flatten(2).transpose(1, 2) if x.dim() == 4 else x  # (B, D, H, W) -> (B, N, D)
        D = self.wq.in_features
        if x.dim() != 3 or x.shape[2] != D or not x.shape[1]:
            raise ValueError(f"SimPool pools (B, N, {D}) or (B, {D}, H, W), N > 0, not {tuple(x.shape)}")
        normed, d = self.norm_patches(x), D // self.num_heads
        V = normed if self.gamma is None else normed - normed.amin(dim=(1, 2), keepdim=True) + 1e-6  # (16)
        u0 = x.mean(dim=1, keepdim=True)  # (B, 1, D), equation (12)
        q = self.heads(self.wq(u0))  # (B, heads, 1, d), equation (13)
        K = self.heads(self.wk(normed))  # (B, heads, N, d), equation (14)
        a = (q @ K.transpose(-2, -1) / math.sqrt(d)).softmax(dim=-1)  # (B, heads, 1, N), equation (15)
        u = power_mean(a, self.heads(V), self.gamma)  # (B, heads, 1, d), equation (17)
        attention = a[:, 0, 0] if self.num_heads == 1 else a[:, :, 0]  # (B, N) or (B, heads, N)
        return u.flatten(1), attention


def power_mean(a: Tensor, v: Tensor, gamma: float | None) -> Tensor:
    """(sum_n a_n v_n^gamma)^(1/gamma), equation (17); gamma None: sum_n a_n v_n.

    Weights a (..., k, N) and values v (..., N, D) > 0 to means (..., k, D), in the type of v. Means below
    1e-30^(1/gamma) of the largest value are raised to that, so that their gradient stays finite.
    """
    if gamma is None:
        return a @ v
    wide = torch.promote_types(v.dtype, torch.float32)
    with torch.autocast(v.device.type, enabled=False):  # autocast would multiply in half precision
        largest = v.detach().to(wide).amax(dim=-2, keepdim=True)  # cancels out, so it needs no gradient
        total = a.to(wide) @ (v.to(wide) / largest) ** gamma
        return (largest * total.clamp(min=1e-30) ** (1 / gamma)).to(v.dtype)


class GAP(nn.Module):
    """Global average pooling: patches (B, N, D) to their mean (B, D) and attention (B, N), 1/N each."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        attention = x.new_full(x.shape[:2], 1 / x.shape[1])
        return (attention[:, None] @ x)[:, 0], attention


if __name__ == "__main__":
    from common import chapters

    chapters.simpool()  # prints a few facts and draws simpool.png
