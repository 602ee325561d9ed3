"""DINO: self-distillation without labels (Caron et al. 2021, arXiv 2104.14294), and a collapse monitor.

A student g_s and a teacher g_t, each an encoder and a head, see different views V of an image (x_1^g, x_2^g:
global). The student learns to predict the teacher's distribution over K prototypes; the teacher's weights
are a moving average of the student's. (1), (3), (4) have the paper's numbers; its (2) is (3) for two views:

    P_s = softmax(g_s(x) / tau_s),   P_t = softmax((g_t(x) - c) / tau_t)                     (1)
    min  sum over x in {x_1^g, x_2^g}, x' in V, x' != x  of  H(P_t(x), P_s(x')),  H(a, b) = -a log b     (3)
    c       <- m c + (1 - m) mean_i g_t(x_i)                                                             (4)
    theta_t <- lambda theta_t + (1 - lambda) theta_s

Centring (c) and sharpening (small tau_t) balance each other. Without this balance DINO collapses: all images
get the same output, which the loss does not show. `CollapseMonitor` tracks the entropy h(P_t) (in a collapse:
near log K if centring won, low if sharpening won), the KL of P_t from the mean P_t (how much an output says
about its image: 0 in a collapse, at least f log K in a healthy run, f = 0.02), and the number of prototypes
in use. Two additions, off unless asked for, work against a collapse. KoLeo (1806.03198) spreads the features
z of a batch; DINOv2 adds it up over two views, here it is their mean. h(P_t) is about
log K - (s / tau_t)^2 / 2, where s is the standard deviation of logits; tau_t falls to keep it below about
eta log K (eta: `max_entropy`). A slow c would leave one offset in all logits, and one prototype would win at
a low tau_t; so c follows each batch: (8).

    L_KoLeo = -mean_i log min_(j != i) |z_i - z_j|,  |z| = 1,  weighted by w                             (5)
    tau_t   = min(tau_t, s / sqrt(2 w (1 - eta) log K)),  so mean h(P_t) <~ (1 - w (1 - eta)) log K      (6)
    w       = 3 - KL / (f log K), clamped to [0, 1]: at a large KL both additions harm the features      (7)
    c       <- c + w (mean_i g_t(x_i) - c)  in each step before (1) and (6), if eta < 1                  (8)

`DINOHead` has the published names. Where we differ, for short runs: tau_t has no warm-up; the last layer is
not frozen, its rows `weight_v` start shorter, to turn faster; weight decay is constant; gradients are clipped
by their joint norm; stochastic depth is off by default (there: 0.1); the student is kept, not the teacher.
"""

