"""A small residual network with the interface of `vit.py` (He et al. 2016, arXiv 1512.03385).

A stem halves the image, then come stages of basic blocks; each stage after the first halves the map and
doubles the width:

    y = relu(F(x) + x),   F = BN(conv(relu(BN(conv(x)))))                          (1), identity shortcut
    y = relu(F(x) + BN(W x))                                                       (2), if the shape changes

Every forward returns `Features(pooled, patches, attention)`: the positions of the last map are the patches,
row by row, and `attention` holds the weights that pooled them, 1/N each for the mean.
"""

import math
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


class Features(NamedTuple):
    """What an encoder returns: pooled (B, D), patches (B, N, D) row by row, attention (B, heads, N)."""

    pooled: Tensor
    patches: Tensor
    attention: Tensor


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, (1) and (2); a stride of 2 halves (B, C, H, W)."""

    def __init__(self, in_chans: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride > 1 or in_chans != width:
            projection = nn.Conv2d(in_chans, width, 1, stride, bias=False)
            self.shortcut.extend([projection, nn.BatchNorm2d(width)])

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A ResNet whose forward returns `Features`.

    embed_dim: width of the last stage; each earlier stage has half the next one's. depths: blocks in each
    stage. pool: None for the mean over positions, or a module that maps patches (B, N, D) to (pooled (B, D),
    attention (B, N) or (B, heads, N)). Raises ValueError if embed_dim cannot be halved that often.
    """

    def __init__(
        self, in_chans: int = 3, embed_dim: int = 64, depths: tuple[int, ...] = (1, 1, 1),
        pool: nn.Module | None = None,
    ):  # fmt: skip
        super().__init__()
        widening = 2 ** (len(depths) - 1)
        if embed_dim % widening:
            raise ValueError(f"embed_dim {embed_dim} must be a multiple of {widening}: {len(depths)} stages")
        width = embed_dim // widening
        self.pool, self.embed_dim, self.stride = pool, embed_dim, 2 ** len(depths)
        self.conv1 = nn.Conv2d(in_chans, width, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.blocks = nn.ModuleList()
        for stage, depth in enumerate(depths):
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1  # where the map is halved, the width doubles
                self.blocks.append(Block(width, width * stride, stride))
                width = width * stride

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns (h, w) of the last map for images (B, C, H, W), rounded up; N = h * w."""
        return tuple(math.ceil(side / self.stride) for side in images.shape[-2:])

    def forward(self, images: Tensor, layer: int | None = -1, patches: bool = True) -> Features:
        """Encode images (B, C, H, W) of any size. `layer` and `patches` are for the ViT and are ignored."""
        x = F.relu(self.bn1(self.conv1(images)))
        for block in self.blocks:
            x = block(x)
        x = x.flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, N, D)
        if self.pool is None:
            B, N, _ = x.shape
            return Features(x.mean(dim=1), x, x.new_full((B, 1, N), 1 / N))
        pooled, attention = self.pool(x)
        return Features(pooled, x, attention[:, None] if attention.dim() == 2 else attention)
