"""LRP equals its reference implementations on any model, and its loss loses no term of its gradient."""

import copy
import gc
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from isnet_lrp import background_loss, foreground_loss
from lrp import LRP as lrp, relevance
from vit import ViT

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, torch.Tensor]:
    arrays = np.load(GOLDEN / name)
    return {k: torch.from_numpy(arrays[k]) for k in arrays if arrays[k].dtype.kind != "U"}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# Reference implementations


@pytest.fixture(scope="module")
def published_cnn():
    numbers = golden("lrp_cnn.npz")
    cnn = nn.Sequential(
        *[nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)],
        *[nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)],
        *[nn.Flatten(), nn.Linear(192, 10), nn.ReLU(), nn.Linear(10, 4)],
    ).double()
    cnn.load_state_dict(
        {k.removeprefix("weight."): v for k, v in numbers.items() if "weight." in k}, strict=True
    )
    return cnn, numbers


@pytest.mark.parametrize("epsilon", ["1e-06", "0.25"])
def test_the_epsilon_rule_equals_zennit_s(published_cnn, epsilon):
    cnn, numbers = published_cnn
    R, output = relevance(cnn, numbers["images"], numbers["target"], float(epsilon))
    torch.testing.assert_close(output, numbers["logits"])
    per_unit = R / output.gather(1, numbers["target"][:, None])[..., None, None]
    torch.testing.assert_close(per_unit, numbers[f"relevance_per_unit_logit.eps_{epsilon}"])


def test_the_box_rule_at_the_input_equals_zennit_s(published_cnn):
    cnn, numbers = published_cnn
    R, output = relevance(cnn, numbers["zbox.images"], numbers["target"], 0.25, input_rule=(0.0, 1.0))
    per_unit = R / output.gather(1, numbers["target"][:, None])[..., None, None]
    torch.testing.assert_close(per_unit, numbers["zbox.relevance_per_unit_logit"], rtol=1e-5, atol=1e-8)


def test_the_rules_for_transformers_equal_lxt_s():
    weights, numbers = golden("dino_vit.npz"), golden("lrp_vit_attnlrp.npz")
    vit = ViT(32, 8, 3, 48, 3, 3)
    vit.load_state_dict({k.removeprefix("weight."): v for k, v in weights.items() if "weight." in k})
    vit = vit.double()
    R, _ = relevance(lambda x: vit(x).pooled, numbers["images"], lambda y: y @ numbers["direction"], 1e-12)
    torch.testing.assert_close(R, numbers["relevance"], rtol=1e-5, atol=1e-6)


def test_the_gamma_rule_equals_a_computation_layer_by_layer():
    first, second, gamma, epsilon = nn.Linear(6, 5).double(), nn.Linear(5, 3).double(), 0.4, 0.01
    x = torch.rand(4, 6, dtype=torch.float64)
    a = first(x).relu()
    positive = [
        (m.weight + gamma * m.weight.clamp(min=0), m.bias + gamma * m.bias.clamp(min=0))
        for m in (first, second)
    ]
    R = F.one_hot(torch.tensor([0, 1, 2, 0]), 3) * second(a)
    for inputs, (w, b) in ((a, positive[1]), (x, positive[0])):
        z = inputs @ w.T + b
        R = inputs * ((R / (z + epsilon * torch.where(z >= 0, 1, -1))) @ w)
    found, _ = relevance(
        nn.Sequential(first, nn.ReLU(), second), x, torch.tensor([0, 1, 2, 0]), epsilon, gamma
    )
    torch.testing.assert_close(found, R)


def test_the_signed_gamma_rule_equals_a_computation_contribution_by_contribution():
    """R_i = sum_j R_j c_ij (1 + gamma [c_ij has the sign of z_j]) / (the same summed over i)."""
    layer, gamma = nn.Linear(6, 5, bias=False).double(), 0.7
    x, weights = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    c = x[:, None] * layer.weight  # (B, 5, 6)
    z = c.sum(dim=2, keepdim=True)
    favoured = c * (1 + gamma * (c.sign() == z.sign()))
    R = (weights[:, :, None] * z * favoured / favoured.sum(dim=2, keepdim=True)).sum(dim=1)
    found, _ = relevance(layer, x, weights, 0.0, gamma, signed=True)
    torch.testing.assert_close(found, R)


