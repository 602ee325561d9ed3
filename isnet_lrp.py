"""LRP over any model, as changed gradients, and the ISNet loss that keeps a classifier off the background.

Layer-wise relevance propagation hands a logit back through the network, layer by layer, to the pixels. Every
rule here is a change of the gradient g that arrives at an operation's output, so that one backward pass does
it all:

    R = input * (changed gradient d logit / d input)                                                 (1)
    linear, convolution    z = w x + b         g <- g z / (z + eps sign z)                           (2)
    the same with gamma    w' = w + gamma w+   g <- g z / (z' + eps sign z'), back through w'        (3)
    or, where signed       z' = z + gamma (z + sign(z) |w| |x|) / 2 in place of w' x                 (4)
    elementwise            y = f(x)            g <- g f(x) / x  in place of  g f'(x)                 (5)
    layer, group norm      the deviation is a constant, the subtraction of the mean stays linear     (6)
    batch norm             mean and deviation are constants, folded into the layer before it         (7)
    a @ b, a * b           both depend on the input: g <- g / 2, half of the relevance to each       (8)
    input layer (box)      z - w+ low - w- high in place of z, for pixels in [low, high]             (9)

(2), (3), (9): Montavon et al. 2019. (5), (6), (8): AttnLRP, Achtibat et al. 2024, arXiv 2402.05602; softmax
keeps its gradient. The loss: ISNet, Bassi et al. 2022, arXiv 2202.00232, and Faster ISNet 2024, arXiv
2401.08409. (3) is made for x >= 0 and z >= 0, as behind and before a ReLU; elsewhere z' passes through 0
where z doesn't, and relevance explodes. (4), the generalised rule, favours contributions that have the sign
of z; it equals (3) for x, z >= 0 and keeps z / z' in [0, 1] for all signs.

`lrp` is a `TorchFunctionMode`: it sees conv2d, gelu, matmul ... as the model calls them, as module or as
function, in place or not, once or often; no model has to be changed. The model's output and all gradients
within it are the true ones: the rules act only while `explain` walks back. So one forward serves
classification and relevance, and the training loss, which differentiates the heatmap again, misses no term.
What has no rule keeps its gradient; that is right for whatever is straight along the ray from 0 through its
input (reshape, sum, max, ReLU ...), which is tried out, and anything else is named in a warning, once. Linear
operations other than those in LAYERS and RULES (einsum ...) are among them: (2) with eps = 0, whatever gamma.

A network can satisfy the loss and keep its shortcut; each part is meant to close one way out, and the README
measures what happens without it:

    a small marker is averaged away        pool by rank (decay < 1); count traces (small E)
    the foreground's relevance is inflated the foreground loss
    pairs of units cancel                  (4) instead of (2), in a ReLU network
    z' passes through 0                    (4) instead of (3), with residual sums and signed inputs
    both logits rise together              explain log-odds, not a logit
    the marker's absence is coded          supervise inner layers (`layers`)

The last needs a word: a unit that its bias feeds and the marker silences has no relevance where the marker
is, and where it isn't, hands it to the bias, never to a pixel. On its own layer it shows. None of this is
proof: relevance shares out what a unit hands on, so evidence that takes a unit to nearly 0 leaves hardly a
trace; a frame or a tint around the foreground gets past all of it. Whether a shortcut is gone, only images
tell in which it lies.

The floor of a training step's cost, a plain one being 3 forward passes' worth (forward 1, backward 2): (2)
adds the relevance pass, 1, and the way back through it, 2; that makes 6, or 2 x. (3) adds w' x, whose
relevance pass takes the place of z's: forward 1, the way back 2; 9, or 3 x. (4) walks through both z and |w|
|x|: 12, or 4 x. Claim 5 is measured with this file. Next to read: `masks.py`.
"""

import math
import types
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary


