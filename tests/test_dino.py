"""DINO computes the published numbers, trains only the student, and names a collapse."""

import copy
import math
import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import golden, refuses
from torch.multiprocessing import start_processes

from dino import DINO, CollapseMonitor, DINOHead, DINOLoss, koleo_loss
from resnet import ResNet
from vit import ViT


def small_dino(center_momentum: float = 0.9, **options) -> DINO:
    torch.manual_seed(0)
    return DINO(ViT(16, 4, 1, 12, 2, 3, **options), 12, 16, 16, 8, center_momentum)


def test_the_head_equals_the_published_one_under_its_published_names():
    numbers, weights = golden("dino_head.npz")
    head = DINOHead(48, 64, hidden_dim=96, bottleneck_dim=32)
    head.load_state_dict(weights, strict=True)
    torch.testing.assert_close(head(numbers["features"]), numbers["output"], rtol=1e-5, atol=1e-6)


def test_three_steps_of_the_loss_and_its_centre_equal_the_published_ones():
    """Equations (1), (3), (4)."""
    numbers, _ = golden("dino_loss.npz")
    loss = DINOLoss(64, float(numbers["student_temp"]), float(numbers["center_momentum"]))
    for step in ("step0", "step1", "step2"):
        temperature = float(numbers["teacher_temp_schedule"][numbers[f"{step}.epoch"]])
        scores = [numbers[f"{step}.{who}"].unflatten(0, (-1, 4)) for who in ("student", "teacher")]
        found = loss(*scores, temperature)
        torch.testing.assert_close(found, numbers[f"{step}.loss"], rtol=1e-5, atol=0)
        torch.testing.assert_close(loss.center, numbers[f"{step}.center_after"], rtol=1e-5, atol=1e-7)


def test_only_the_student_learns_and_the_teacher_is_its_moving_average():
    dino, images = small_dino(drop_path=0.5), torch.rand(8, 1, 16, 16)
    assert torch.equal(dino.teacher(images).pooled, dino.teacher(images).pooled)  # without noise
    assert not torch.equal(dino.student(images).pooled, dino.student(images).pooled)
    loss, features = dino([torch.rand(6, 1, 16, 16), torch.rand(12, 1, 8, 8)])
    loss.backward()
    assert [f.pooled.shape for f in features] == [(6, 12), (12, 12)]
    assert all(p.grad is None for p in [*dino.teacher.parameters(), *dino.teacher_head.parameters()])
    assert dino.student.blocks[0].mlp.fc1.weight.grad.abs().sum() > 0
    assert dino.student_head.last_layer.weight_g.grad is None  # prototypes keep length 1

    pairs = (dino.teacher, dino.teacher_head), (dino.student, dino.student_head)
    teacher, student = ([p for part in pair for p in part.parameters()] for pair in pairs)
    before = copy.deepcopy(teacher)
    for p in student:
        p.data.add_(1)
    dino.update_teacher(0.75)
    torch.testing.assert_close(teacher, [p + 0.25 for p in before])


def test_a_teacher_s_batch_norms_normalise_by_its_own_batch_and_nothing_else_in_it_is_random():
    """The student's running statistics would not fit a teacher whose weights lag far behind."""
    dino = DINO(ResNet(1, 8), 8, 16, hidden_dim=8, bottleneck_dim=4).train()
    norms = [m for m in dino.teacher.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and [m for m in dino.teacher.modules() if m.training] == norms
    assert not any(m.training for m in dino.eval().teacher.modules())


def test_koleo_is_the_mean_log_distance_to_the_nearest_neighbour_and_keeps_features_apart():
    """Equation (5)."""
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    distances = torch.cdist(F.normalize(x, dim=1), F.normalize(x, dim=1)) + 9 * torch.eye(5)
    torch.testing.assert_close(koleo_loss(x), -distances.min(dim=1).values.log().mean())
    assert torch.autograd.gradcheck(koleo_loss, x) and koleo_loss(x[:1]) == 0
    assert koleo_loss(torch.ones(2, 3)).isfinite()  # equal features
    closer = (x - 0.01 * torch.autograd.grad(koleo_loss(x), x)[0]).detach()
    assert koleo_loss(closer) < koleo_loss(x)


def test_prototypes_and_both_losses_are_computed_in_float32_under_autocast():
    """Near a collapse, features and scores differ by less than bfloat16 can tell."""
    layer, scores = small_dino().student_head.last_layer, torch.rand(2, 8, 64)
    x = F.normalize(torch.randn(1, 8), dim=1) + 0.02 * torch.randn(64, 8)

    def results() -> tuple:
        return layer(x), koleo_loss(x), DINOLoss(64)(scores, scores, 0.04)

    expected = results()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, results(), expected))
    half = scores.half()
    torch.testing.assert_close(DINOLoss(64)(half, half, 0.04), expected[2], rtol=1e-2, atol=0)


