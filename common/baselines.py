"""What ISNet is compared with: six other ways to keep a classifier off the background, each in a few lines.

Each sees the same images x, masks m (1 in the foreground) and labels y, trains the same encoder for as long,
and adds a penalty to the classification loss, L = L_class + weight * penalty:

    multitask   also segments: binary cross-entropy of each patch's logit with the share of the mask in it
    gated       attention gates pool the patches (Schlemper et al. 2019, arXiv 1808.08114), without masks:
                a_n = softmax_n w . relu(W_x x_n + W_g g),  g = mean_n x_n                            (1)
    gain        Grad-CAM that has to fit the mask, and to leave nothing out that tells (Li et al. 2018, arXiv
                1802.10171): A = relu(sum_d mean_n(ds/dx_nd) x_d),  T = sigmoid(10 (A - 1/2))         (2)
                penalty = p_y(x - T x) + 10 mean (A - m)^2
    rrr         right for the right reasons (Ross et al. 2017, arXiv 1703.03717): the gradient at the input
                penalty = sum ((1 - m) d/dx sum_k log p_k)^2                                          (3)
    pipeline    a segmenter, whose mask is all that a classifier sees in use, where both are needed; both
                learn at once, the classifier from the masks that are given
    swap        no penalty: whatever is no foreground comes from another image of the batch

`multitask`, `gain`, `rrr` and `pipeline` return logits (B, K) and a penalty (B,). Ours, to keep them short:
one gate, at the end, with a softmax, where the authors' network has several, normalised by minimum and sum;
A scaled to its largest value, and taken at the last block's input; a segmenter as coarse as the patches.
Next to read: `pretrain.py`.
"""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class AttentionGate(nn.Module):
    """Pooling by an attention gate, equation (1): patches (B, N, D) to pooled (B, D), attention (B, N)."""

    def __init__(self, dim: int):
        super().__init__()
        self.x, self.g = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim)
        self.w = nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate = F.relu(self.x(x) + self.g(x.mean(dim=1, keepdim=True)))  # (B, N, D)
        attention = self.w(gate)[:, :, 0].softmax(dim=1)
        return (attention[:, None] @ x)[:, 0], attention


class Segmenter(nn.Module):
    """An encoder that tells of each patch whether it lies in the foreground: images to logits (B, h, w)."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.embed_dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images).patches)[..., 0].unflatten(1, self.encoder.grid(images))


class Pipeline(nn.Module):
    """Segment, then classify what is left: images (B, C, H, W) to logits (B, K)."""

    def __init__(self, classifier: nn.Module, segmenter: Segmenter):
        super().__init__()
        self.classifier, self.segmenter, self.encoder = classifier, segmenter, classifier.encoder

    def forward(self, images: Tensor) -> Tensor:
        logits = self.segmenter(images)[:, None]
        masks = F.interpolate(logits, size=images.shape[2:], mode="bilinear") > 0
        return self.classifier(images * masks)


def overlap_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Binary cross-entropy (B,) of patch logits (B, h, w) with the share of masks (B, 1, H, W) in them."""
    share = F.adaptive_avg_pool2d(masks, logits.shape[1:])[:, 0]
    return F.binary_cross_entropy_with_logits(logits, share, reduction="none").mean(dim=(1, 2))


def multitask(model: nn.Module, x: Tensor, m: Tensor, y: Tensor, one_class: bool) -> tuple[Tensor, Tensor]:
    """The model has a `segmenter`, a linear layer on the encoder's patches."""
    features = model.encoder(x)
    patches = model.segmenter(features.patches)[..., 0].unflatten(1, model.encoder.grid(x))
    return model.head(features.pooled), overlap_loss(patches, m)


def pipeline(model: Pipeline, x: Tensor, m: Tensor, y: Tensor, one_class: bool) -> tuple[Tensor, Tensor]:
    """The classifier sees the true masks' foreground, of an image without mask the segmenter's."""
    known = m.flatten(1).any(dim=1)[:, None, None, None]
    patches = model.segmenter(x)
    own = F.interpolate(patches[:, None].detach(), size=x.shape[2:], mode="bilinear") > 0
    return model.classifier(x * torch.where(known, m, own.to(m))), overlap_loss(patches, m)


def log_probabilities(logits: Tensor, one_class: bool) -> Tensor:
    """Log p (B, K, 2 or 1): of each class, or of each finding's presence and absence."""
    if one_class:
        return logits.log_softmax(dim=1)[..., None]
    return torch.stack([F.logsigmoid(logits), F.logsigmoid(-logits)], dim=-1)


def grad_cam(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, K) and the Grad-CAM of the labels' logits, A of (2), (B, 1, h, w) in [0, 1], to train with.

    At the input of the encoder's last block: after it, only the CLS token of a ViT goes on.
    """
    seen: list[Tensor] = []
    hook = model.encoder.blocks[-1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with sdpa_kernel(SDPBackend.MATH):  # the faster kernels can't be differentiated twice
        logits = model(x)
    hook.remove()
    maps, score = seen[0], (logits * y.nan_to_num()).sum()
    (gradient,) = torch.autograd.grad(score, maps, create_graph=True)
    if maps.dim() == 3:  # tokens: those of the N patches come last
        h, w = model.encoder.grid(x)
        maps, gradient = (t[:, -h * w :].transpose(1, 2).unflatten(2, (h, w)) for t in (maps, gradient))
    A = F.relu((gradient.mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1, keepdim=True))
    return logits, A / A.amax(dim=(2, 3), keepdim=True).clamp_min(1e-6)


def gain(model: nn.Module, x: Tensor, m: Tensor, y: Tensor, one_class: bool) -> tuple[Tensor, Tensor]:
    """Grad-CAM fits the mask, equation (2), and what it leaves out does not tell the label."""
    logits, A = grad_cam(model, x, y)
    T = torch.sigmoid(10 * (F.interpolate(A, size=x.shape[2:], mode="bilinear") - 0.5))
    left = log_probabilities(model(x - T * x), one_class)[..., 0].exp()  # (B, K)
    mining = (left * y.nan_to_num()).sum(dim=1)
    fit = (A - F.adaptive_avg_pool2d(m, A.shape[2:])).square().mean(dim=(1, 2, 3))
    return logits, mining + 10 * fit


def rrr(model: nn.Module, x: Tensor, m: Tensor, y: Tensor, one_class: bool) -> tuple[Tensor, Tensor]:
    """The gradient at the input vanishes outside the mask, equation (3)."""
    x = x.detach().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        logits = model(x)
    score = log_probabilities(logits, one_class).sum()
    (gradient,) = torch.autograd.grad(score, x, create_graph=True)
    return logits, ((1 - m) * gradient).square().sum(dim=(1, 2, 3))


def swapped(x: Tensor, m: Tensor, generator: Generator) -> Tensor:
    """Images (B, C, H, W), all but the foreground from another one; those without mask stay as they are.

    What is taken may hold parts of the other's foreground: nothing is filled in. One image a batch, on
    average, meets itself.
    """
    other = x[torch.randperm(len(x), generator=generator).to(x.device)]
    masked = m.flatten(1).any(dim=1)[:, None, None, None]
    return torch.where(masked, x * m + other * (1 - m), x)


PENALTIES = {"multitask": multitask, "gain": gain, "rrr": rrr, "pipeline": pipeline}
BASELINES = [*PENALTIES, "gated", "swap"]
