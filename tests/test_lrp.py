"""LRP equals its reference implementations on any model, and its heatmaps can be trained through."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import golden, refuses, slope_error, with_statistics_of
from torch import nn
from torch.overrides import _get_current_function_mode

import lrp
from isnet_lrp import background_loss, foreground_loss
from lrp import LRP, relevance
from vit import ViT

pytestmark = pytest.mark.filterwarnings("error")  # no operation of a known model lacks a rule
TARGET = torch.tensor([0, 1, 2, 0])


def doubles(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def logit(output: torch.Tensor, target: torch.Tensor = TARGET) -> torch.Tensor:
    return output.gather(1, target[:, None])[:, 0]


@pytest.mark.parametrize("epsilon, zbox", [("1e-06", ""), ("0.25", ""), ("0.25", "zbox.")])
def test_the_epsilon_and_z_box_rules_equal_zennit_s(epsilon, zbox):
    """Equations (1), (2), (9)."""
    numbers, weights = golden("lrp_cnn.npz")
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3, padding=1)]
    layers += [nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(192, 10), nn.ReLU(), nn.Linear(10, 4)]
    model, images, target = nn.Sequential(*layers).double(), numbers[zbox + "images"], numbers["target"]
    model.load_state_dict(weights)
    box = (0.0, torch.ones(3, 1, 1)) if zbox else None
    R, output = relevance(model, images, target, float(epsilon), input_rule=box)
    per_unit = R / logit(output, target)[:, None, None, None]
    expected = numbers[zbox + "relevance_per_unit_logit" + ("" if zbox else f".eps_{epsilon}")]
    torch.testing.assert_close(per_unit, expected, rtol=1e-5, atol=1e-8)


def test_the_rules_for_transformers_equal_lxt_s():
    """Equations (5), (6), (8)."""
    (_, weights), (numbers, _) = golden("dino_vit.npz"), golden("lrp_vit_attnlrp.npz")
    vit = ViT(32, 8, 3, 48, 3, 3)
    vit.load_state_dict(weights)
    vit = vit.double()
    R, _ = relevance(lambda x: vit(x).pooled, numbers["images"], lambda y: y @ numbers["direction"], 1e-12)
    torch.testing.assert_close(R, numbers["relevance"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("signed", [False, True])
def test_the_gamma_rules_equal_a_computation_contribution_by_contribution(signed):
    """Equations (3), (4): R_i = sum_j R_j c_ij (1 + gamma [favoured]) / (the same over i, with biases)."""
    layer, gamma, x, weights = nn.Linear(6, 5).double(), 0.7, doubles(4, 6), doubles(4, 5)
    x = x if signed else x.abs()
    c = torch.cat([x[:, None] * layer.weight, layer.bias.expand(4, 5)[:, :, None]], dim=2)  # (B, 5, 7)
    z = c.sum(dim=2, keepdim=True)
    favoured = c * (1 + gamma * (c.sign() == (z.sign() if signed else 1)).double())
    total = favoured.sum(dim=2, keepdim=True)
    R = (weights[:, :, None] * z * favoured / (total + 0.01 * total.sign())).sum(dim=1)[:, :6]
    torch.testing.assert_close(relevance(layer, x, weights, 0.01, gamma, signed=signed)[0], R)


def cnn() -> nn.Module:
    """Batch norm, ReLU in place, a depthwise convolution; no biases."""
    layers = [nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(True), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU(True)]
    for norm in (layers[1], layers[5]):
        norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 2)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(96, 3, bias=False))


class Mixed(nn.Module):
    """A reused ReLU and a sum in place, group and RMS norm, a gate, functional calls, normalisation."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(i, 6, 3, padding=1) for i in (3, 6))
        self.norm, self.relu = nn.GroupNorm(2, 6), nn.ReLU(inplace=True)
        self.gate, self.head = nn.Linear(6, 6), nn.Linear(12, 3)

    def forward(self, x):
        x = self.relu(self.conv1(x))
        y = self.norm(self.conv2(x))
        y += x
        y = F.silu(self.relu(y)) * torch.sigmoid(self.gate(y.mean((2, 3))))[:, :, None, None]
        largest = F.rms_norm(torch.addcmul(y, x, y, value=0.5).amax((2, 3)), (6,))
        return self.head(torch.cat([largest, F.normalize(F.avg_pool2d(y, 2).mean((2, 3)))], 1))


