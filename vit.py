"""A Vision Transformer that returns its attention (Dosovitskiy et al. 2020, arXiv 2010.11929).

An image is cut into N patches, each patch becomes a token, a CLS token is put in front, and `depth` pre-norm
blocks transform the T = N + 1 tokens (equations numbered as in the paper):

    z_0  = [x_cls; x_1 E; ...; x_N E] + E_pos                                       (1)
    z'_l = MSA(LN(z_{l-1})) + z_{l-1},   z_l = MLP(LN(z'_l)) + z'_l                 (2), (3)
    y    = LN(z_L)                                                                  (4)
    [q, k, v] = z U_qkv,   A = softmax(q k^T / sqrt(d)),   SA(z) = A v              (5), (6), (7)
    MSA(z) = [SA_1(z); ...; SA_h(z)] U_msa   for h heads of dimension d = D / h     (8)

Every forward returns `Features(pooled, patches, attention)`. `attention` is the CLS row of A in one block:
the weights with which each head pooled the image. `F.scaled_dot_product_attention` never forms A, so this row
is computed separately: softmax(q_cls k^T / sqrt(d)) takes O(N) time and memory instead of O(N^2), and is
differentiable. `attention_maps` returns the full A of every block.

Parameter names and numerics (LayerNorm eps 1e-6, exact GELU) are those of the DINO release, whose state dicts
load with strict=True once the head is dropped (timm uses the same names). Where we differ: position
embeddings are resized to the exact grid; DINO's code adds 0.1 to the grid's sides.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Features(NamedTuple):
    """What an encoder returns: pooled (B, D), patches (B, N, D) row by row, attention (B, heads, N).

    The last two may be None if they were not requested. `attention` is the CLS token's softmax row without
    the columns of CLS and registers, not renormalised: a head that looks at these sums to less than 1.
    """

    pooled: Tensor
    patches: Tensor | None
    attention: Tensor | None


def resized(positions: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Position embeddings (1, T, D) of a grid (h, w), resized bicubically; one for CLS before them stays."""
    if new_grid == grid:
        return positions
    cls, patches = positions.tensor_split([positions.shape[1] - math.prod(grid)], dim=1)
    patches = patches.transpose(1, 2).unflatten(2, grid)  # (1, D, h, w)
    patches = F.interpolate(patches, size=new_grid, mode="bicubic", align_corners=False)
    return torch.cat([cls, patches.flatten(2).transpose(1, 2)], dim=1)


class PatchEmbed(nn.Module):
    """Images (B, C, H, W) to patch tokens (B, N, D), equation (1): a convolution with stride = kernel."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, N, D)


class Attention(nn.Module):
    """Multi-head self-attention, equations (5)-(8), which can return the first token's attention."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, T, D) to q, k, v, each (B, heads, T, d) with d = D / heads."""
        B, T, D = x.shape
        return self.qkv(x).view(B, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4).unbind()

    def forward(self, x: Tensor, row: bool = False, first: bool = False) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, T, D) to tokens (B, T, D), or if `first` to the first alone (B, 1, D).

        row: whether the first token's attention (B, heads, T) is returned, too.
        """
        q, k, v = self.split(x)
        q = q[:, :, :1] if first else q
        if x.is_cuda or q.dtype != torch.bfloat16:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:  # on CPUs its backward pass is several times slower in bfloat16
            with torch.autocast(x.device.type, enabled=False):
                mixed = F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)
        mixed = mixed.transpose(1, 2).flatten(2)  # (B, T, D)
        attention = self.weights(q[:, :, :1], k)[:, :, 0] if row else None  # (B, heads, T)
        return self.proj(mixed), attention

    @staticmethod
    def weights(q: Tensor, k: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(d)) for queries (B, heads, Q, d): (B, heads, Q, T), equation (6)."""
        return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)


class MLP(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """One pre-norm transformer block, equations (2) and (3), with stochastic depth (Huang et al. 2016)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.drop_path = drop_path

    def keep(self, branch: Tensor) -> Tensor:
        """Drop each image's branch (B, T, D) with probability drop_path, and scale up those that are kept."""
        if not self.training or self.drop_path == 0:
            return branch
        kept = torch.rand(len(branch), 1, 1) >= self.drop_path  # drawn by the CPU's generator on any device
        return branch * kept.to(branch.device) / (1 - self.drop_path)

    def forward(self, x: Tensor, row: bool = False, first: bool = False) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, T, D) to tokens and the first one's attention, as `Attention.forward` has them."""
        mixed, attention = self.attn(self.norm1(x), row, first)
        x = (x[:, :1] if first else x) + self.keep(mixed)
        return x + self.keep(self.mlp(self.norm2(x))), attention