class _Share(torch.autograd.Function):
    """g top / (z + eps sign z), with its derivative in few operations, since every layer needs both."""

    @staticmethod
    def forward(ctx, g: Tensor, top: Tensor, z: Tensor, epsilon: float) -> Tensor:
        ctx.epsilon = epsilon
        ctx.save_for_backward(g, top, z)  # and not the quotient, which would be one more map a layer to keep
        return g * top / torch.add(z, _sign(z), alpha=epsilon)

    @staticmethod
    def backward(ctx, grad: Tensor):
        g, top, z = ctx.saved_tensors
        d = torch.add(z, _sign(z), alpha=ctx.epsilon)
        grad = grad / d
        to_g = grad * top
        return to_g, grad * g, -to_g * g / d, None


class _Route(torch.autograd.Function):
    """y, whose gradient goes to y as ever; but while explaining, g top / (z + eps sign z) goes to z instead.

    Without top, z is another way to y: g goes there as it is.
    """

    @staticmethod
    def forward(ctx, rules: "lrp", y: Tensor, z: Tensor, top: Tensor | None = None, epsilon: float = 0.0):
        ctx.rules, ctx.epsilon = rules, epsilon
        ctx.save_for_backward(*(() if top is None else (top, z)))
        return y.view_as(y)

    @staticmethod
    def backward(ctx, g: Tensor):
        if not ctx.rules.explaining:
            return None, g, None, None, None
        if ctx.saved_tensors:
            top, z = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in ctx.saved_tensors)
            g = _Share.apply(g, top, z, ctx.epsilon).to(g.dtype)
        return None, None, g, None, None


class _Scale(torch.autograd.Function):
    """x as it is, but while explaining its gradient is multiplied by a number; 0 makes it a constant."""

    @staticmethod
    def forward(ctx, rules: "lrp", x: Tensor, factor: float) -> Tensor:
        ctx.rules, ctx.factor = rules, factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g: Tensor):
        if ctx.rules.explaining:
            return None, g * ctx.factor if ctx.factor else None, None
        return None, g, None


class _Variance(torch.autograd.Function):
    """The variance (C,) of x (B, C, ...) around its mean (C,), which keeps only x for the way back."""

    @staticmethod
    def forward(ctx, x: Tensor, mean: Tensor) -> Tensor:
        ctx.save_for_backward(x, mean)
        ctx.dims, ctx.shape = [0, *range(2, x.dim())], (-1,) + (1,) * (x.dim() - 2)
        return (x - mean.view(ctx.shape)).square().mean(ctx.dims)

    @staticmethod
    def backward(ctx, g: Tensor):
        x, mean = ctx.saved_tensors
        return (x - mean.view(ctx.shape)) * (g * (2 * x.shape[1] / x.numel())).view(ctx.shape), None


def _sign(z: Tensor) -> Tensor:
    return torch.ones((), dtype=z.dtype, device=z.device).copysign(z.detach())  # never 0