def test_the_temperature_falls_so_that_the_entropy_of_the_teacher_has_a_ceiling():
    """Equation (6)."""
    loss, generator = DINOLoss(256), torch.Generator().manual_seed(0)
    for spread in (1e-4, 0.1):
        scores = spread * torch.randn(2, 64, 256, generator=generator) + torch.randn(256, generator=generator)
        loss.center.copy_(scores.mean(dim=(0, 1))[None])
        near, far = torch.ones(()), torch.zeros(())
        assert loss.temperature(scores, 0.04, 1.0, near) == 0.04
        assert loss.temperature(scores, 0.04, 0.8, far) == torch.tensor(0.04)
        temperature = loss.temperature(scores, 0.04, 0.8, near)
        entropy = torch.special.entr(loss.teacher_probabilities(scores, temperature)).sum(dim=-1).mean()
        if spread < 0.01:
            assert temperature < 0.04 and abs(entropy / math.log(256) - 0.8) < 0.02
        else:  # it falls only where it must
            assert temperature == torch.tensor(0.04) and entropy < 0.8 * math.log(256)


@pytest.mark.parametrize("floors, w", [(0, 1), (2, 1), (2.5, 0.5), (3, 0), (20, 0)])
def test_near_collapse_koleo_is_added_the_centre_follows_and_the_temperature_falls(floors, w):
    """Equations (7), (8). floors: the KL of the outputs so far, in units of the lowest that is allowed."""
    views, plain = [torch.rand(6, 1, 16, 16)], small_dino()
    with_koleo, with_ceiling, used = copy.deepcopy(plain), copy.deepcopy(plain), []
    with_koleo.koleo, with_ceiling.max_entropy = 0.5, 0.8
    for dino in (with_koleo, with_ceiling):
        dino.health.kl.fill_(floors * dino.health.floor * math.log(16))
    loss, (features,) = plain(views)
    apart = (koleo_loss(features.pooled[:3]) + koleo_loss(features.pooled[3:])) / 2
    torch.testing.assert_close(with_koleo(views)[0], loss + w * 0.5 * apart)
    with_ceiling.loss.register_forward_hook(lambda module, inputs, output: used.append(inputs))
    with_ceiling(views, 0.4)
    ((_, teacher, temperature),) = used
    mean = teacher.mean(dim=(0, 1))[None]
    torch.testing.assert_close(with_ceiling.loss.center, mean * (1 - 0.9 * (1 - w)))  # by w, then by 0.1
    spread = (teacher - w * mean).var(dim=-1, correction=0).mean()
    highest = (spread / (0.4 * max(w, 1e-9) * math.log(16))) ** 0.5
    assert float(temperature) == pytest.approx(min(0.4, highest))
    center, health = with_ceiling.loss.center.clone(), copy.deepcopy(with_ceiling.health.state_dict())
    with_ceiling.eval()(views, 0.4)
    assert torch.equal(with_ceiling.loss.center, center)
    assert all(torch.equal(value, health[key]) for key, value in with_ceiling.health.state_dict().items())


def monitored(probabilities: torch.Tensor, steps: int = 300) -> CollapseMonitor:
    monitor = CollapseMonitor(probabilities.shape[-1], patience=50)
    for _ in range(steps):
        monitor.update(probabilities)
    return monitor