class ViT(nn.Module):
    """A Vision Transformer whose forward returns `Features`, including attention.

    img_size: side of the training images in pixels, or (height, width); it sets the size of the position
    embedding, which is resized for other images. pool: None for a CLS token, or a module that maps patches
    (B, N, D), before the last LayerNorm, to (pooled (B, D), attention (B, N) or (B, heads, N)); then there is
    no CLS token, and the module's linear layers are initialised anew. registers: how many tokens without a
    position follow CLS; they are not returned (Darcet et al. 2023, arXiv 2309.16588). drop_path, in [0, 1):
    stochastic depth of the last block; the first has 0. Raises ValueError if patch_size does not divide
    img_size, or num_heads does not divide embed_dim.
    """

    def __init__(
        self, img_size: int | tuple[int, int] = 224, patch_size: int = 16, in_chans: int = 3,
        embed_dim: int = 384, depth: int = 12, num_heads: int = 6, mlp_ratio: float = 4.0,
        drop_path: float = 0.0, pool: nn.Module | None = None, registers: int = 0,
    ):  # fmt: skip
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}: change one")
        self.patch_size, self.embed_dim, self.num_heads, self.depth = patch_size, embed_dim, num_heads, depth
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.native_grid = self._grid(height, width)
        self.pool, self.registers = pool, registers
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        if pool is None:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        if registers:
            self.reg_token = nn.Parameter(torch.randn(1, registers, embed_dim) * 1e-6)
        self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(self.native_grid) + (pool is None), embed_dim))
        rates = torch.linspace(0, drop_path, depth).tolist()  # deeper blocks are dropped more often
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, rate) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.init_weights()

    def init_weights(self) -> None:
        """As in the DINO release: truncated normal, std 0.02, for linear layers, embeddings; biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.pool is None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        p = self.patch_size
        for side in (height, width):
            if side % p or side < p:
                near = " or ".join(str(n * p) for n in (side // p, side // p + 1) if n)
                wrong = f"an image of {height}x{width} px cannot be cut into patches of {p} px"
                raise ValueError(f"{wrong}: use a multiple of {p}, such as {near}")
        return height // p, width // p

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns (h, w) of the patches of images (B, C, H, W); N = h * w. Raises ValueError."""
        return self._grid(*images.shape[-2:])

    def embed(self, images: Tensor, positions: bool = True) -> Tensor:
        """Images (B, C, H, W) to input tokens (B, T, D), equation (1)."""
        grid = self.grid(images)
        x = self.patch_embed(images)  # (B, N, D)
        if self.pool is None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + N, D)
        # A sum with positions is in float32 under autocast, so tokens without them are made so, too.
        x = x + resized(self.pos_embed, self.native_grid, grid) if positions else x.to(self.pos_embed)
        if self.registers:
            extra = int(self.pool is None)  # the CLS token stays first
            registers = self.reg_token.expand(len(x), -1, -1)
            x = torch.cat([x[:, :extra], registers, x[:, extra:]], dim=1)  # (B, 1 + R + N, D)
        return x

    def forward(
        self, images: Tensor, layer: int | None = -1, positions: bool = True, patches: bool = True
    ) -> Features:
        """Encode images (B, C, H, W), H and W multiples of patch_size; raises ValueError for other sizes.

        layer: the block whose CLS row is returned as `attention`, -1 for the last (IndexError beyond depth);
        None for no attention. positions: False leaves out the position embedding, which would give RelViT's
        targets away. patches: False if not needed; the last block then transforms a CLS token alone.
        """
        x, attention = self.embed(images, positions), None
        cls = self.pool is None
        exposed = range(self.depth)[layer] if cls and layer is not None else None  # whose CLS row is returned
        alone = self.depth - 1 if cls and not patches else None  # the block that transforms CLS alone
        for i, block in enumerate(self.blocks):
            x, row = block(x, row=i == exposed, first=i == alone)
            attention = row[:, :, 1 + self.registers :] if i == exposed else attention  # (B, heads, N)
        if self.pool is None:
            x = self.norm(x)
            return Features(x[:, 0], x[:, 1 + self.registers :] if patches else None, attention)
        x = x[:, self.registers :]
        pooled, attention = self.pool(x)  # equation (4) follows, as in SimPool's self-supervised release
        attention = attention[:, None] if attention.dim() == 2 else attention  # (B, heads, N)
        return Features(self.norm(pooled), self.norm(x) if patches else None, attention)

    @torch.no_grad()
    def attention_maps(self, images: Tensor) -> Tensor:
        """The full attention A of every block for images (B, C, H, W): (B, depth, heads, T, T)."""
        x, maps = self.embed(images), []
        for block in self.blocks:
            q, k, _ = block.attn.split(block.norm1(x))
            maps.append(Attention.weights(q, k))
            x, _ = block(x)
        return torch.stack(maps, dim=1)


if __name__ == "__main__":
    from common import chapters

    chapters.vit()  # prints a few facts and draws vit.png
