"""SimPool: one attention that pools patches, in a ViT or a convnet (Psomas et al. 2023, arXiv 2309.06891).

A ViT pools its patches through a CLS token in every block, a convnet by their mean at the end. SimPool does
either's work at the end, by a single step of attention that starts from the mean:

    u0 = mean of X                             (12)        a = softmax(K^T q / sqrt(d))             (15)
    q  = W_Q u0                                (13)        V = LN(X) - min LN(X)                    (16)
    K  = W_K LN(X)                             (14)        u = f^-1(f(V) a),  f(v) = v^gamma        (17)

gamma = (1 - alpha) / 2 leads from the mean (1) toward the maximum (infinity); the paper has 1.25 for ViTs, 2
for convnets. There is no value projection, so the attention has to choose; it outlines objects, they find.

The paper derives it from a framework into which other poolings fit as well, Algorithm 1, here `pool`: k
vectors U ask the patches, are answered by a generalised mean, and perhaps ask again. Its Table 2 has them as
settings; these are made from each method's own definition, and tested against it (what isn't named stays:
similarity q . k, A = 1/N, V = X, f = identity, one step):

    pooling    start U     ask                    A                         V                f^-1(f(V) A)
    gap        mean        -                      1 / N                     X                mean
    maximum    mean        -                      1 / N                     X                max
    gem        mean        -                      1 / N                     max(X, eps)      v^p
    lse        mean        -                      1 / N                     X                exp(r v)
    cross      learned     W_Q U . W_K X          softmax over patches      W_V X            mean, by heads
    kmeans     k patches   -|u - x|^2             one-hot over U, mean      X                mean, iterated
    slots      k learned   W_Q LN(U) . W_K X      softmax over U, mean      W_V X            mean, GRU, MLP
    se         mean        -                      1 / N                     gate(U) X        mean
    cbam       mean        conv7 of V             sigmoid / N               gate(U, X) X     mean
    SimPool    mean        W_Q U . W_K LN(X)      softmax over patches      LN(X) - min      v^gamma

Shapes: X (B, N, D), U (B, k, D), A (B, k, N). Where we differ from the published code: the minimum is each
image's own, not the batch's, so that an embedding doesn't depend on its batch-mates; powers are taken in
float32, relative to the maximum, so that neither they nor their gradients leave the range of numbers. Claim 7
is measured with this file. Next to read: `relvit.py`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


def pool(
    x: Tensor,
    start: Callable = lambda x: x.mean(dim=1, keepdim=True),
    query: Callable = lambda u: u,
    key: Callable = lambda x, u: x,
    similarity: Callable = lambda q, k: q @ k.transpose(-2, -1),
    attend: Callable = lambda s: torch.full_like(s, 1 / s.shape[-1]),
    value: Callable = lambda x, u: x,
    mean: Callable = lambda a, v: a @ v,
    update: Callable = lambda z, u, a: z,
    steps: int = 1,
) -> tuple[Tensor, Tensor]:
    """The pooling framework, Algorithm 1: patches (B, N, D) to vectors (B, k, D) and attention (B, k, N).

    start(x) gives the first U (B, k, D). Each step compares query(U) and key(x, U) by `similarity`, turns
    the scores (B, k, N) into weights by `attend`, takes `mean(weights, value(x, U))`, and `update` makes the
    next U of it, the old U and the weights. Queries, keys and values may have heads, (B, heads, k or N, d):
    then `update` joins them, and the attention is (B, heads, k, N).
    """
    u = start(x)
    for _ in range(steps):
        a = attend(similarity(query(u), key(x, u)))  # (B, k, N)
        u = update(mean(a, value(x, u)), u, a)  # (B, k, D)
    return u, a


def power_mean(gamma: float) -> Callable:
    """(a v^gamma)^(1/gamma) of weights a (..., k, N) and values v (..., N, D) > 0: (..., k, D), (17).

    In float32, relative to the largest value M of each dimension; a mean below M 1e-30^(1/gamma) is raised to
    that, so that its gradient stays finite.
    """

    def mean(a: Tensor, v: Tensor) -> Tensor:
        wide = torch.promote_types(v.dtype, torch.float32)
        with torch.autocast(v.device.type, enabled=False):  # which would take the product in half precision
            largest = v.detach().to(wide).amax(dim=-2, keepdim=True)  # it cancels, so it needs no gradient
            total = a.to(wide) @ (v.to(wide) / largest) ** gamma
            return (largest * total.clamp(min=1e-30) ** (1 / gamma)).to(v.dtype)

    return mean


class SimPool(nn.Module):
    """SimPool, (12)-(17): patches (B, N, D) or maps (B, D, H, W) to pooled (B, D) and attention (B, N).

    dim: D. gamma: None for the plain mean of LN(X) in (17). num_heads: attends in that many slices of the
    dimensions, each by itself; then the attention is (B, heads, N). Parameter names are the published ones.
    Raises ValueError if gamma is not within 0.1 to 10, num_heads doesn't divide dim, or x has another shape.
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

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.flatten(2).transpose(1, 2) if x.dim() == 4 else x  # (B, D, H, W) -> (B, N, D)
        if x.dim() != 3 or x.shape[2] != self.wq.in_features or not x.shape[1]:
            D = self.wq.in_features
            raise ValueError(f"SimPool pools (B, N, {D}) or (B, {D}, H, W), N > 0, not {tuple(x.shape)}")
        normed = self.norm_patches(x)
        positive = normed if self.gamma is None else normed - normed.amin(dim=(1, 2), keepdim=True) + 1e-6
        u, a = pool(
            x,
            query=lambda u: split(self.wq(u), self.num_heads),
            key=lambda x, u: split(self.wk(normed), self.num_heads),
            attend=softmax(x.shape[2] // self.num_heads),
            value=lambda x, u: split(positive, self.num_heads),
            update=lambda z, u, a: join(z),
            **({} if self.gamma is None else {"mean": power_mean(self.gamma)}),
        )
        attention = a[:, :, 0]  # (B, heads, N)
        return u[:, 0], attention[:, 0] if self.num_heads == 1 else attention


class GAP(nn.Module):
    """The mean over patches (B, N, D): pooled (B, D) and attention (B, N), 1/N each."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u, a = pool(x, **gap())
        return u[:, 0], a[:, 0]


def split(x: Tensor, heads: int) -> Tensor:
    """Vectors (B, k, D) to heads (B, heads, k, D / heads)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def join(x: Tensor) -> Tensor:
    """Heads (B, heads, k, d) to vectors (B, k, heads * d)."""
    return x.transpose(1, 2).flatten(2)


def softmax(d: int) -> Callable:
    """Scores (..., k, N) to attention over patches, (15)."""
    return lambda s: (s / math.sqrt(d)).softmax(dim=-1)


# The framework's other settings: each function gives arguments for `pool`, made of the weights handed to it.


def gap() -> dict:
    """The mean."""
    return {}


def maximum() -> dict:
    """The largest value in each dimension: the limit of v^gamma."""
    return {"mean": lambda a, v: v.amax(dim=-2, keepdim=True)}


def gem(p: float, eps: float = 1e-6) -> dict:
    """Generalised mean (Radenovic et al. 2018) of values above eps."""
    return {"value": lambda x, u: x.clamp(min=eps), "mean": power_mean(p)}


def lse(r: float) -> dict:
    """Log-sum-exp (Sun et al. 2016): 1/r log mean exp(r x)."""
    return {"mean": lambda a, v: (a.log()[..., None] + r * v[..., None, :, :]).logsumexp(dim=-2) / r}


def cross(token: Tensor, wq: nn.Module, wk: nn.Module, wv: nn.Module, heads: int = 1) -> dict:
    """A learned CLS token (1, 1, D) that looks at the patches once, as in CaiT (Touvron et al. 2021)."""
    return {
        "start": lambda x: token.expand(len(x), -1, -1),
        "query": lambda u: split(wq(u), heads),
        "key": lambda x, u: split(wk(x), heads),
        "attend": softmax(token.shape[2] // heads),
        "value": lambda x, u: split(wv(x), heads),
        "update": lambda z, u, a: join(z),
    }


def kmeans(k: int, steps: int) -> dict:
    """k-means from k patches that are spread evenly; a centre that no patch is nearest to stays."""

    def nearest(s: Tensor) -> Tensor:
        chosen = torch.zeros_like(s).scatter(1, s.argmax(dim=1, keepdim=True), 1)
        return chosen / chosen.sum(dim=2, keepdim=True).clamp(min=1)

    return {
        "start": lambda x: x[:, torch.linspace(0, x.shape[1] - 1, k).round().long()],
        "similarity": lambda q, k: -torch.cdist(q, k, compute_mode="donot_use_mm_for_euclid_dist").square(),
        "attend": nearest,
        "update": lambda z, u, a: torch.where(a.any(dim=2, keepdim=True), z, u),
        "steps": steps,
    }


def slots(
    first: Tensor,
    norm: nn.Module,
    wq: nn.Module,
    wk: nn.Module,
    wv: nn.Module,
    gru: nn.GRUCell,
    mlp: nn.Module,
) -> dict:
    """Slot attention (Locatello et al. 2020) from learned slots (1, k, D): slots compete for patches."""

    def compete(s: Tensor) -> Tensor:
        a = (s / math.sqrt(first.shape[2])).softmax(dim=1) + 1e-8
        return a / a.sum(dim=2, keepdim=True)

    def update(z: Tensor, u: Tensor, a: Tensor) -> Tensor:
        u = gru(z.flatten(0, 1), u.flatten(0, 1)).view_as(u)
        return u + mlp(u)

    return {
        "start": lambda x: first.expand(len(x), -1, -1),
        "query": lambda u: wq(norm(u)),
        "key": lambda x, u: wk(x),
        "attend": compete,
        "value": lambda x, u: wv(x),
        "update": update,
        "steps": 3,
    }


def se(mlp: nn.Module) -> dict:
    """Squeeze and excite (Hu et al. 2018): the mean tells which channels count."""
    return {"value": lambda x, u: x * mlp(u).sigmoid()}


def cbam(mlp: nn.Module, conv: nn.Module, grid: tuple[int, int]) -> dict:
    """CBAM (Woo et al. 2018): channels are weighed by mean and maximum, then positions (h, w) by a conv."""

    def gated(x: Tensor, u: Tensor) -> Tensor:
        return x * (mlp(u) + mlp(x.amax(dim=1, keepdim=True))).sigmoid()

    def score(q: Tensor, k: Tensor) -> Tensor:
        both = torch.stack([k.mean(dim=2), k.amax(dim=2)], dim=1)  # (B, 2, N)
        return conv(both.unflatten(2, grid)).flatten(2)  # (B, 1, N)

    return {
        "key": gated,
        "similarity": score,
        "attend": lambda s: s.sigmoid() / s.shape[-1],
        "value": gated,
    }
