"""RelViT: a ViT learns where its patches lie, without labels (Camporese et al. 2022, arXiv 2206.00481).

Patches i and j lie at (x, y) in a grid of w columns and h rows. For each pair of patches the encoder predicts
the first three of these targets, and for each patch the last:

    relations   3 (sign(y_i - y_j) + 1) + sign(x_i - x_j) + 1                9 classes      cross-entropy
    distances   |(x_i, y_i) - (x_j, y_j)|                                    in [-1, 1]     squared error
    angles      between (x_i + w/2, y_i + h/2) and (x_j + w/2, y_j + h/2)    in [-1, 1]     squared error
    positions   y_i w + x_i                                                  N classes      cross-entropy

Scores of pairs are q_i . k_j / sqrt(d), where q and k are linear maps to d = D // classes dimensions, one
pair of maps per class. Scores of patches come from a linear layer. Distances and angles are scaled from
[0, largest] to [-1, 1]. Targets depend only on the grid, so they are built once and indexed when patches are
shuffled.

Without labels (upstream) the encoder gets no position embedding, as it would contain the answer. With labels
(joint) it has one, so the patches are shuffled. Image content that continues across a border would reveal
neighbours, so each patch is cut a little smaller, at a random place, with its own brightness and contrast.
Mega-patches are larger cells, of rows and columns with random sizes, each resized to a patch.

All of this is done by a table of `boxes`, one per patch: shuffling permutes it, and `cut` samples the patches
of a whole batch at once. Priors over an image are cut with the same boxes.

Where we differ from the published code: its scripts use relations and positions only; its joint training
classifies images whose patches are in order and unchanged (`compare` without `order`); it divides columns
into mega-patches at the same random places as rows, always between patches; its grids are square; it also
changes hue and saturation, makes some patches grey, first crops and mirrors whole images, and has dropout.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

TASKS = ("relations", "distances", "angles", "positions")


def relation_targets(rows: int, cols: int) -> dict[str, Tensor]:
    """The targets of a grid: relations (N, N), positions (N,) int64; distances, angles (N, N) float.

    Raises ValueError for a grid of less than 2x2 patches, whose relations are trivial.
    """
    if rows < 2 or cols < 2:
        raise ValueError(f"RelViT: {rows}x{cols} patches have no relations to learn; use 2x2 at least")
    y, x = (v.flatten() for v in torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij"))
    relations = 3 * ((y[:, None] - y).sign() + 1) + (x[:, None] - x).sign() + 1
    distances = torch.stack([y[:, None] - y, x[:, None] - x]).float().norm(dim=0)
    vectors = torch.stack([x + cols / 2, y + rows / 2], dim=1)
    lengths = vectors.norm(dim=1)
    cosines = vectors @ vectors.T / (lengths[:, None] * lengths + 1e-4)  # 1e-4 as published
    angles = cosines.clamp(max=1).acos().fill_diagonal_(0)  # rounding may lead above 1
    distances, angles = (2 * v / v.max() - 1 for v in (distances, angles))
    return {"relations": relations, "distances": distances, "angles": angles, "positions": y * cols + x}


def chance(targets: dict[str, Tensor]) -> dict[str, float]:
    """The score of the best constant prediction: accuracy for classes, else root mean squared error."""

    def level(t: Tensor) -> float:
        if t.is_floating_point():
            return t.std(correction=0).item()
        return t.flatten().bincount().max().item() / t.numel()

    return {task: level(t) for task, t in targets.items()}


def shuffled(targets: dict[str, Tensor], order: Tensor) -> dict[str, Tensor]:
    """Targets for patches in another order (B, N): (B, N, N), and (B, N) for positions."""
    pairs = order[:, :, None] * order.shape[1] + order[:, None, :]  # (B, N, N), indices of a flat table
    return {task: t.flatten()[order if t.dim() == 1 else pairs] for task, t in targets.items()}


def patch_boxes(
    n: int, rows: int, cols: int, generator: Generator, shrink: float = 1 / 1.15, mega: bool = False
) -> Tensor:
    """Draw where to cut patches: boxes (n, rows * cols, 4) of (top, left, height, width) in an image of 1x1.

    A box lies at a random place in its cell of the grid and has `shrink` times the cell's sides. mega: rows
    and columns have random sizes, each at least half of 1 / rows or 1 / cols.
    """

    def cells(count: int) -> tuple[Tensor, Tensor]:
        """Starts and sizes of the cells in one direction, (n, count) each."""
        sizes = torch.ones(n, count)
        if mega:
            # Exponential variables divided by their sum: all divisions are equally likely.
            drawn = -torch.rand(n, count, generator=generator).clamp(min=1e-6).log()
            sizes = 0.5 + 0.5 * count * drawn / drawn.sum(dim=1, keepdim=True)
        sizes = sizes / count
        return sizes.cumsum(dim=1) - sizes, sizes

    (top, height), (left, width) = cells(rows), cells(cols)
    corner = torch.stack([top.repeat_interleave(cols, dim=1), left.repeat(1, rows)], dim=2)  # (n, N, 2)
    sides = torch.stack([height.repeat_interleave(cols, dim=1), width.repeat(1, rows)], dim=2)
    place = torch.rand(n, rows * cols, 2, generator=generator) * (1 - shrink)
    return torch.cat([corner + place * sides, shrink * sides], dim=2)


def cut(images: Tensor, boxes: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Cut boxes (B, N, 4) out of images (B, C, H, W) and arrange them as a grid (h, w) of patches, N = h w.

    Returns (B, C, h * patch_size, w * patch_size); each pixel averages enough points to skip no image pixel,
    as many as the largest box of all needs.
    """
    H, W = images.shape[-2:]
    height, width = boxes[..., 2:].amax(dim=(0, 1)).tolist()
    finer = max(1, math.ceil(max(height * H, width * W) / patch_size - 1e-3))  # points along a pixel's side
    p = patch_size * finer
    steps = (torch.arange(p, device=boxes.device) + 0.5) / p
    points = boxes[:, :, None, :2] + boxes[:, :, None, 2:] * steps[:, None]  # (B, N, p, 2): y, x
    y, x = points[:, :, :, None, 0], points[:, :, None, :, 1]
    points = torch.stack(torch.broadcast_tensors(x, y), dim=-1)  # (B, N, p, p, 2)
    points = points.unflatten(1, grid).transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (B, h p, w p, 2)
    kind = torch.promote_types(images.dtype, torch.float32)  # in half precision, points would be pixels off
    points = (2 * points - 1).to(images.device, kind)
    pixels = F.grid_sample(images.to(kind), points, padding_mode="border", align_corners=False)
    return F.avg_pool2d(pixels, finer).to(images.dtype)