def test_the_signed_gamma_rule_keeps_relevance_bounded_where_the_plain_one_explodes():
    layer = nn.Linear(2, 1, bias=False).double()
    layer.weight.data = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    x, target = torch.tensor([[1.0, 2.0000001]], dtype=torch.float64), torch.tensor(
        [0]
    )  # w' x is nearly 0 at gamma 1
    assert relevance(layer, x, target, 0.0, 1.0)[0].abs().max() > 1e6
    assert relevance(layer, x, target, 0.0, 1.0, signed=True)[0].abs().max() < 2


def test_where_input_and_output_are_positive_the_signed_gamma_rule_is_the_plain_one():
    layer, x = nn.Linear(6, 5).double(), torch.rand(4, 6, dtype=torch.float64)
    target = (layer(x) > 0).double()
    expected, found = (relevance(layer, x, target, 0.0, 2.0, signed=signed)[0] for signed in (False, True))
    layer.bias.data.clamp_(min=0)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("gamma", [0.0, 3.0])
def test_in_training_the_batch_s_statistics_are_constants(gamma):
    """The heatmap is that of the same network with the batch's mean and deviation as fixed numbers."""
    model, images = MODELS["residual"](True).double().train(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    twin, target = copy.deepcopy(model).eval(), torch.tensor([0, 1, 2, 0])
    for norm in model.norms:
        norm.momentum = 1.0  # so that the running statistics become the batch's
    found, _ = relevance(model, images, target, 1e-9, gamma, signed=True)
    for norm, fixed in zip(model.norms, twin.norms):
        n = len(images) * 64
        fixed.running_mean, fixed.running_var = norm.running_mean, norm.running_var * (n - 1) / n
    expected, _ = relevance(twin, images, target, 1e-9, gamma, signed=True)
    torch.testing.assert_close(found, expected)


def test_the_relevance_of_inner_layers_is_handed_out_and_conserved_too():
    model, images = MODELS["residual"]().double().eval(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    target = torch.tensor([0, 1, 2, 0])
    alone, output = relevance(model, images, target, 1e-10)
    (R, first, head), _ = relevance(model, images, target, 1e-10, layers=[model.norms[0], model.head])
    assert torch.equal(R, alone) and first.shape == (4, 6, 8, 8)
    logit = output.gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(first.sum(dim=(1, 2, 3)), logit, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(head, F.one_hot(target, 3) * output)
    assert not model.norms[0]._forward_hooks


@pytest.mark.parametrize("name, d", [("mean", 1.0), ("gwrp", 0.9)])
def test_the_background_loss_equals_the_published_one(name, d):
    numbers = golden("isnet_loss.npz")
    losses = [background_loss(numbers["heatmaps"][:, c], numbers["masks"], decay=d) for c in range(3)]
    torch.testing.assert_close(torch.stack(losses).mean(dim=0), numbers[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name, d, weight", [("foreground", 1.0, 1), ("hybrid", 0.97, 3)])
def test_the_foreground_loss_equals_the_published_one(name, d, weight):
    numbers, losses = golden("isnet_loss.npz"), []
    for c in range(3):
        heatmap, mask = numbers["heatmaps"][:, c], numbers["masks"]
        loss = weight * foreground_loss(heatmap, mask, 2.0, 50.0, hybrid=name == "hybrid")
        losses.append(loss + background_loss(heatmap, mask, decay=d))
    torch.testing.assert_close(torch.stack(losses).mean(dim=0), numbers[name], rtol=1e-5, atol=1e-6)


# Models it has never seen


class Residual(nn.Module):
    """Reused in-place ReLU, batch norm, an addition in place, a depthwise convolution; no biases."""

    def __init__(self, batch_norm_bias: bool = False):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(i, 6, 3, padding=1, groups=g, bias=False) for i, g in ((3, 1), (6, 1), (6, 6))
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(3))
        for norm in self.norms:
            norm.running_var.uniform_(0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 2)
            if batch_norm_bias:
                nn.init.normal_(norm.bias)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(6, 3, bias=False)

    def forward(self, x):
        x = self.relu(self.norms[0](self.convs[0](x)))
        y = self.relu(self.norms[1](self.convs[1](x)))
        y = self.norms[2](self.convs[2](y))
        y += x
        return self.head(F.adaptive_avg_pool2d(self.relu(y), 1).flatten(1))


class Gated(nn.Module):
    """Functional calls, group norm, squeeze-and-excite, concatenation, pooling, normalisation; no biases."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, bias=False), nn.GroupNorm(2, 6)
        self.down, self.up, self.head = (nn.Linear(i, o, bias=False) for i, o in ((6, 2), (2, 6), (12, 3)))

    def forward(self, x):
        x = F.silu(self.norm(self.conv(x)))
        x = x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))[:, :, None, None]
        return self.head(torch.cat([x.amax((2, 3)), F.normalize(F.avg_pool2d(x, 2).mean((2, 3)))], 1))


class Transformer(nn.Module):
    """nn.TransformerEncoderLayer, and with it nn.MultiheadAttention."""

    def __init__(self):
        super().__init__()
        self.cut = nn.Conv2d(3, 12, 4, 4)
        self.layer = nn.TransformerEncoderLayer(
            12, 3, 24, 0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.layer(self.cut(x).flatten(2).transpose(1, 2)).mean(1))


class SmallViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.vit, self.head = ViT(8, 4, 3, 12, 2, 3), nn.Linear(12, 3)
        for parameter in self.vit.parameters():
            nn.init.normal_(parameter, std=0.4)

    def forward(self, x):
        return self.head(self.vit(x).pooled)


def plain_cnn() -> nn.Module:
    conv = lambda i, o: nn.Conv2d(i, o, 3, padding=1, bias=False)  # noqa: E731
    return nn.Sequential(
        conv(3, 6), nn.ReLU(), nn.MaxPool2d(2), conv(6, 6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3, False)
    )


MODELS = {"cnn": plain_cnn, "residual": Residual, "gated": Gated, "transformer": Transformer, "vit": SmallViT}


@pytest.mark.parametrize("name", ["cnn", "residual"])
@pytest.mark.parametrize("gamma, signed", [(0.0, False), (0.25, False), (10.0, False), (10.0, True)])
def test_without_biases_the_relevance_of_an_image_sums_to_its_logit(name, gamma, signed):
    for seed in range(5):
        torch.manual_seed(seed)
        model, images = MODELS[name]().double().eval(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
        target = torch.randint(3, (4,))
        R, output = relevance(model, images, target, 1e-10, gamma, signed=signed)
        torch.testing.assert_close(
            R.sum(dim=(1, 2, 3)), output.gather(1, target[:, None])[:, 0], rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("gamma", [0.0, 0.5])
@pytest.mark.parametrize("training", [False, True])
def test_within_the_context_output_and_gradients_of_a_plain_loss_are_the_true_ones(name, gamma, training):
    model = MODELS[name]().double().train(training)
    images, labels = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    results = []
    for inside in (False, True):
        twin, x = copy.deepcopy(model), images.clone().requires_grad_()
        if inside:
            with lrp(1e-6, gamma) as rules:
                output = rules.current(twin(rules.watch(x)))
                F.cross_entropy(output, labels).backward()
        else:
            output = twin(x)
            F.cross_entropy(output, labels).backward()
        results.append((output, x.grad, *[p.grad for p in twin.parameters()], *twin.buffers()))
    assert torch.equal(results[0][0], results[1][0])
    for true, found in zip(*results):
        torch.testing.assert_close(found, true, rtol=1e-9, atol=1e-12)


def isnet_loss(
    model, images: torch.Tensor, mask: torch.Tensor, gamma: float, signed: bool, box
) -> torch.Tensor:
    """The whole training loss: classification, background and foreground."""
    labels, weights = torch.tensor([0, 1, 2]), 2 * F.one_hot(torch.tensor([0, 1, 2]), 3).double() - 1
    R, output = relevance(model, images, weights, 0.05, gamma, box, create_graph=True, signed=signed)
    loss = F.cross_entropy(output, labels) + background_loss(R, mask, decay=0.9).mean()
    return loss + foreground_loss(R, mask, c1=5.0, c2=7.0).mean()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "gamma, signed, box",
    [(0.0, False, None), (0.5, False, None), (5.0, True, None), (0.0, False, (0, 1)), (10.0, True, (0, 1))],
)
@pytest.mark.parametrize("training", [False, True])
def test_no_term_of_the_isnet_loss_is_lost_in_double_backward(name, gamma, signed, box, training):
    """Its gradient agrees with finite differences along a random direction through all weights."""
    model = MODELS[name]().double().train(training)
    for p in model.parameters():
        if p.abs().sum() == 0:  # max(w, 0) has a kink there
            nn.init.normal_(p, std=0.3)
    images, mask = torch.rand(3, 3, 8, 8, dtype=torch.float64), torch.zeros(3, 1, 8, 8, dtype=torch.float64)
    mask[:, :, 2:6, 2:6] = 1
    weights = list(model.parameters())
    gradient = torch.autograd.grad(isnet_loss(model, images, mask, gamma, signed, box), weights)
    # As long in each weight as its gradient is short, so that no weight's part is drowned by another's.
    directions = [torch.randn_like(p) / (g.norm() + 1e-9) for p, g in zip(weights, gradient)]
    found = sum((g * d).sum() for g, d in zip(gradient, directions)).item()
    originals, differences = [p.detach().clone() for p in weights], []
    for step in (1e-7, 1e-8, 1e-9):  # the loss has kinks; one of the steps meets none
        values = []
        for sign in (1, -1):
            for p, original, d in zip(weights, originals, directions):
                p.data.copy_(original + sign * step * d)
            values.append(isnet_loss(model, images, mask, gamma, signed, box).item())
        differences.append((values[0] - values[1]) / (2 * step))
    for p, original in zip(weights, originals):
        p.data.copy_(original)
    assert min(abs(found - difference) for difference in differences) < 1e-4 * max(1, abs(found))


# The context


def test_the_context_leaves_nothing_behind_after_an_exception_and_nests():
    model, images = Residual().eval(), torch.rand(2, 3, 8, 8)
    expected, _ = relevance(model, images, torch.tensor([0, 1]))
    with pytest.raises(ZeroDivisionError), lrp(gamma=3.0) as rules:
        model(rules.watch(images))
        raise ZeroDivisionError
    assert not (rules.depends or rules.successor) and type(model(images)) is torch.Tensor and not images.requires_grad
    with lrp(gamma=3.0) as outer:
        outer.watch(images)
        inner, _ = relevance(model, images, torch.tensor([0, 1]))
    torch.testing.assert_close(inner, expected)


def test_an_operation_without_a_rule_is_named_once():
    model = lambda x: torch.sin(torch.sin(x)).flatten(1).cumsum(1)  # noqa: E731
    with pytest.warns(UserWarning, match="no rule for 'sin'") as caught:
        relevance(model, torch.rand(2, 1, 3, 3), torch.tensor([0, 1]))
    assert len(caught) == 1


@pytest.mark.parametrize("name", MODELS)
def test_models_of_known_operations_give_no_warning(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        relevance(MODELS[name](), torch.rand(2, 3, 8, 8), torch.tensor([0, 1]))


def test_relevance_stays_in_float32_under_autocast():
    model, images, target = plain_cnn(), torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
    expected, _ = relevance(model, images, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = relevance(model, images, target)
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert F.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.95


def test_nothing_of_a_step_outlives_it():
    """No tensor keeps itself alive, or memory would grow from step to step."""
    model, images, mask = Residual(), torch.rand(3, 3, 8, 8), torch.ones(3, 1, 8, 8)
    mask[:, :, :4] = 0
    traces = []
    for conv in model.convs:
        conv.register_forward_hook(lambda module, inputs, output: traces.append(weakref.ref(output)))
    gc.disable()
    try:
        R, output = relevance(model, images, torch.tensor([0, 1, 2]), gamma=0.5, create_graph=True)
        (F.cross_entropy(output, torch.tensor([0, 1, 2])) + background_loss(R, mask).mean()).backward()
        traces += [weakref.ref(R), weakref.ref(output)]
        del R, output
        assert len(traces) == 5 and all(trace() is None for trace in traces)
    finally:
        gc.enable()


# Bad input


def test_an_empty_mask_has_no_background_loss_and_says_so():
    R, mask = torch.rand(2, 3, 4, 4), torch.zeros(2, 1, 4, 4)
    mask[1, 0, 0, 0] = 1
    with pytest.warns(UserWarning, match="empty mask"):
        loss = background_loss(R, mask)
    assert loss[0] == 0 and loss[1] > 0
    assert background_loss(R, torch.ones(2, 1, 4, 4)).tolist() == [0, 0]  # nothing but foreground


def test_a_heatmap_of_zeros_or_in_half_precision_gives_no_nan():
    mask = torch.ones(1, 1, 4, 4)
    mask[:, :, 0] = 0
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        R = torch.zeros(1, 3, 4, 4, dtype=dtype, requires_grad=True)
        loss = background_loss(R, mask, 0.9) + foreground_loss(R, mask, 1.0, 2.0)
        loss.sum().backward()
        assert loss.isfinite().all() and R.grad.isfinite().all()


def test_what_does_not_fit_is_refused():
    R, images = torch.rand(2, 3, 4, 4), torch.rand(2, 1, 3, 3)
    with pytest.raises(ValueError, match=r"mask \(2, 1, 3, 3\) does not fit heatmap"):
        background_loss(R, torch.ones(2, 1, 3, 3))
    with pytest.raises(ValueError, match="only 0 .* and 1"):
        background_loss(R, torch.full((2, 1, 4, 4), 0.5))
    with pytest.raises(ValueError, match="0 < c1 < c2"):
        foreground_loss(R, torch.ones(2, 1, 4, 4), 2.0, 1.0)
    with pytest.raises(ValueError, match="out of range: the model has 9 outputs"):
        relevance(nn.Flatten(), images, torch.tensor([0, 9]))
    with pytest.raises(ValueError, match=r"output \(B, K\)"):
        relevance(nn.Identity(), images, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"labels: \.long\(\)"):
        relevance(nn.Flatten(), images, torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="one score an image"):
        relevance(nn.Flatten(), images, lambda output: output)
    with pytest.raises(ValueError, match="float images"):
        relevance(nn.Flatten(), images.to(torch.uint8), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="must not be negative"):
        lrp(epsilon=-1.0)


CALLS = {
    "linear, no bias": lambda x, w: F.linear(x, w, bias=None),
    "linear, named": lambda x, w: F.linear(input=x, weight=w),
    "convolution": lambda x, w: F.conv1d(x[:, :, None], w[:, :, None], bias=None, stride=1)[:, :, 0],
    "times ones": lambda x, w: F.linear(x, w) * torch.ones_like(x[:, :3]),
    "times a detached norm": lambda x, w: F.linear(x, w) * (1 / x.detach().norm()),
    "written into": lambda x, w: F.linear(
        torch.zeros(4, 6, dtype=x.dtype).index_copy(1, torch.arange(6), x), w
    ),
    "attention": lambda x, w: F.scaled_dot_product_attention(
        query=torch.ones(4, 1, 2, dtype=x.dtype),
        key=torch.ones(4, 1, 2, dtype=x.dtype),
        value=F.linear(x, w)[:, None],
    )[:, 0],
}


@pytest.mark.parametrize("name", CALLS)
def test_however_an_operation_is_called_the_relevance_is_conserved(name):
    w, x = torch.randn(3, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    R, output = relevance(lambda x: CALLS[name](x, w), x, torch.tensor([0, 1, 2, 0]), 1e-10)
    logit = output.gather(1, torch.tensor([0, 1, 2, 0])[:, None])[:, 0]
    torch.testing.assert_close(R.sum(dim=1), logit, rtol=1e-4, atol=1e-6)


def test_what_is_written_into_a_tensor_is_followed():
    def model(x, through):
        canvas = torch.zeros_like(x)
        if through == "setitem":
            canvas[:, :4] = x[:, :4]
        else:
            canvas[:, :4].copy_(x[:, :4])
        return F.gelu(canvas)

    x, target = torch.randn(3, 6), torch.tensor([0, 1, 2])
    for through in ("setitem", "copy_"):
        R, output = relevance(lambda x: model(x, through), x, target)
        torch.testing.assert_close(R.sum(dim=1), output.gather(1, target[:, None])[:, 0])


def test_inner_relevance_comes_in_the_order_asked_for_and_without_gradients_switched_on():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        (R, second, first), _ = relevance(
            model, torch.rand(2, 6), torch.tensor([0, 1]), layers=[model[2], model[0]]
        )
    assert R.shape == (2, 6) and second.shape == (2, 3) and first.shape == (2, 5)