def test_the_monitor_measures_entropy_kl_and_prototypes_in_use():
    own = monitored(torch.eye(8))  # eight images, each its own prototype
    assert own.entropy < 0.01 and abs(own.kl - math.log(8)) < 0.01 and own.prototypes() == 8
    pair = monitored(torch.eye(8)[[0, 0, 0, 1]])
    assert pair.prototypes() == 2 and abs(pair.kl - 0.5623) < 0.01
    assert not pair.collapsed()


def test_a_few_bad_steps_are_not_a_collapse_but_many_are_named_with_a_remedy():
    uniform, one = torch.full((8, 32), 1 / 32), torch.eye(32)[[3] * 8]
    assert not monitored(uniform, steps=140).collapsed()  # it has not begun to learn
    monitor = monitored(uniform, steps=40)
    assert not monitor.collapsed()
    for _ in range(20):
        monitor.update(torch.eye(32)[:8])
    assert monitor.steps_below == 0
    lines = "uniform: .* a larger weight of KoLeo", "one prototype: .* a higher teacher temperature"
    for outputs, line in zip((uniform, one), lines):
        assert (monitor := monitored(outputs)).collapsed() and re.search(line, monitor.diagnosis())
    assert monitored(torch.full((8, 32), torch.nan)).collapsed()


@pytest.mark.parametrize("max_entropy", [1, 0.8])
@pytest.mark.parametrize("kind, temp, momentum", [("uniform", 5.0, 0.9), ("one prototype", 0.04, 1.0)])
def test_training_provokes_either_collapse_unless_entropy_has_a_ceiling(kind, temp, momentum, max_entropy):
    """Without sharpening the outputs become uniform; without centring one prototype wins (their Figure 7)."""
    dino = small_dino(momentum)
    dino.health, dino.max_entropy = CollapseMonitor(16, patience=20), max_entropy
    optimizer = torch.optim.AdamW([p for p in dino.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(150):
        loss, _ = dino([torch.rand(16, 1, 16, 16)], temp)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        dino.update_teacher(0.9)
        if dino.health.collapsed():
            break
    assert dino.health.collapsed() == (max_entropy == 1)
    assert kind in dino.health.diagnosis() or max_entropy < 1


def test_centre_and_monitor_average_over_all_processes(tmp_path):
    """Two forks see half of the teacher's outputs each; one process sees all."""
    torch.manual_seed(0)
    teacher = torch.randn(2, 8, 6)

    def after(scores):
        loss, monitor = DINOLoss(6), CollapseMonitor(6)
        loss(scores, scores, 0.04)
        monitor.update(loss.teacher_probabilities(scores, 0.04))
        return [loss.center, monitor.entropy, monitor.kl, monitor.usage]

    def process(rank: int) -> None:
        dist.init_process_group("gloo", f"file://{tmp_path}/meet", rank=rank, world_size=2)
        torch.save(after(teacher[:, 4 * rank : 4 * rank + 4]), tmp_path / f"{rank}.pt")

    start_processes(process, nprocs=2, start_method="fork")
    for rank in range(2):
        for found, expected in zip(torch.load(tmp_path / f"{rank}.pt"), after(teacher)):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("sizes", [(2, 2), (3,), (4, 6, 6)])
def test_a_list_of_single_views_is_refused(sizes):
    """DINO's release has [first (B), second (B), ...]: halves of the first would count as two views."""
    views = [torch.rand(n, 1, 16, 16) for n in sizes]
    refuses("join views of one size", DINO(ViT(16, 4, 1, 24, 1, 3), 24, out_dim=8), views)


def test_neither_the_monitor_nor_the_centre_judges_by_a_single_image():
    """Its views should get the same output, which tells nothing of others."""
    model = DINO(ViT(16, 4, 1, 24, 1, 3), 24, out_dim=8, max_entropy=0.8, center_momentum=1.0)
    for images, steps in ((1, -200), (2, -199)):
        model([torch.rand(2 * images, 1, 16, 16)])
        assert model.health.steps_below == steps and model.loss.center.any() == (images == 2)
