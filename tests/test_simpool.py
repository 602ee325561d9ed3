"""SimPool against the published outputs, and every pooling of the framework against its own definition."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from resnet import ResNet
from simpool import GAP, SimPool, cbam, cross, gap, gem, kmeans, lse, maximum, pool, power_mean, se, slots
from vit import ViT

GOLDEN = Path(__file__).parent / "golden"
X = torch.randn(3, 12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
B, N, D = X.shape


def published(gamma: float | None) -> tuple[SimPool, dict[str, torch.Tensor]]:
    golden = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / f"simpool_gamma_{gamma}.npz").items()}
    model = SimPool(32, gamma)
    weights = {k.removeprefix("weight."): v for k, v in golden.items() if k.startswith("weight.")}
    model.load_state_dict(weights, strict=True)
    return model, golden


@pytest.mark.parametrize("gamma", [None, 1.25, 2.0])
def test_pooled_and_attention_are_the_published_ones(gamma):
    model, golden = published(gamma)
    pooled, attention = model(golden["tokens"])
    torch.testing.assert_close(pooled, golden["pooled_tokens"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(attention, golden["attention_tokens"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(golden["feature_map"])[0], golden["pooled_map"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gamma", [None, 1.25, 2.0])
def test_an_embedding_does_not_depend_on_its_batch_mates(gamma):
    model = SimPool(D, gamma).double()
    mates = X.new_zeros(1, N, D)
    mates[0, :, 0] = 1000  # LayerNorm makes it sqrt(D - 1) in one dimension: values that X doesn't have
    for sign in (1, -1):
        torch.testing.assert_close(
            model(torch.cat([X, sign * mates]))[0][:B], model(X)[0], rtol=1e-12, atol=0
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gamma", [0.5, 1.25, 2.0, 10.0])
def test_gradients_are_finite_where_a_value_is_the_minimum(gamma, dtype):
    v = torch.tensor([[[0.0, 1e-6], [0.0, 3.0]]], dtype=dtype) + 1e-6
    v.requires_grad_()
    a = torch.tensor([[[0.5, 0.5]]], dtype=dtype)
    z = power_mean(gamma)(a, v)
    assert z.dtype == dtype and z.isfinite().all()
    z.sum().backward()
    assert v.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gamma", [1.25, 2.0])
def test_simpool_trains_in_half_precision_on_equal_patches(gamma, dtype):
    model = SimPool(D, gamma).to(dtype)
    x = torch.ones(2, 5, D, dtype=dtype, requires_grad=True)  # every value is the minimum
    pooled, attention = model(x)
    pooled.sum().backward()
    assert pooled.isfinite().all() and x.grad.isfinite().all() and model.wq.weight.grad.isfinite().all()
    torch.testing.assert_close(attention.float(), torch.full((2, 5), 0.2), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("gamma", [0.5, 1.25, 2.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_power_mean_stays_in_float32_under_autocast(gamma, dtype):
    a, v = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1e-6], [6.0]]], requires_grad=True)
    plain = power_mean(gamma)(a, v)
    with torch.autocast("cpu", dtype):
        z = power_mean(gamma)(a, v)
    assert torch.equal(z, plain)
    z.sum().backward()
    assert v.grad.isfinite().all()


def test_the_gradient_of_the_power_mean_agrees_with_finite_differences():
    a = torch.rand(2, 1, 5, dtype=torch.float64).softmax(dim=-1).requires_grad_()
    v = (torch.rand(2, 5, 3, dtype=torch.float64) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(power_mean(2.5), (a, v))


def test_gamma_leads_from_the_mean_to_the_maximum():
    v = X.abs() + 0.1
    a = torch.full((B, 1, N), 1 / N, dtype=X.dtype)
    torch.testing.assert_close(power_mean(1.0)(a, v)[:, 0], v.mean(dim=1))
    torch.testing.assert_close(power_mean(2000.0)(a, v)[:, 0], v.amax(dim=1), rtol=2e-3, atol=0)


def test_heads_attend_each_in_its_own_slice():
    model = SimPool(D, num_heads=2).double()
    pooled, attention = model(X)
    assert attention.shape == (B, 2, N)
    q, k, v = model.wq(X.mean(dim=1)), model.wk(model.norm_patches(X)), model.norm_patches(X)
    for h, part in enumerate((slice(0, 4), slice(4, 8))):
        a = (torch.einsum("bd,bnd->bn", q[:, part], k[:, :, part]) / 2).softmax(dim=1)
        torch.testing.assert_close(attention[:, h], a)
        torch.testing.assert_close(pooled[:, part], torch.einsum("bn,bnd->bd", a, v[:, :, part]))


@pytest.mark.parametrize("pooling", [GAP(), SimPool(16), SimPool(16, 2.0, num_heads=4)])
def test_encoders_take_it_in_place_of_their_own_pooling(pooling):
    images = torch.randn(2, 1, 16, 24)
    vit = ViT((16, 24), 8, 1, 16, 2, 2, pool=pooling)
    assert not hasattr(vit, "cls_token")
    for encoder, grid in ((vit, (2, 3)), (ResNet(1, 16, pool=pooling), (2, 3))):
        pooled, patches, attention = encoder(images)
        assert encoder.grid(images) == grid and pooled.shape == (2, 16) and patches.shape == (2, 6, 16)
        torch.testing.assert_close(attention.sum(dim=2), torch.ones(2, attention.shape[1]))


# The framework: each setting beside its own direct definition.


def test_simple_poolings_are_what_they_are_called():
    torch.testing.assert_close(pool(X, **gap())[0][:, 0], X.mean(dim=1))
    torch.testing.assert_close(pool(X, **maximum())[0][:, 0], X.amax(dim=1))
    torch.testing.assert_close(
        pool(X, **gem(3.0))[0][:, 0], X.clamp(min=1e-6).pow(3).mean(dim=1).pow(1 / 3), rtol=1e-9, atol=0
    )
    torch.testing.assert_close(pool(X, **lse(10.0))[0][:, 0], (10 * X).exp().mean(dim=1).log() / 10)


def test_cross_attention_is_that_of_multihead_attention():
    reference = nn.MultiheadAttention(D, 2, bias=False, batch_first=True).double()
    maps = [nn.Linear(D, D, bias=False).double() for _ in range(3)]
    for m, weight in zip(maps, reference.in_proj_weight.chunk(3)):
        m.weight.data.copy_(weight)
    reference.out_proj.weight.data.copy_(torch.eye(D))
    token = torch.randn(1, 1, D, dtype=X.dtype)
    u, a = pool(X, **cross(token, *maps, heads=2))
    want, weights = reference(token.expand(B, -1, -1), X, X, average_attn_weights=False)
    torch.testing.assert_close(u, want)
    torch.testing.assert_close(a, weights)


def test_kmeans_is_lloyds_algorithm():
    k, steps = 3, 4
    u, a = pool(X, **kmeans(k, steps))
    for x, found in zip(X, u):
        centres = x[[0, 6, 11]]
        for _ in range(steps):
            nearest = torch.stack([(x - c).square().sum(dim=1) for c in centres]).argmin(dim=0)
            centres = torch.stack(
                [x[nearest == i].mean(dim=0) if (nearest == i).any() else c for i, c in enumerate(centres)]
            )
        torch.testing.assert_close(found, centres)
    assert (a.gt(0).sum(dim=1) == 1).all()  # a patch belongs to one centre


def test_a_centre_without_patches_stays():
    x = torch.tensor([[[1.0], [1.0], [5.0]]])  # the first two centres are the same: ties go to the first
    u, _ = pool(x, **kmeans(3, 2))
    assert u[0, :, 0].tolist() == [1.0, 1.0, 5.0] and u.isfinite().all()


def test_slots_compete_for_patches():
    torch.manual_seed(0)
    first = torch.randn(1, 2, D, dtype=X.dtype)
    norm, gru = nn.LayerNorm(D).double(), nn.GRUCell(D, D).double()
    wq, wk, wv, mlp = (nn.Linear(D, D).double() for _ in range(4))
    u, a = pool(X, **slots(first, norm, wq, wk, wv, gru, mlp))
    want = first.expand(B, -1, -1)
    for _ in range(3):
        share = torch.einsum("bnd,bkd->bnk", wk(X), wq(norm(want))).div(D**0.5).softmax(dim=2)
        share = share / share.sum(dim=1, keepdim=True)
        new = torch.einsum("bnk,bnd->bkd", share, wv(X))
        want = torch.stack([gru(new[:, i], want[:, i]) for i in range(2)], dim=1)
        want = want + mlp(want)
    torch.testing.assert_close(u, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(a.sum(dim=2), torch.ones(B, 2, dtype=X.dtype))


def test_squeeze_and_excite_scales_channels_before_the_mean():
    mlp = nn.Sequential(nn.Linear(D, 4), nn.ReLU(), nn.Linear(4, D)).double()
    scaled = X * mlp(X.mean(dim=1)).sigmoid()[:, None]
    torch.testing.assert_close(pool(X, **se(mlp))[0][:, 0], scaled.mean(dim=1))


def test_cbam_weighs_channels_then_positions():
    mlp = nn.Sequential(nn.Linear(D, 4), nn.ReLU(), nn.Linear(4, D)).double()
    conv = nn.Conv2d(2, 1, 7, padding=3, bias=False).double()
    maps = X.transpose(1, 2).unflatten(2, (3, 4))  # (B, D, h, w)
    channels = (mlp(maps.mean(dim=(2, 3))) + mlp(maps.amax(dim=(2, 3)))).sigmoid()
    maps = maps * channels[:, :, None, None]
    both = torch.cat([maps.mean(dim=1, keepdim=True), maps.amax(dim=1, keepdim=True)], dim=1)
    want = (maps * conv(both).sigmoid()).mean(dim=(2, 3))
    torch.testing.assert_close(pool(X, **cbam(mlp, conv, (3, 4)))[0][:, 0], want)


@pytest.mark.parametrize("gamma", [0.0, -1.0, 64.0, float("nan"), float("inf")])
def test_gamma_must_be_a_power_that_numbers_can_hold(gamma):
    with pytest.raises(ValueError, match="gamma .* must lie between 0.1 and 10"):
        SimPool(8, gamma)


@pytest.mark.parametrize("shape", [(2, 0, 8), (2, 8), (2, 5, 7), (2, 7, 3, 3)])
def test_other_shapes_are_named(shape):
    with pytest.raises(ValueError, match="SimPool pools"):
        SimPool(8)(torch.zeros(shape))


def test_heads_must_divide_the_dimensions():
    with pytest.raises(ValueError, match="num_heads 3 must divide dim 8"):
        SimPool(8, num_heads=3)