def transformer() -> nn.Module:
    """Six tokens of 16 dimensions: attention, layer norm, GELU, twice."""
    layer = nn.TransformerEncoderLayer(16, 2, 16, 0.0, "gelu", batch_first=True, norm_first=True)
    blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Conv2d(3, 6, 2, 2), nn.Flatten(2), blocks, nn.Flatten(), nn.Linear(96, 3))


MODELS = {"cnn": cnn, "mixed": Mixed, "transformer": transformer}


@pytest.mark.parametrize("gamma, signed", [(0.0, False), (10.0, False), (10.0, True)])
def test_without_biases_the_relevance_of_images_and_inner_layers_sums_to_the_logit(gamma, signed):
    model, images = cnn().double().eval(), doubles(4, 3, 8, 8)
    alone, output = relevance(model, images, TARGET, 1e-10, gamma, signed=signed)
    with torch.no_grad():  # relevance switches gradients on for itself
        inner = {"layers": [model[1], model[-1], model[1]]}  # in the order asked for
        (R, first, head, same), _ = relevance(model, images, TARGET, 1e-10, gamma, signed=signed, **inner)
    assert first.shape == same.shape == (4, 6, 8, 8) and head.shape == (4, 3)
    for relevances in (R, first):
        torch.testing.assert_close(relevances.sum(dim=(1, 2, 3)), logit(output), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(head, F.one_hot(TARGET, 3) * output)
    assert torch.equal(relevance(model, images, TARGET.int(), 1e-10, gamma, signed=signed)[0], alone)
    assert torch.equal(R, alone) and not any(m._forward_hooks for m in model)
    assert not alone.requires_grad  # without create_graph


@pytest.mark.parametrize("running", [False, True])
def test_an_instance_norm_has_the_relevance_of_the_equal_group_or_batch_norm(running):
    norm = nn.InstanceNorm2d(6, affine=True, track_running_stats=running)
    for values in norm.state_dict().values():  # num_batches_tracked becomes 0 or 1, and is not used
        values.copy_(torch.rand(values.shape) + 0.5)
    equal = nn.BatchNorm2d(6) if running else nn.GroupNorm(6, 6)
    equal.load_state_dict(norm.state_dict())
    model, images = cnn(), doubles(4, 3, 8, 8)
    norms = [nn.Sequential(*model[:1], layer, *model[2:]).double().eval() for layer in (norm, equal)]
    (found, output), (expected, _) = (relevance(net, images, TARGET, gamma=1.0, signed=True) for net in norms)
    torch.testing.assert_close(found, expected)
    assert torch.equal(output, norms[0](images))


def test_in_training_the_batch_s_statistics_are_constants():
    """Equation (7). The heatmap is that of the same network with the batch's mean and deviation fixed."""
    model, images = cnn().double().train(), doubles(4, 3, 8, 8)
    for norm in (model[1], model[5]):
        nn.init.normal_(norm.bias)
    twin = with_statistics_of(images, model)
    found, expected = (relevance(net, images, TARGET, 1e-9, 3.0, signed=True)[0] for net in (model, twin))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [False, True])
def test_within_the_context_output_and_gradients_of_a_plain_loss_are_exact(name, training):
    model, images, results = MODELS[name]().double().train(training), doubles(4, 3, 8, 8), []
    for inside in (False, True):
        twin, x = copy.deepcopy(model), images.clone().requires_grad_()
        with LRP(1e-6, 0.5) as rules:
            output = twin(rules.watch(x) if inside else x)
            F.cross_entropy(output, TARGET).backward()
        results.append((output, x.grad, *[p.grad for p in twin.parameters()], *twin.buffers()))
    assert torch.equal(results[0][0], results[1][0])
    for exact, found in zip(*results):
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("gamma, signed, box", [(0.0, 0, None), (0.5, 0, None), (10.0, 1, (0, 1))])
@pytest.mark.parametrize("training", [False, True])
def test_no_term_of_the_isnet_loss_is_lost_in_double_backward(name, gamma, signed, box, training):
    """Its gradient agrees with finite differences."""
    model = MODELS[name]().double().train(training)
    weights = list(model.parameters())
    for p in weights:
        if not p.any():  # max(w, 0) has a kink there
            nn.init.normal_(p, std=0.3)
    images, mask, labels = doubles(3, 3, 8, 8).sigmoid(), torch.zeros(3, 1, 8, 8).double(), TARGET[:3]
    mask[:, :, 2:6, 2:6] = 1

    def loss() -> torch.Tensor:
        target = 2 * F.one_hot(labels, 3).double() - 1
        R, output = relevance(model, images, target, 0.05, gamma, box, create_graph=True, signed=signed)
        isnet = background_loss(R, mask, decay=0.9) + foreground_loss(R, mask, c1=5.0, c2=7.0)
        return F.cross_entropy(output, labels) + isnet.mean()

    assert slope_error(loss, weights) < 1e-4


