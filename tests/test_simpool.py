"""SimPool computes the published outputs, and its gradients stay finite in every precision."""

import pytest
import torch
from conftest import golden, seeded

from simpool import GAP, SimPool, power_mean

X = torch.randn(3, 12, 8, dtype=torch.float64, generator=seeded())
B, N, D = X.shape


@pytest.mark.parametrize("gamma", [None, 1.25, 2.0])
def test_pooled_and_attention_equal_the_published_ones(gamma):
    """Equations (12) to (17)."""
    (numbers, weights), model = golden(f"simpool_gamma_{gamma}.npz"), SimPool(32, gamma)
    model.load_state_dict(weights, strict=True)
    pooled, attention = model(numbers["tokens"])
    torch.testing.assert_close(pooled, numbers["pooled_tokens"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(attention, numbers["attention_tokens"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(numbers["feature_map"])[0], numbers["pooled_map"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gamma", [None, 1.25])
def test_an_embedding_does_not_depend_on_the_other_images_of_its_batch(gamma):
    model, others = SimPool(D, gamma).double(), X.new_zeros(1, N, D)
    others[0, :, 0] = 1000  # LayerNorm turns it into sqrt(D - 1) in one dimension, more than X has anywhere
    for sign in (1, -1):
        pooled = model(torch.cat([X, sign * others]))[0][:B]
        torch.testing.assert_close(pooled, model(X)[0], rtol=1e-12, atol=0)


def test_each_head_attends_with_its_own_slice_of_the_dimensions():
    model = SimPool(D, num_heads=2).double()
    pooled, attention = model(X)
    assert attention.shape == (B, 2, N)
    q, k, v = model.wq(X.mean(dim=1)), model.wk(model.norm_patches(X)), model.norm_patches(X)
    for h, part in enumerate((slice(0, 4), slice(4, 8))):
        a = (torch.einsum("bd,bnd->bn", q[:, part], k[:, :, part]) / 2).softmax(dim=1)
        torch.testing.assert_close(attention[:, h], a)
        torch.testing.assert_close(pooled[:, part], torch.einsum("bn,bnd->bd", a, v[:, :, part]))


def test_the_power_mean_leads_from_the_mean_to_the_maximum_and_has_the_right_gradient():
    v = X.abs() + 0.1
    even = torch.full((B, 1, N), 1 / N, dtype=X.dtype)
    for mean in (power_mean(even, v, 1.0)[:, 0], power_mean(even, v, None)[:, 0], GAP()(v)[0]):
        torch.testing.assert_close(mean, v.mean(dim=1))
    torch.testing.assert_close(power_mean(even, v, 2000.0)[:, 0], v.amax(dim=1), rtol=2e-3, atol=0)
    a, v = X[:2, :1, :5].softmax(dim=-1).requires_grad_(), v[:2, :5, :3].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, v: power_mean(a, v, 2.5), (a, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gamma", [0.5, 1.25, 10.0])
def test_gradients_are_finite_in_every_precision_also_where_a_value_is_the_minimum(gamma, dtype):
    v = (torch.tensor([[[0.0, 1e-6], [0.0, 3.0]]], dtype=dtype) + 1e-6).requires_grad_()
    z = power_mean(torch.tensor([[[0.5, 0.5]]], dtype=dtype), v, gamma)
    model, x = SimPool(D, gamma).to(dtype), torch.ones(2, 5, D, dtype=dtype, requires_grad=True)
    pooled, attention = model(x)  # all patches are equal
    gradients = torch.autograd.grad(z.sum() + pooled.sum(), [v, x, model.wq.weight])
    assert z.dtype == dtype and all(t.isfinite().all() for t in (z, pooled, *gradients))
    torch.testing.assert_close(attention.float(), torch.full((2, 5), 0.2), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("gamma", [0.5, 10.0])
def test_the_power_mean_stays_in_float32_under_autocast(gamma):
    a, v = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1e-6], [6.0]]], requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        z = power_mean(a, v, gamma)
    assert torch.equal(z, power_mean(a, v, gamma))
    assert torch.autograd.grad(z.sum(), v)[0].isfinite().all()