import copy
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class WeightNormLinear(nn.Module):
    """A linear layer whose rows have length g, fixed at 1 here: prototypes differ only in direction."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=False)
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        nn.init.trunc_normal_(self.weight_v, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # in bfloat16, near scores would be the same
            return F.linear(x.to(self.weight_v), self.weight_g * F.normalize(self.weight_v, dim=1))


class DINOHead(nn.Module):
    """Features (B, in_dim) to scores (B, out_dim): an MLP, normalisation, and cosines with K prototypes."""

    def __init__(self, in_dim: int, out_dim: int, hidden_dim: int = 2048, bottleneck_dim: int = 256):
        super().__init__()
        first, second = nn.Linear(in_dim, hidden_dim), nn.Linear(hidden_dim, hidden_dim)
        self.mlp = nn.Sequential(first, nn.GELU(), second, nn.GELU(), nn.Linear(hidden_dim, bottleneck_dim))
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(features), dim=-1))


class DINOLoss(nn.Module):
    """Cross-entropy of teacher and student over all pairs of different views: equations (1), (3), (4)."""

    def __init__(self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9):
        super().__init__()
        self.student_temp, self.center_momentum = student_temp, center_momentum
        self.register_buffer("center", torch.zeros(1, out_dim))

    def forward(self, student: Tensor, teacher: Tensor, teacher_temp: float | Tensor) -> Tensor:
        """The loss, a scalar, of student scores (V, B, K) and teacher scores (2, B, K) of the first 2 views;
        in training mode the centre then moves toward their mean."""
        log_ps = (student / self.student_temp).log_softmax(dim=-1)
        pt = self.teacher_probabilities(teacher, teacher_temp)
        with torch.autocast(student.device.type, enabled=False):
            losses = -torch.einsum("tbk,sbk->ts", pt, log_ps.to(pt)) / student.shape[1]  # (2, V)
        same_view = torch.eye(*losses.shape, dtype=torch.bool, device=losses.device)
        if self.training:
            self.move_center(teacher, 1 - self.center_momentum)
        return losses.masked_fill(same_view, 0).sum() / (~same_view).sum()

    @torch.no_grad()
    def move_center(self, teacher: Tensor, by: float | Tensor) -> None:
        """Move c toward the mean of scores (2, B, K) by a fraction: 1 - m in (4), w in (8)."""
        self.center.lerp_(over_processes(teacher.mean(dim=(0, 1))[None].to(self.center)), by)

    @torch.no_grad()
    def temperature(self, teacher: Tensor, highest: float, max_entropy: float, w: Tensor) -> Tensor | float:
        """tau_t, equation (6), a scalar, for scores (..., K); max_entropy: eta; if 1, tau_t = highest."""
        if max_entropy >= 1:
            return highest
        variance = over_processes((teacher - self.center).var(dim=-1, correction=0).mean())
        missing = w * (1 - max_entropy) * math.log(teacher.shape[-1])  # nats
        return (variance / (2 * missing).clamp_min(1e-12)).sqrt().clamp(1e-6, highest)

    @torch.no_grad()
    def teacher_probabilities(self, teacher: Tensor, teacher_temp: float | Tensor) -> Tensor:
        """P_t, equation (1): scores (..., K) to probabilities (..., K)."""
        return ((teacher - self.center) / teacher_temp).softmax(dim=-1)


def koleo_loss(features: Tensor) -> Tensor:
    """Equation (5), a scalar, of features (B, D) of the images on this device; 0 for a single one."""
    if len(features) < 2:
        return features.sum() * 0
    z = F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=1)
    with torch.autocast(z.device.type, enabled=False):  # in bfloat16, another one may seem nearest
        nearest = (z @ z.T).detach().fill_diagonal_(-2).argmax(dim=1)  # (B,)
    return -(z - z[nearest]).norm(dim=1).clamp_min(1e-8).log().mean()


def over_processes(mean: Tensor) -> Tensor:
    """The mean over all processes of a distributed training, each with the same number of images."""
    if not (dist.is_available() and dist.is_initialized()):
        return mean
    total = mean.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


class CollapseMonitor(nn.Module):
    """Moving averages over the teacher's outputs: do different images still get different outputs?"""

    def __init__(self, out_dim: int, momentum: float = 0.95, floor: float = 0.02, patience: int = 100):
        """momentum: of the averages; floor: f, the lowest healthy KL as a fraction of log K; patience: how
        many updates the KL may stay below it (3 times as many until it has first been above)."""
        super().__init__()
        self.momentum, self.floor, self.patience = momentum, floor, patience
        self.register_buffer("entropy", torch.tensor(math.log(out_dim)))  # nats
        self.register_buffer("kl", torch.tensor(0.0))  # nats
        self.register_buffer("usage", torch.full((out_dim,), 1 / out_dim))  # fraction of images by prototype
        self.register_buffer("steps_below", torch.tensor(-2 * patience))

    @torch.no_grad()
    def update(self, pt: Tensor) -> None:
        """Update the averages with the teacher probabilities (..., K) of one step."""
        pt = pt.flatten(0, -2)
        wins = torch.bincount(pt.argmax(dim=1), minlength=pt.shape[1]) / len(pt)
        entropy, mean = torch.special.entr(pt).sum(dim=1).mean(), pt.mean(dim=0)
        entropy, mean, wins = map(over_processes, (entropy, mean, wins))
        kl = torch.special.entr(mean).sum() - entropy  # mean over images of KL(P_t || mean P_t)
        for average, new in ((self.entropy, entropy), (self.kl, kl), (self.usage, wins)):
            average.lerp_(new.to(average), 1 - self.momentum)
        below = ~(self.kl >= self.floor * math.log(pt.shape[1]))  # NaN is below
        self.steps_below.copy_(torch.where(below, self.steps_below + 1, 0))

    def nearness(self) -> Tensor:
        """w, equation (7), a scalar: 1 if the KL is at most twice the floor, 0 if at least three times."""
        return (3 - self.kl / (self.floor * math.log(len(self.usage)))).clamp(0, 1)

    def collapsed(self) -> bool:
        """Whether the KL has been below the floor for `patience` updates."""
        return bool(self.steps_below >= self.patience)

    def prototypes(self) -> int:
        """How many prototypes are the most likely one for more than 0.1 / K of the images."""
        return int((self.usage > 0.1 / len(self.usage)).sum())

    def diagnosis(self) -> str:
        """The kind of collapse, its figures and its remedy, in one line."""
        ceiling = math.log(len(self.usage))
        if self.entropy > 0.5 * ceiling:
            kind = "uniform: every image gets nearly equal probabilities of all prototypes"
            remedy = "a larger weight of KoLeo, a lower learning rate, or larger batches"
        else:
            kind = "one prototype: every image gets the same prototype"
            remedy = "a lower centre momentum or learning rate, or a higher teacher temperature"
        figures = f"teacher entropy {self.entropy:.2f} of at most {ceiling:.2f}, KL {self.kl:.3f}"
        figures += f", {self.prototypes()} prototypes in use"
        return f"DINO has collapsed, {kind} ({figures}); remedy: {remedy}"