def write(change, x: torch.Tensor) -> torch.Tensor:
    change(canvas := torch.zeros_like(x))
    return F.gelu(canvas)


def write_into_a_layer(x: torch.Tensor) -> torch.Tensor:
    y = F.linear(x, w)
    y[y < 0] = 0
    y[:, :2] += y[:, 1:]
    return F.gelu(y)


w, one = doubles(3, 6), torch.ones(4, 1, 2).double()
CONSERVED = {
    "linear": lambda x: F.linear(input=x, weight=w),
    "convolution": lambda x: F.conv1d(x[:, :, None], w[:, :, None], bias=None, stride=1)[:, :, 0],
    "addmm": lambda x: torch.addmm(torch.zeros(1).double(), x, w.T),
    "constants": lambda x: (x @ w.T) * torch.ones_like(x[:, :3]) / x.detach().norm(),
    "product": lambda x: x[:, :3] * x[:, 3:] + torch.mul(x[:, 3:], other=x[:, :3]),
    "quotient": lambda x: torch.div(input=x / (1 + x.norm(dim=1, keepdim=True)), other=x.norm()),
    "root": lambda x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True)),
    "root in place": lambda x: x * x.pow(2).mean(1, keepdim=True).rsqrt_(),
    "reciprocal": lambda x: x * (1 / x.norm(dim=1, keepdim=True)) + x / (1 / x.norm()).reciprocal(),
    "constant over input": lambda x: x * (torch.ones(()) / x.norm(dim=1, keepdim=True)),
    "layer_norm": lambda x: F.layer_norm(x, (6,), w[0]),
    "group_norm": lambda x: F.group_norm(x, 2, w[0]),
    "attention": lambda x: F.scaled_dot_product_attention(query=one, key=one, value=(x @ w.T)[:, None])[:, 0],
    "index_copy": lambda x: torch.zeros_like(x).index_copy(1, torch.arange(6), x),
    "shapes": lambda x: x.view(4, 2, 3).mT.flatten(1).unsqueeze(2).expand(-1, -1, 2).reshape(4, -1)[:, 1::2],
    "size": lambda x: x.view(x.size(0), x.shape[x.dim() - 1]),  # a warning would be an error here
    "parts": lambda x: torch.concatenate(
        [x.moveaxis(0, 1).mT.chunk(2, 1)[1], x.split(4, 1)[0], torch.stack(list(x))], 1
    ),
    "sums": lambda x: (1 - x - 1).cumsum(1) + x.mean(1, keepdim=True),
    "maxima": lambda x: torch.stack([x.amax(1), x.max(1)[0], x.sort(1)[0][:, 3], x.median(1)[0]], 1),
    "pooling": lambda x: F.max_pool1d(F.avg_pool1d(F.interpolate(x[:, None], size=12), 2), 2)[:, 0],
    "rectifiers": lambda x: F.leaky_relu(x) + x.abs() + torch.where(x > 0, x, 0) + F.relu(-x),
    "addcmul": lambda x: torch.addcmul(x[:, :3], x[:, 3:], x[:, :3], value=2),
    "rms_norm": lambda x: F.rms_norm(x.swapaxes(0, 1).mT, (6,), w[0]),
    "normalize": lambda x: F.gelu(F.normalize(F.linear(x, w))),
    "norm": lambda x: x.norm(dim=1, keepdim=True).expand(-1, 3),
    "in place": lambda x: write(lambda c: (c.add_(x), c.mul_(2), c.masked_fill_(x > 1, 0), F.relu_(c)), x),
    "dropout": lambda x: F.dropout(F.silu(x), 0.5, training=False, inplace=True),
    "setitem": lambda x: write(lambda c: c.__setitem__((slice(None), slice(4)), x[:, :4]), x),
    "setitem of a layer": write_into_a_layer,
    "part of a canvas": lambda x: write(lambda c: c[:, :4].add_(x[:, :4]), x),
    "view of a canvas": lambda x: F.gelu((c := torch.zeros_like(x)).__setitem__(..., x) or c.view(4, 6)),
    "copy_": lambda x: write(lambda c: c[:, :4].copy_(x[:, :4]), x),
}


