"""What ISNet is compared with: six other ways to keep a classifier off the background, a few lines each.

The loss, of images x, masks m (1 in the foreground) and labels y, is L = L_class + weight * penalty:

    multitask   also segments: binary cross-entropy of a logit per patch with the patch's masked fraction
    gated       attention gates pool the patches (Schlemper et al. 2019, arXiv 1808.08114), without masks:
                a_n = softmax_n w . relu(W_x x_n + W_g g),  g = mean_n x_n                            (1)
    gain        Grad-CAM A fits the mask, and nothing else predicts the label (Li et al. 2018, 1802.10171):
                A = relu(sum_d mean_n(ds/dx_nd) x_d),  T = sigmoid(10 (A - 1/2))                      (2)
                penalty = p_y(x - T x) + 10 mean (A - m)^2
    rrr         right for the right reasons: no gradient outside the mask (Ross et al. 2017, 1703.03717):
                penalty = sum ((1 - m) d/dx sum_k log p_k)^2                                          (3)
    pipeline    a segmenter hides the background from a classifier, which is trained with the given masks
    swap        no penalty: the background is that of another image of the batch, its foreground filled

Where we differ, for brevity: one gate, at the end, with a softmax (published: several, normalised by minimum
and sum); A is divided by its maximum, and in a ViT taken at the last block's input; if there is one finding,
its absence is a class too; a segmenter has a logit per patch, not per pixel, and the classifier behind it is
trained with the given masks.
"""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from common.backgrounds import others, without_foreground
from vit import ViT


class AttentionGate(nn.Module):
    """Pooling by an attention gate, equation (1): patches (B, N, D) to pooled (B, D), attention (B, N)."""

    def __init__(self, dim: int):
        super().__init__()
        self.x, self.g, self.w = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim), nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate = F.relu(self.x(x) + self.g(x.mean(dim=1, keepdim=True)))  # (B, N, D)
        attention = self.w(gate)[:, :, 0].softmax(dim=1)
        return (attention[:, None] @ x)[:, 0], attention


class Segmenter(nn.Module):
    """An encoder and a logit per patch, positive in the foreground: images (B, C, H, W) to (B, h, w)."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.embed_dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images).patches)[..., 0].unflatten(1, self.encoder.grid(images))


class Pipeline(nn.Module):
    """Segment, then classify the foreground: images (B, C, H, W) to logits (B, K)."""

    def __init__(self, classifier: nn.Module, segmenter: Segmenter):
        super().__init__()
        self.classifier, self.segmenter, self.encoder = classifier, segmenter, classifier.encoder

    def foreground(self, images: Tensor) -> Tensor:
        """The masks (B, 1, H, W) bool that the segmenter finds."""
        return F.interpolate(self.segmenter(images)[:, None], size=images.shape[2:], mode="bilinear") > 0

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(images * self.foreground(images))


def overlap_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Binary cross-entropy (B,) of patch logits (B, h, w) with the masked fraction, masks (B, 1, H, W)."""
    fraction = F.adaptive_avg_pool2d(masks, logits.shape[1:])[:, 0]
    return F.binary_cross_entropy_with_logits(logits, fraction, reduction="none").mean(dim=(1, 2))


def multitask(model: nn.Module, x: Tensor, m: Tensor, y: Tensor, multiclass: bool) -> tuple[Tensor, Tensor]:
    """Classify and segment; model.segmenter is a linear layer on the encoder's patches."""
    features = model.encoder(x)
    patches = model.segmenter(features.patches)[..., 0].unflatten(1, model.encoder.grid(x))
    return model.head(features.pooled), overlap_loss(patches, m)


def pipeline(model: Pipeline, x: Tensor, m: Tensor, y: Tensor, multiclass: bool) -> tuple[Tensor, Tensor]:
    """The classifier sees the foreground of the given mask, or of the segmenter's where none is given."""
    known = m.flatten(1).any(dim=1)[:, None, None, None]
    patches = model.segmenter(x)
    own = F.interpolate(patches[:, None].detach(), size=x.shape[2:], mode="bilinear") > 0
    return model.classifier(x * torch.where(known, m, own.to(m))), overlap_loss(patches, m)


def log_probabilities(logits: Tensor, multiclass: bool) -> Tensor:
    """Log p of logits (B, K): (B, K, 1) of classes, or (B, K, 2) of each finding's presence and absence."""
    if multiclass:
        return logits.log_softmax(dim=1)[..., None]
    return torch.stack([F.logsigmoid(logits), F.logsigmoid(-logits)], dim=-1)