class DINO(nn.Module):
    """Student, teacher and their heads around an encoder(images, layer=, patches=) -> Features.

    The encoder may ignore both, as a ResNet does. The default sizes suit thousands of images; for millions
    the paper has out_dim 65536, hidden_dim 2048, bottleneck_dim 256. koleo: a factor of (5), like w;
    max_entropy: eta in (6) and (8).
    """

    def __init__(
        self, encoder: nn.Module, embed_dim: int, out_dim: int = 256, hidden_dim: int = 256,
        bottleneck_dim: int = 64, center_momentum: float = 0.9, koleo: float = 0.0, max_entropy: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        self.koleo, self.max_entropy = koleo, max_entropy
        self.student, self.student_head = encoder, DINOHead(embed_dim, out_dim, hidden_dim, bottleneck_dim)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.teacher_head = copy.deepcopy(self.student_head).requires_grad_(False)
        self.loss = DINOLoss(out_dim, center_momentum=center_momentum)
        self.health = CollapseMonitor(out_dim)
        self.train()

    def forward(self, views: list[Tensor], teacher_temp: float = 0.04, layer: int = -1) -> tuple:
        """The loss of one step, a scalar, and the student's Features of each entry of views, without patches.

        views: one entry per resolution, first globals (2 B, C, H, W), then locals (V B, C, h, w), if any,
        as from `crops.multi_crop`. layer: the block whose attention is in the Features. Raises ValueError if
        two entries have one shape, as in a list of single views (B, C, H, W).
        """
        B, odd = divmod(len(views[0]), 2)  # images
        if odd or len({v.shape for v in views}) < len(views):
            raise ValueError("DINO: join views of one size: [globals (2 B, ...), locals (V B, ...), ...]")
        features = [self.student(x, layer=layer, patches=False) for x in views]
        student = torch.cat([self.student_head(f.pooled) for f in features])  # (V B, K)
        with torch.no_grad():
            teacher = self.teacher_head(self.teacher(views[0], layer=None, patches=False).pooled)  # (2 B, K)
        kind = torch.promote_types(student.dtype, torch.float32)  # for sums over images
        student, teacher = (scores.to(kind).unflatten(0, (-1, B)) for scores in (student, teacher))
        w = self.health.nearness()
        if self.training and self.max_entropy < 1 and B > 1:  # one image's views would be opposites
            self.loss.move_center(teacher, w)
        teacher_temp = self.loss.temperature(teacher, teacher_temp, self.max_entropy, w)
        if self.training and B > 1:  # of one image, the KL says nothing
            self.health.update(self.loss.teacher_probabilities(teacher, teacher_temp))
        loss = self.loss(student, teacher, teacher_temp)
        if self.koleo:  # within each global view, so that all features are of different images
            first, second = features[0].pooled.split(B)
            loss = loss + w * self.koleo * (koleo_loss(first) + koleo_loss(second)) / 2
        return loss, features

    def train(self, mode: bool = True) -> "DINO":
        """Set the mode, but keep the teacher in evaluation mode, so that its targets are deterministic. Only
        its BatchNorms follow the mode: its own batch statistics fit its weights, the student's do not."""
        super().train(mode)
        for module in self.teacher.modules():
            module.training = mode and isinstance(module, nn.modules.batchnorm._BatchNorm)
        return self

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """theta_t <- momentum theta_t + (1 - momentum) theta_s; buffers stay the teacher's own."""
        for teacher, student in ((self.teacher, self.student), (self.teacher_head, self.student_head)):
            for t, s in zip(teacher.parameters(), student.parameters()):
                t.lerp_(s, 1 - momentum)


if __name__ == "__main__":
    from common import chapters

    chapters.dino()  # prints a few facts and draws dino.png