@pytest.mark.parametrize("box", [None, (-3, 3)])
def test_detached_biases_are_constants_in_the_denominators_and_nowhere_else(box):
    layer, x, found = nn.Linear(6, 3).double(), doubles(4, 6), []
    for detach in (False, True):
        R, output = relevance(layer, x, TARGET[:4], 0.3, 0.0, box, create_graph=True, detach_biases=detach)
        of_R = torch.autograd.grad(R.square().sum(), layer.weight, retain_graph=True)
        (to_bias,) = torch.autograd.grad(R.square().sum(), layer.bias, retain_graph=True, allow_unused=True)
        found.append([R, *of_R, *torch.autograd.grad(output.square().sum(), layer.parameters())])
        assert (to_bias is None or not to_bias.any()) == detach
    assert all(map(torch.equal, *found))


def test_the_z_box_rule_is_for_each_layer_that_gets_the_images_and_one_must_get_them():
    layer, x, box = nn.Linear(6, 3).double(), doubles(4, 6), {"input_rule": (-3, 3)}
    R, _ = relevance(layer, x, TARGET, **box)
    torch.testing.assert_close(relevance(lambda x: layer(x) + layer(x), x, TARGET, **box)[0], 2 * R)
    refuses("input_rule: .* a linear layer", relevance, lambda x: layer(x * 2), x, TARGET, **box)


def test_a_model_may_change_the_images_in_place():
    layer, images = nn.Linear(6, 3).double(), doubles(4, 6)
    expected = relevance(lambda x: layer(x - 1), images, TARGET)[0]
    torch.testing.assert_close(relevance(lambda x: layer(x.sub_(1)), images, TARGET)[0], expected)
    with pytest.raises(ValueError, match="input_rule"):  # is for pixels as they are
        relevance(lambda x: layer(x.sub_(1)), images, TARGET, input_rule=(-3, 3))


ones, linear = torch.ones(4, 5, 6).double(), nn.Linear(6, 6)
parts = nn.Sequential(nn.Linear(6, 6), nn.Unflatten(2, (2, 3)))
LAYERS = {  # a module, a model that changes its output in place, and the same model written out
    "attention": (nn.MultiheadAttention(6, 2, batch_first=True), lambda m, x: m(x, x, x)[0].add_(x),
        lambda m, x: m(x, x, x)[0] + x),
    "sum": (linear, lambda m, x: m(x).add_(x), lambda m, x: m(x) + x),
    "view": (parts, lambda m, x: m(x).mul_(2).flatten(2), lambda m, x: (2 * m(x)).flatten(2)),
    "same tensor": (nn.Identity(), lambda m, x: (m(y := 2 * x).mul_(2), y)[1], lambda m, x: 2 * m(2 * x)),
    "view used twice": (nn.Dropout().eval(), lambda m, x: ((y := (2 * x).mT) + m(y)).mT,
        lambda m, x: ((y := (2 * x).mT.contiguous()) + m(y)).mT),
    "constant": (linear, lambda m, x: x * m(ones).mul_(2), lambda m, x: x * (2 * m(ones))),
    "a part": (linear, lambda m, x: ((y := m(x))[:, :2].relu_(), y)[1],
        lambda m, x: torch.cat([(y := m(x))[:, :2].relu(), y[:, 2:]], 1)),
    "a shape": (linear, lambda m, x: ((y := m(x)).flatten().mul_(2), y)[1], lambda m, x: 2 * m(x)),
    "a gate": (linear, lambda m, x: (y := m(x)).mul_(y.sigmoid()), lambda m, x: (y := m(x)) * y.sigmoid()),
}  # fmt: skip