class lrp(TorchFunctionMode):
    """Within this context every operation on what depends on the watched input has a relevance rule.

    epsilon: the stabiliser of (2); gamma: 0 for the epsilon rule, larger to favour contributions of one sign,
    toward the z+ rule, by (3) or, if signed, by (4). Use `watch(images)` before the model's forward,
    `explain(score, inputs)` after it. Raises ValueError for negative numbers.
    """

    def __init__(self, epsilon: float = 1e-6, gamma: float = 0.0, signed: bool = False):
        super().__init__()
        if not (epsilon >= 0 and gamma >= 0):
            raise ValueError(f"lrp: epsilon {epsilon} and gamma {gamma} must not be negative")
        self.epsilon, self.gamma, self.signed, self.explaining = epsilon, gamma, signed, False
        # What depends on the input, with None, or a layer that awaits its rule, or (in place) its successor.
        self.states = WeakIdKeyDictionary()
        self.warned: set[str] = set()
        self.box: list[Tensor] = []  # the input and its bounds, where rule (9) is wanted

    def watch(self, images: Tensor) -> Tensor:
        """Mark the input whose relevance is asked for; returns it, requiring a gradient."""
        images = images if images.requires_grad else images.detach().requires_grad_()
        self.states[images] = None
        return images

    def explain(self, score: Tensor, inputs: list[Tensor], create_graph: bool = False) -> list[Tensor]:
        """Changed gradients of the scores' sum with respect to inputs, by the rules."""
        self.explaining = True
        try:
            return list(torch.autograd.grad(self.current(score).sum(), inputs, create_graph=create_graph))
        finally:
            self.explaining = False

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self.states.clear()

    def active(self, t) -> bool:
        """Whether t is a tensor that depends on the input."""
        return isinstance(t, Tensor) and t in self.states

    def current(self, t):
        """What a tensor stands for now: its successor after in-place operations, a layer's ruled output."""
        while self.active(t) and self.states[t] is not None:
            state = self.states[t]
            if isinstance(state, tuple):
                with torch._C.DisableTorchFunction():  # the rule's own operations have no rule
                    self.states[t] = state = self.linear(t, t, *state)
                self.states.setdefault(state, None)
            t = state
        return t

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.explaining or not any(map(self.active, tree_leaves((args, kwargs)))):
            return func(*args, **kwargs)
        name = func.__name__
        name = name.strip("_") if name.startswith("__") else name.removesuffix("_")
        if name in COMPOSITE:
            with self:
                return _reenter(func)(*args, **kwargs)
        with torch._C.DisableTorchFunction():  # a context outside this one must not see what is done here
            return self.operate(func, name, args, kwargs)

    def operate(self, func, name: str, args, kwargs):
        """One operation by its rule, if in place then out of place; its results depend on the input."""
        changed = None
        if name in IN_PLACE or func.__name__ == name + "_":
            name = IN_PLACE.get(name, name)
            twin = getattr(torch.Tensor, name, None) or getattr(F, name, None)
            if callable(twin):
                func, changed = twin, self.current(args[0])
            else:  # as copy_ has none
                name = "setitem"
        elif kwargs.get("inplace"):
            kwargs, changed = {**kwargs, "inplace": False}, self.current(args[0])
        if name != "batch_norm":  # which is folded into the layer before it, if there is one
            args, kwargs = tree_map(self.current, (args, kwargs))
        if name in RULES:
            y = RULES[name](self, func, *args, **kwargs)
        else:
            y = self.plain(func, name, args, kwargs)
        written = (args[0], args[0]._base) if name == "setitem" else ()  # a slice and its whole
        for t in tree_leaves((y, written)):
            if isinstance(t, Tensor) and t.requires_grad:  # not what only has the input's shape
                self.states.setdefault(t, None)
        if changed is None:
            return y
        self.states[changed] = y
        return args[0]

    def plain(self, func, name: str, args, kwargs):
        """An operation without a rule keeps its gradient, with a warning if it isn't piecewise affine."""
        y = func(*args, **kwargs)
        if name in PLAIN or name in self.warned:
            return y
        leaves = tree_leaves((args, kwargs))
        used = name, tuple(self.active(t) if isinstance(t, Tensor) else repr(t) for t in leaves)
        if STRAIGHT.get(used) is None:  # once, since trying it out takes as long as thrice using it
            STRAIGHT[used] = self.straight(func, args, kwargs, y)
        if STRAIGHT[used] is False:
            self.warned.add(name)
            warnings.warn(f"lrp has no rule for '{name}': it keeps its plain gradient", stacklevel=4)
        return y

    @torch.no_grad()
    def straight(self, func, args, kwargs, y) -> bool | None:
        """Whether y = func(*args, **kwargs) is straight along the ray from 0 through the input.

        None if it can't tell, since all is 0 or something is not finite.
        """

        def along(n: float) -> list[Tensor]:
            stretch = lambda t: n * t if self.active(t) and t.is_floating_point() else t  # noqa: E731
            args_, kwargs_ = tree_map(stretch, (args, kwargs))
            return floats(func(*args_, **kwargs_))

        def floats(y) -> list[Tensor]:
            return [t for t in tree_leaves(y) if isinstance(t, Tensor) and t.is_floating_point()]

        if not floats(y):
            return True
        if not all(t.isfinite().all() for t in floats(y)) or not any(t.any() for t in floats(y)):
            return None
        return all(
            torch.allclose(twice + zero, 2 * once, rtol=1e-3, atol=1e-5 * float(once.abs().max()))
            for once, twice, zero in zip(floats(y), along(2), along(0))
        )

    def linear(self, y: Tensor, z: Tensor, op: Callable, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """Rules (2) to (4), or (9) at the watched input, for the true y = z = op(x, w, b)."""

        def part(change: Callable) -> list:  # weights and bias, changed
            return [v if v is None else change(v) for v in (w, b)]

        if self.box and x is self.box[0]:
            _, low, high = self.box
            positive, negative = part(lambda v: v.clamp(min=0)), part(lambda v: v.clamp(max=0))
            return _Route.apply(self, y, z - op(low, *positive) - op(high, *negative), z, 1e-9)
        ruled = z
        if self.gamma and self.signed:
            sized = op(x.abs(), *part(torch.abs))  # |w| |x|
            ruled = (1 + self.gamma / 2) * z + (self.gamma / 2 * _sign(z)) * sized
        elif self.gamma:
            ruled = op(x, *part(lambda v: v + self.gamma * v.clamp(min=0)))
        return _Route.apply(self, y, ruled, z, self.epsilon)

    def constant(self, x: Tensor) -> Tensor:
        """x, without relevance."""
        return _Scale.apply(self, x, 0.0)

    def half(self, y: Tensor, *factors) -> Tensor:
        """Rule (8) for the product y of factors; if only one depends on the input, y is linear in it."""
        return _Scale.apply(self, y, 0.5) if all(map(self.active, factors)) else y


# The rules: each takes (rules, func, *args, **kwargs) and returns the operation's true output.


def _layer(rules: lrp, func, input, weight, bias=None, *args, **kwargs) -> Tensor:
    """Linear layers and convolutions: the rule waits until it is known whether batch norm follows."""
    y = func(input, weight, bias, *args, **kwargs)
    if rules.active(weight):
        return rules.half(y, input, weight)
    rules.states[y] = (lambda x, w, b: func(x, w, b, *args, **kwargs), input, weight, bias)
    return y


def _matmul(rules: lrp, func, a, b, *args, **kwargs) -> Tensor:
    """Matrix products: (8) if both depend on the input, else (2) to (4) with the other as weights."""
    y = func(a, b, *args, **kwargs)
    if rules.active(a) and rules.active(b):
        return rules.half(y, a, b)
    if rules.active(a):
        return rules.linear(y, y, lambda x, w, _: func(x, w), a, b, None)
    return rules.linear(y, y, lambda x, w, _: func(w, x), b, a, None)


def _bias_first(rules: lrp, func, b, x, w, **kwargs) -> Tensor:
    """addmm(b, x, w): a linear layer with its arguments in another order."""
    y = func(b, x, w, **kwargs)
    op = lambda x, w, b: func(b, x, w, **kwargs)  # noqa: E731
    return rules.half(y, x, w) if rules.active(w) else rules.linear(y, y, op, x, w, b)


def _times(rules: lrp, func, a, b, *args, **kwargs):
    """Elementwise products: (8)."""
    return rules.half(func(a, b, *args, **kwargs), a, b)


def _over(rules: lrp, func, a, b, *args, **kwargs):
    """Quotients: a divisor that depends on the input is a constant, like the deviation in (6)."""
    return func(a, rules.constant(b) if rules.active(b) else b, *args, **kwargs)


def _elementwise(rules: lrp, func, input, *args, **kwargs) -> Tensor:
    """Rule (5)."""
    y = func(input, *args, **kwargs)
    return _Route.apply(rules, y, input, y, 1e-9) if rules.active(input) else y


def _norm(rules: lrp, y: Tensor, x: Tensor, groups: Tensor, eps: float, weight, bias) -> Tensor:
    """Rule (6) for y, which normalises each row of groups, x in another shape."""
    centred = groups - groups.mean(dim=-1, keepdim=True)
    deviation = (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    z = (centred / rules.constant(deviation)).view_as(x)
    return _Route.apply(rules, y, z * (1 if weight is None else weight) + (0 if bias is None else bias))


def _layer_norm(rules: lrp, func, input, normalized_shape, weight=None, bias=None, eps=1e-5, *args) -> Tensor:
    y = func(input, normalized_shape, weight, bias, eps)
    return _norm(rules, y, input, input.flatten(-len(normalized_shape)), eps, weight, bias)


def _group_norm(rules: lrp, func, input, num_groups, weight=None, bias=None, eps=1e-5, *args) -> Tensor:
    y = func(input, num_groups, weight, bias, eps)
    weight, bias = (v if v is None else v.view(-1, *[1] * (input.dim() - 2)) for v in (weight, bias))
    return _norm(rules, y, input, input.reshape(len(input), num_groups, -1), eps, weight, bias)


def _batch_norm(
    rules: lrp,
    func,
    input,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
) -> Tensor:
    """Rule (7), with the batch's statistics in training mode and the running ones in evaluation mode."""
    before = rules.states.get(input)
    x = input if isinstance(before, tuple) else rules.current(input)
    y = func(x, running_mean, running_var, weight, bias, training, momentum, eps)
    mean, var, shape = running_mean, running_var, (-1,) + (1,) * (x.dim() - 2)
    if training:
        mean = x.mean([0, *range(2, x.dim())])
        mean, var = rules.constant(mean), rules.constant(_Variance.apply(x, mean.detach()))
    scale = (var + eps).rsqrt() * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) - mean * scale
    z = torch.addcmul(shift.view(shape), x, scale.view(shape))
    if not isinstance(before, tuple):
        return _Route.apply(rules, y, z)
    op, inputs, w, b = before
    folded = w * scale.view(-1, *[1] * (w.dim() - 1))
    return rules.linear(y, z, op, inputs, folded, shift if b is None else b * scale + shift)


def _attention(
    rules: lrp, func, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, **kw
):
    """Softmax attention as two products, (8), and a softmax, which keeps its gradient."""
    if dropout_p:
        raise ValueError("lrp: attention dropout must be 0 while relevance is asked for")
    q, k, v = query, key, value
    y = func(q, k, v, attn_mask, 0.0, is_causal, scale=scale, **kw)
    scores = (q @ k.transpose(-2, -1)) * (q.shape[-1] ** -0.5 if scale is None else scale)  # (..., Q, T)
    scores = rules.half(scores, q, k)
    if is_causal:
        attn_mask = torch.ones_like(scores, dtype=torch.bool).tril()
    if attn_mask is not None:
        allowed = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if allowed else scores + attn_mask
    z = scores.softmax(dim=-1) @ v
    looking = q if rules.active(q) else k  # what the weights depend on
    return _Route.apply(rules, y, rules.half(z, looking, v))


SMOOTH = "relu6 elu selu celu gelu silu mish sigmoid logsigmoid tanh softplus softsign hardtanh hardswish "
SMOOTH += "hardsigmoid clamp clamp_min clamp_max threshold square sqrt exp log pow"
LAYERS = "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"
RULES = {
    **dict.fromkeys(SMOOTH.split(), _elementwise),
    **dict.fromkeys(LAYERS.split(), _layer),
    **dict.fromkeys(["matmul", "bmm", "mm", "rmatmul"], _matmul),
    **dict.fromkeys(["mul", "rmul", "multiply"], _times),
    **dict.fromkeys(["div", "truediv", "divide", "true_divide"], _over),
    "addmm": _bias_first,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
    "scaled_dot_product_attention": _attention,
}
# Not straight, but meant to keep their gradient: softmax, losses, and what draws random numbers.
PLAIN = set("softmax log_softmax logsumexp cross_entropy nll_loss mse_loss l1_loss kl_div bernoulli".split())
PLAIN |= set("binary_cross_entropy_with_logits dropout dropout1d dropout2d dropout3d".split())
PLAIN |= {"rand_like", "randn_like", "setitem"}
STRAIGHT: dict[tuple, bool | None] = {}  # what was tried out: {(operation, its arguments): answer}
IN_PLACE = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div"}
COMPOSITE = {"multi_head_attention_forward", "normalize"}  # Python functions of operations that have rules


def _reenter(func: types.FunctionType) -> types.FunctionType:
    """The same Python function, which hands what it calls over to a context, but no longer itself."""
    names = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    unaware = {**func.__globals__, **dict.fromkeys(names, lambda *args: False)}
    return types.FunctionType(func.__code__, unaware, func.__name__, func.__defaults__, func.__closure__)


def relevance(
    model: Callable,
    images: Tensor,
    target: Tensor | Callable,
    epsilon: float = 1e-6,
    gamma: float = 0.0,
    input_rule: tuple[float, float] | None = None,
    create_graph: bool = False,
    signed: bool = False,
    layers: Sequence[nn.Module] = (),
) -> tuple[Tensor, Tensor] | tuple[list[Tensor], Tensor]:
    """The signed LRP heatmap (B, C, H, W) of a classifier (B, C, H, W) -> (B, K), and its output.

    target: labels (B,), whose logits are explained; weights (B, K) of a sum of logits (log-odds: +1 and -1);
    or a function of the output to scores (B,). epsilon, gamma, signed: as for `lrp`. input_rule: (low, high)
    of the pixels for rule (9) in the first layer. create_graph: for training through the heatmap. layers:
    modules, each used once, whose outputs' relevance is wanted as well; then a list takes the heatmap's
    place, the heatmap first and the others in the order asked for. In a network without biases, softmax and
    gates the relevance of an image sums to its score. Raises ValueError for images that are no floats, an
    output or a target of another shape, labels out of range.
    """
    if not images.is_floating_point() or not len(images):
        raise ValueError(
            f"relevance needs float images, at least one, not {images.dtype} {tuple(images.shape)}"
        )
    seen: dict[nn.Module, Tensor] = {}
    with torch.enable_grad(), lrp(epsilon, gamma, signed) as rules:
        x = rules.watch(images)
        inputs = [x]
        if input_rule is not None:
            inputs += [torch.full_like(x, bound, requires_grad=True) for bound in input_rule]
            rules.box = inputs
        hooks = [layer.register_forward_hook(lambda m, _, y: seen.update({m: y})) for layer in layers]
        try:
            output = rules.current(model(x))
        finally:
            for hook in hooks:
                hook.remove()
        if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != len(images):
            found = getattr(output, "shape", type(output))
            raise ValueError(f"relevance needs a model with output (B, K), not {found}")
        inner = [seen[layer] for layer in layers]
        inner = [rules.current(t[0] if isinstance(t, tuple) else t) for t in inner]
        gradients = rules.explain(_score(output, target), inputs + inner, create_graph)
    products = [x * g for x, g in zip(inputs + inner, gradients)]
    heatmap = sum(products[: len(inputs)])
    return ([heatmap, *products[len(inputs) :]] if layers else heatmap), output


def _score(output: Tensor, target: Tensor | Callable) -> Tensor:
    """The quantity (B,) to explain."""
    if callable(target):
        score = target(output)
    elif target.is_floating_point():
        if target.shape != output.shape:
            raise ValueError(
                f"weights {tuple(target.shape)} do not fit outputs {tuple(output.shape)}; labels: .long()"
            )
        score = (output * target).sum(dim=1)
    elif target.min() < 0 or target.max() >= output.shape[1]:
        raise ValueError(f"target {target.tolist()} out of range: the model has {output.shape[1]} outputs")
    else:
        score = output.gather(1, target[:, None])[:, 0]
    if score.shape != (len(output),):
        raise ValueError(f"a target must give one score an image, ({len(output)},), not {tuple(score.shape)}")
    return score


def background_loss(heatmap: Tensor, mask: Tensor, decay: float = 1.0, E: float = 1.0) -> Tensor:
    """The ISNet loss (B,): how much of the relevance, beside its mean in the foreground, lies in the
    background.

        H = sum_channels |R| / its mean in the foreground,  h = pooled (1 - mask) H
        u = h / (h + E),  loss = -log(1 - u)

    heatmap (B, C, H, W), signed; mask (B, 1, H, W), 1 in the foreground. decay: 1 pools over all pixels alike
    (the foreground's count as zeros, as published); below 1 the n-th largest weighs decay^n, so that a small
    marker isn't averaged away. An image with an empty mask has no loss, which is said once. Raises
    ValueError.
    """
    H, inside = _checked(heatmap, mask)
    size = inside.sum(dim=1)
    if (size == 0).any():
        warnings.warn("background_loss: an image with an empty mask has no background loss", stacklevel=2)
    mean = (H * inside).sum(dim=1) / size.clamp(min=1)
    outside = H * (1 - inside) / mean.clamp(min=torch.finfo(H.dtype).tiny ** 0.5)[:, None]  # (B, P)
    n = H.shape[1] if decay == 1 else min(H.shape[1], math.ceil(math.log(1e-6) / math.log(decay)))
    weights = decay ** torch.arange(n, device=H.device, dtype=H.dtype)  # what comes later hardly counts
    h = (outside.topk(n, dim=1).values * weights).sum(dim=1) / weights.sum()
    return torch.log1p(h / E) * (size > 0)  # -log(1 - h / (h + E))


def foreground_loss(heatmap: Tensor, mask: Tensor, c1: float, c2: float, hybrid: bool = False) -> Tensor:
    """What keeps F, the sum of |R| in the foreground, between c1 and c2: (B,).

        (min(F / c1, 1) - 1)^2 + x^2,  x = max(F / c1 - c2 / c1, 0)

    Without it the background loss can be met by inflating the foreground's relevance. hybrid: 2 x - 1 in
    place of x^2 where x > 1, as in Faster ISNet, so that a far outlier does not rule the batch. Raises
    ValueError.
    """
    if not 0 < c1 < c2:
        raise ValueError(f"foreground_loss: c1 {c1} and c2 {c2} must be 0 < c1 < c2")
    H, inside = _checked(heatmap, mask)
    F_c1 = (H * inside).sum(dim=1) / c1
    x = (F_c1 - c2 / c1).clamp(min=0)
    above = torch.where(x > 1, 2 * x - 1, x.square()) if hybrid else x.square()
    return (F_c1.clamp(max=1) - 1).square() + above


def _checked(heatmap: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """|R| summed over channels and the mask, both (B, H * W) in float32 or better."""
    if mask.shape != (len(heatmap), 1, *heatmap.shape[2:]):
        raise ValueError(
            f"mask {tuple(mask.shape)} does not fit heatmap {tuple(heatmap.shape)}: give (B, 1, H, W)"
        )
    inside = mask.to(torch.promote_types(heatmap.dtype, torch.float32)).flatten(1)
    if not ((inside == 0) | (inside == 1)).all():
        raise ValueError("a mask must hold only 0 (background) and 1 (foreground): threshold it first")
    return heatmap.to(inside.dtype).abs().sum(dim=1).flatten(1), inside