def jitter(views: Tensor, patch_size: int, generator: Generator, strength: float = 0.4) -> Tensor:
    """Change brightness and contrast of each patch of views (B, C, H, W) in [0, 1], within [0, 1].

    Four of five patches are changed, by up to `strength`.
    """
    patches = views.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # (B, C, h, p, w, p)
    shape = (len(views), 1, patches.shape[2], 1, patches.shape[4], 1)
    chosen = (torch.rand(shape, generator=generator) < 0.8).float()
    brightness, contrast = (
        (1 + strength * chosen * (2 * torch.rand(shape, generator=generator) - 1)).to(views) for _ in range(2)
    )
    mean = patches.mean(dim=(1, 3, 5), keepdim=True)
    changed = (brightness * (mean + contrast * (patches - mean))).clamp(0, 1)
    return changed.flatten(4, 5).flatten(2, 3)


def patch_views(
    images: Tensor, grid: tuple[int, int], patch_size: int, generator: Generator, mega: bool = False,
    shuffle: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """A view of each image (B, C, H, W) in [0, 1], whose patches are cut and changed one by one.

    Normalise the views, not the images: values outside [0, 1] are clamped.
    Returns views (B, C, h * patch_size, w * patch_size), the boxes (B, N, 4) that they were cut from, and, if
    shuffled, the order (B, N): place n of the grid holds patch order[n].
    """
    order = None
    boxes = patch_boxes(len(images), *grid, generator, mega=mega)
    if shuffle:
        order = torch.rand(boxes.shape[:2], generator=generator).argsort(dim=1)
        boxes = boxes.gather(1, order[:, :, None].expand(-1, -1, 4))
        order = order.to(images.device)
    boxes = boxes.to(images.device)
    return jitter(cut(images, boxes, grid, patch_size), patch_size, generator), boxes, order


class PairScores(nn.Module):
    """Scores q_i . k_j / sqrt(d) of all pairs for K classes: patches (B, N, D) to (B, K, N, N)."""

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.classes, self.width = classes, dim // classes
        self.q = nn.Linear(dim, classes * self.width, bias=False)
        self.k = nn.Linear(dim, classes * self.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (m(x).unflatten(2, (self.classes, -1)).transpose(1, 2) for m in (self.q, self.k))
        return q @ k.transpose(-2, -1) / math.sqrt(self.width)


class RelViT(nn.Module):
    """An encoder, such as `vit.ViT`, and heads that predict from its patches (B, N, D) where they lie.

    grid: (rows, columns) of the views. `chance` holds what a constant prediction reaches. Without labels, set
    the encoder's position embedding to zero: it is not trained. Raises ValueError for no tasks or an unknown
    one, a grid of less than 2x2, or an embed_dim below 9 with the task relations.
    """

    def __init__(
        self, encoder: nn.Module, embed_dim: int, grid: tuple[int, int], tasks: Sequence[str] = TASKS
    ):
        super().__init__()
        wrong = [f"unknown task '{task}'" for task in tasks if task not in TASKS] if tasks else ["no task"]
        if wrong:
            raise ValueError(f"RelViT: {wrong[0]}; choose from {', '.join(TASKS)}")
        if embed_dim < 9 and "relations" in tasks:
            raise ValueError(f"RelViT: embed_dim {embed_dim} is too small for 9 relations")
        self.encoder, self.grid, self.tasks = encoder, grid, tuple(tasks)
        targets = relation_targets(*grid)
        self.chance = {task: value for task, value in chance(targets).items() if task in tasks}
        self.heads = nn.ModuleDict()
        for t in tasks:
            self.register_buffer(f"target_{t}", targets[t], persistent=False)
            pairs = {"relations": 9, "distances": 1, "angles": 1}.get(t)
            self.heads[t] = PairScores(embed_dim, pairs) if pairs else nn.Linear(embed_dim, math.prod(grid))

    def forward(self, views: Tensor, order: Tensor | None = None, layer: int = -1) -> tuple:
        """Without labels and positions: views (B, C, H, W) to (loss, metrics) of `compare` and Features."""
        features = self.encoder(views, layer=layer, positions=False)
        return *self.compare(features.patches, order), features

    def compare(self, patches: Tensor, order: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the tasks' losses for patches (B, N, D), shuffled by `order` (B, N), and their metrics.

        Metrics are the accuracy of relations and positions, and the root mean squared error of the others.
        """
        targets = {task: getattr(self, f"target_{task}") for task in self.tasks}
        targets = targets if order is None else shuffled(targets, order)
        loss, metrics = patches.new_zeros(()), {}
        for task, target in targets.items():
            scores = self.heads[task](patches)  # (B, 9 or 1, N, N), or (B, N, N) for positions
            scores = scores.transpose(1, 2) if task == "positions" else scores  # classes first
            target = target.expand(scores[:, 0].shape)
            if target.is_floating_point():
                error = F.mse_loss(scores[:, 0], target)
                metrics[task] = error.detach().sqrt()
            else:
                error = F.cross_entropy(scores, target)
                as_high = scores.detach() >= scores.detach().gather(1, target[:, None])
                metrics[task] = (as_high.sum(dim=1) == 1).float().mean()  # as argmax, but a tie is a miss
            loss = loss + error
        return loss, metrics


if __name__ == "__main__":
    from common import chapters

    chapters.relvit()  # prints a few facts and draws relvit.png