@pytest.mark.parametrize("gamma", [0.0, 0.5])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_s_relevance_is_that_of_its_output_before_changes_in_place_and_changes_no_other(name, gamma):
    (module, *models), x, w, found = LAYERS[name], doubles(4, 5, 6), doubles(6, 3), []
    for f in models:
        model = lambda x, f=f: F.gelu(f(module.double(), x) @ w).mean(1)  # noqa: E731
        (R, *of_layers), output = relevance(model, x, TARGET, layers=[module, module], gamma=gamma)
        torch.testing.assert_close(R, relevance(model, x, TARGET, gamma=gamma)[0])
        found.append([R, *of_layers, output])
    for in_place, written_out in zip(*found):
        torch.testing.assert_close(in_place, written_out)


def test_a_change_in_place_that_the_context_does_not_see_is_refused():
    layer, x = nn.Linear(6, 3).double(), doubles(4, 6)
    for change in (lambda y: torch._foreach_mul_([y], 0.5), lambda y: torch.mul(y, 0.5, out=y)):
        model = lambda x: (y := layer(x), change(y.detach()), F.gelu(y))[2]  # noqa: B023, E731
        refuses("has changed a tensor in place", relevance, model, x, TARGET, layers=[layer])


def test_gates_without_gradients_are_constants():
    layer, x = nn.Linear(6, 6).double(), doubles(4, 6)
    expected, _ = relevance(lambda x: x * torch.sigmoid(layer(x)).detach(), x, TARGET)
    for gate in (torch.no_grad()(lambda x: layer(x).sigmoid()), lambda x: layer(x).sigmoid().detach_()):
        torch.testing.assert_close(relevance(lambda x, gate=gate: x * gate(x), x, TARGET)[0], expected)


@pytest.mark.parametrize("name", CONSERVED)
def test_operations_conserve_relevance_however_they_are_called(name):
    x = doubles(4, 6)
    R, output = relevance(CONSERVED[name], x, TARGET, 1e-10)
    torch.testing.assert_close(output, CONSERVED[name](x))
    torch.testing.assert_close(R.sum(dim=1), logit(output), rtol=1e-4, atol=1e-6)


def test_an_operation_without_a_rule_is_named_once_and_keeps_its_gradient():
    x = doubles(4, 6).requires_grad_()
    with pytest.warns(UserWarning, match="no rule for 'sin'.* exact if f") as caught:
        R, _ = relevance(lambda x: x.sin().sin(), x, TARGET)
    torch.testing.assert_close(R, x * torch.autograd.grad(logit(x.sin().sin()).sum(), x)[0])
    assert len(caught) == 1


def test_a_volume_of_one_slice_has_the_relevance_of_the_slice():
    flat, images = nn.Conv2d(3, 4, 3).double(), doubles(4, 3, 8, 8)
    deep, head = nn.Conv3d(3, 4, (1, 3, 3)).double(), nn.Sequential(nn.ReLU(), nn.Flatten())
    head.append(nn.Linear(144, 3).double())
    deep.load_state_dict({"weight": flat.weight[:, :, None], "bias": flat.bias})
    R, output = relevance(nn.Sequential(deep, head), images[:, :, None], TARGET, 0.01, 10.0, signed=True)
    expected, of_slice = relevance(nn.Sequential(flat, head), images, TARGET, 0.01, 10.0, signed=True)
    torch.testing.assert_close((R[:, :, 0], output), (expected, of_slice))


def test_torch_s_own_batch_norm_is_named_since_its_arguments_have_another_order():
    norm = lambda x: torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False)  # noqa: E731
    with pytest.warns(UserWarning, match="no rule for 'torch.batch_norm'"):
        relevance(norm, doubles(4, 6), TARGET)


def test_a_custom_function_beside_a_shortcut_is_named_since_it_hides_its_operations():
    class Twice(torch.autograd.Function):
        forward = backward = staticmethod(lambda ctx, x: 2 * x)

    with pytest.warns(UserWarning, match="no rule for 'TwiceBackward'") as caught:
        relevance(lambda x: x + F.linear(Twice.apply(F.gelu(x)), w.T @ w), doubles(4, 6), TARGET)
    assert len(caught) == 1