class ImagesApart(TorchFunctionMode):
    """BatchNorms treat the batch's statistics as constants and do not update their running statistics.

    The gradient at one image then does not depend on the others, and a penalty can't be lowered through batch
    statistics, which are not used at test time. Images made for a penalty don't enter the running statistics.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.batch_norm and kwargs["training"]:
            x, *_ = args  # the others are the running mean and variance
            channels = [d for d in range(x.dim()) if d != 1]
            variance, mean = torch.var_mean(x.detach(), channels, correction=0)
            args, kwargs = (x, mean, variance), kwargs | {"training": False}
        return function(*args, **kwargs)


def grad_cam(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The labels' Grad-CAM, A of (2), (B, 1, h, w) in [0, 1], with a gradient.

    It is taken at the last block's output; in a ViT at its input, since only the output's CLS token is used.
    """
    seen, last, vit = [], model.encoder.blocks[-1], isinstance(model.encoder, ViT)
    # The faster kernels of attention cannot be differentiated twice.
    with last.register_forward_hook(lambda *call: seen.extend(call)), sdpa_kernel(SDPBackend.MATH):
        score = (model(x) * y.nan_to_num()).sum()
    _, (inputs, *_), output = seen
    maps = inputs if vit else output
    (gradient,) = torch.autograd.grad(score, maps, create_graph=True)
    if vit:  # tokens (B, T, D); the N patches come last
        h, w = model.encoder.grid(x)
        maps, gradient = (t[:, -h * w :].transpose(1, 2).unflatten(2, (h, w)) for t in (maps, gradient))
    A = F.relu((gradient.mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1, keepdim=True))
    return A / A.amax(dim=(2, 3), keepdim=True).clamp_min(1e-6)


def gain(model: nn.Module, x: Tensor, m: Tensor, y: Tensor, multiclass: bool) -> tuple[Tensor, Tensor]:
    """Grad-CAM fits the mask, equation (2), and what it leaves out does not predict the label."""
    logits = model(x)
    with ImagesApart():
        A = grad_cam(model, x, y)
        T = torch.sigmoid(10 * (F.interpolate(A, size=x.shape[2:], mode="bilinear") - 0.5))
        p = log_probabilities(model(x - T * x), multiclass)[..., 0].exp()  # (B, K)
    mining = (p * y.nan_to_num()).sum(dim=1)
    fit = (A - F.adaptive_avg_pool2d(m, A.shape[2:])).square().mean(dim=(1, 2, 3))
    return logits, mining + 10 * fit


def rrr(model: nn.Module, x: Tensor, m: Tensor, y: Tensor, multiclass: bool) -> tuple[Tensor, Tensor]:
    """The gradient at the input vanishes outside the mask, equation (3)."""
    logits, x = model(x), x.detach().requires_grad_()
    with ImagesApart(), sdpa_kernel(SDPBackend.MATH):
        total = log_probabilities(model(x), multiclass).sum()
    (gradient,) = torch.autograd.grad(total, x, create_graph=True)
    return logits, ((1 - m) * gradient).square().sum(dim=(1, 2, 3))


def grown(m: Tensor, r: int) -> Tensor:
    """Masks (B, 1, H, W) grown by r pixels to all sides: along columns, then rows, which is faster."""
    return F.max_pool2d(F.max_pool2d(m, (2 * r + 1, 1), 1, (r, 0)), (1, 2 * r + 1), 1, (0, r))


def swapped(x: Tensor, m: Tensor, generator: Generator, share: float = 1.0, margin: int = 0) -> Tensor:
    """Images (B, C, H, W), a share of them with another one's background. Where m is empty, all is replaced.

    The other image's foreground is filled with background, so that no second heart appears. A batch of one
    image keeps its background. margin: pixels by which the kept foreground is narrower than m, so that none
    of the old background shows where a mask is a little too wide. Parts too thin for this margin are kept if
    they lie more than two margins from the rest of the kept foreground.
    """
    other = without_foreground(x, m)[others(torch.arange(len(x)), generator).to(x.device)]
    chosen = torch.ones(len(x), dtype=torch.bool)
    if share < 1:
        chosen = torch.rand(len(x), generator=generator) < share
    core = 1 - grown(1 - m, margin)
    core = torch.maximum(core, m * (1 - grown(core, 2 * margin)))
    return torch.where(chosen.to(x.device)[:, None, None, None], x * core + other * (1 - core), x)


# Each maps the model, images, masks, labels (B, K) and multiclass to logits (B, K) and a penalty (B,).
PENALTIES = {"multitask": multitask, "gain": gain, "rrr": rrr, "pipeline": pipeline}
BASELINES = [*PENALTIES, "gated", "swap"]
