"""A small residual network with the same face as the ViT (He et al. 2016, arXiv 1512.03385).

A stem halves the image, then stages of basic blocks follow; each stage but the first halves the map again and
doubles the width:

    y = relu(F(x) + x),   F = BN(conv(relu(BN(conv(x)))))                          (1), identity shortcut
    y = relu(F(x) + BN(W x))                                                       (2), if the shape changes

Every forward returns `Features(pooled, patches, attention)`, as `vit.py`'s does: the positions of the last
map are the patches, row by row, and `attention` holds the weights with which they were pooled, 1/N each for
the mean. BatchNorm, ReLU and the residual sums are what relevance propagation has to cope with in
convolutional networks, so this is the second model on which `isnet_lrp.py` is shown. Next to read:
`isnet_lrp.py`.
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
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_chans, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A ResNet whose every forward returns `Features`.

    embed_dim: width of the last stage, halved for each one before; depths: blocks in each stage. pool: None
    for the mean over positions, or a module that maps patches (B, N, D) to (pooled (B, D), attention (B, N)
    or (B, heads, N)). Raises ValueError if embed_dim can't be halved that often.
    """

    def __init__(
        self,
        in_chans: int = 3,
        embed_dim: int = 64,
        depths: tuple[int, ...] = (1, 1, 1),
        pool: nn.Module | None = None,
    ):
        super().__init__()
        if embed_dim % 2 ** (len(depths) - 1):
            least = 2 ** (len(depths) - 1)
            raise ValueError(f"embed_dim {embed_dim} must be a multiple of {least}, for {len(depths)} stages")
        width = embed_dim // 2 ** (len(depths) - 1)
        self.pool, self.embed_dim, self.stride = pool, embed_dim, 2 ** len(depths)
        self.conv1 = nn.Conv2d(in_chans, width, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        blocks, before = [], width
        for stage, depth in enumerate(depths):
            for i in range(depth):
                after = width * 2**stage
                blocks.append(Block(before, after, stride=2 if stage and i == 0 else 1))
                before = after
        self.blocks = nn.ModuleList(blocks)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """How many positions the last map has for images (B, C, H, W), as (rows, columns)."""
        height, width = (math.ceil(side / self.stride) for side in images.shape[-2:])
        return height, width

    def forward(self, images: Tensor, layer: int | None = -1) -> Features:
        """Encode images (B, C, H, W) of any size; layer is the ViT's, there is but one attention here."""
        x = F.relu(self.bn1(self.conv1(images)))
        for block in self.blocks:
            x = block(x)
        patches = x.flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, N, D)
        if self.pool is None:
            B, N, _ = patches.shape
            return Features(patches.mean(dim=1), patches, patches.new_full((B, 1, N), 1 / N))
        pooled, attention = self.pool(patches)
        return Features(pooled, patches, attention[:, None] if attention.dim() == 2 else attention)