def test_no_rule_applies_to_a_score():
    """A probability's logarithm and the log-odds that the release bounds: functions of the output."""
    model, x = cnn().double().eval(), doubles(4, 3, 8, 8)
    bounded = lambda z: (p := z.softmax(dim=1)[:, 0]).add(0.01).log() - (1.01 - p).log()  # noqa: E731
    for score in (lambda z: z.softmax(dim=1)[:, 0].log(), lambda z: z.log_softmax(dim=1)[:, 0], bounded):
        found, output = relevance(model, x, score)
        z = output.detach().requires_grad_()
        (weights,) = torch.autograd.grad(score(z).sum(), z)
        torch.testing.assert_close(found, relevance(model, x, weights)[0])
    assert torch.equal(relevance(model, x, TARGET.tolist())[0], relevance(model, x, TARGET)[0])


MASK = torch.ones(5, 5).tril().bool()
INFINITE = torch.zeros(5, 5).double().masked_fill(~MASK, -torch.inf)
ATTENTION = {
    "bool": lambda x: F.scaled_dot_product_attention(x, x, x, MASK),
    "float": lambda x: F.scaled_dot_product_attention(x, x, x, INFINITE),
    "causal": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "einsum": lambda x: torch.einsum(
        "bij,bjd->bid", (torch.einsum("bid,bjd->bij", [x / 2, x]) + INFINITE).softmax(-1), x
    ),
    "scale": lambda x: F.scaled_dot_product_attention(4 * x, x, x, MASK, scale=1 / 8),
    "baddbmm": lambda x: torch.baddbmm(INFINITE, x * 4**-0.5, x.mT).softmax(-1) @ x,
}


@pytest.mark.parametrize("name", ATTENTION)
def test_masked_attention_has_the_relevance_of_attention_written_out(name):
    x, written = doubles(4, 5, 4), lambda x: (x @ x.mT / 2).masked_fill(~MASK, -torch.inf).softmax(-1) @ x
    found, expected = (relevance(lambda x: f(x).mean(1), x, TARGET)[0] for f in (ATTENTION[name], written))
    torch.testing.assert_close(found, expected)


def test_the_context_ends_with_an_exception_and_nests():
    model, images = Mixed(), torch.rand(4, 3, 8, 8)
    expected, _ = relevance(model, images, TARGET)
    with pytest.raises(ZeroDivisionError), LRP(gamma=3.0) as rules:
        watched = rules.watch(images)
        model(watched)
        raise ZeroDivisionError
    assert not images.requires_grad
    with LRP(gamma=3.0) as outer:
        torch.testing.assert_close(relevance(model, outer.watch(images), TARGET)[0], expected)


def test_relevance_is_divided_in_float32_under_autocast(monkeypatch):
    seen, share = [], lrp._Share.apply
    monkeypatch.setattr(lrp._Share, "apply", lambda g, top, z, e: seen.append(z.dtype) or share(g, top, z, e))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        relevance(nn.Sequential(nn.Flatten(), nn.Linear(9, 3)), torch.rand(4, 1, 3, 3), TARGET)
    assert seen == [torch.float32]


@pytest.mark.parametrize("backward", [True, False])
def test_nothing_of_a_step_outlives_it(backward):
    """No tensor keeps itself alive, or memory would grow from step to step."""
    model, traces = cnn(), []
    model[2] = nn.SiLU(inplace=True)
    for layer in (model[0], model[1], model[4]):
        layer.register_forward_hook(
            lambda m, x, y: traces.extend(map(weakref.ref, (y, _get_current_function_mode())))
        )
    gc.disable()
    try:
        images, changing = torch.rand(4, 3, 8, 8), lambda x: model(F.silu(x, inplace=True))
        R, output = relevance(changing, images, TARGET, gamma=0.5, create_graph=True)
        if backward:
            (R.square().sum() + output.sum()).backward()
        traces += [weakref.ref(R), weakref.ref(output)]
        del R, output
        assert [trace() for trace in traces] == [None] * 8
    finally:
        gc.enable()


def test_a_layer_keeps_three_maps_to_train_through_its_relevance():
    """Its output and the gradients before and after the rule: no quotient and no denominator."""
    kept, maps, images = {}, [], torch.rand(4, 3, 9, 9)
    hooks = lambda t: kept.update({t.data_ptr(): t}) or t, lambda t: t  # noqa: E731
    for depth in (2, 6):
        kept.clear()
        layers = [nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(depth)] + [nn.Flatten()]
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            relevance(nn.Sequential(*layers), images, TARGET, create_graph=True)
        maps.append(sum(t.shape == images.shape for t in kept.values()))
    assert maps[1] - maps[0] == 3 * 4
