"""Layer-wise relevance propagation (LRP): how much each pixel contributes to a score, for any PyTorch model.

LRP distributes a score backwards, layer by layer. Here every rule is a change of the gradient g that arrives
at an operation's output, so one backward pass computes all relevance:

    R = x * (changed gradient d score / d x)                                                         (1)
    linear, convolution    z = w x + b         g <- g z / (z + eps sign z)                           (2)
    the same with gamma    z' = w' x + b'      g <- g z / (z' + eps sign z'), back through z'        (3)
                           w' = w + gamma max(w, 0), b' likewise
    or, if signed          z' = z + gamma (z + sign(z) (|w| |x| + |b|)) / 2, the rest as in (3)      (4)
    elementwise            y = f(x)            g <- g f(x) / x instead of g f'(x)                    (5)
    layer and group norm   the deviation is a constant; subtracting the mean stays linear            (6)
    batch norm             mean and deviation are constants; not folded into the layer before it     (7)
    a @ b, a * b           both depend on the input: g <- g / 2, half of the relevance to each       (8)
    input layer            z' = z - max(w, 0) low - min(w, 0) high for pixels in [low, high]         (9)

(2) epsilon, (3) gamma and (9) z^B rule: Montavon et al. 2019. (5), (6), (8): AttnLRP, Achtibat et al. 2024,
arXiv 2402.05602. (3) is made for x, z >= 0, as around a ReLU; elsewhere z' can be 0 where z is not, and
relevance explodes. (4), the generalised gamma rule, equals (3) there, favours contributions with the sign of
z and keeps z / z' in [0, 1] for any signs. Operations without a rule keep their gradient, exact if they are
piecewise linear (KEEPS_GRADIENT): any other gets one warning.

`LRP` is a `TorchFunctionMode`: it sees conv2d, gelu, matmul ... as any model calls them, in place or not, but
no custom `autograd.Function`. The rules act only in `explain`: outputs and ordinary gradients are exact, so
one forward serves prediction and relevance. Relevance can be differentiated again (`isnet_lrp.py`).
"""

import types
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary


class _Share(torch.autograd.Function):
    """g top / (z + eps sign z). A derivative by hand, since every layer needs it twice."""

    @staticmethod
    def forward(ctx, g: Tensor, top: Tensor, z: Tensor, epsilon: float) -> Tensor:
        ctx.epsilon = epsilon
        ctx.save_for_backward(g, top, z)  # not the quotient, which would be one more map to keep
        return g * top / torch.add(z, _sign(z), alpha=epsilon)

    @staticmethod
    def backward(ctx, grad: Tensor):
        g, top, z = ctx.saved_tensors
        d = torch.add(z, _sign(z), alpha=ctx.epsilon)
        grad = grad / d
        to_g = grad * top
        return to_g, grad * g, -to_g * g / d, None


class _Route(torch.autograd.Function):
    """Returns y. Ordinary gradients go to y; while explaining, g top / (z + eps sign z), or g, goes to z."""

    @staticmethod
    def forward(ctx, rules: "LRP", y: Tensor, z: Tensor, top: Tensor | None = None, epsilon: float = 0.0):
        ctx.explaining, ctx.epsilon = rules.explaining, epsilon  # not the rules, which hold tensors
        ctx.save_for_backward(*(() if top is None else (top, z)))
        return y.detach()  # no view of y: PyTorch refuses to change those in place

    @staticmethod
    def backward(ctx, g: Tensor):
        if not ctx.explaining:
            return None, g, None, None, None
        if ctx.saved_tensors:
            top, z = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in ctx.saved_tensors)
            g = _Share.apply(g, top, z, ctx.epsilon).to(g.dtype)
        return None, None, g, None, None


def _sign(z: Tensor) -> Tensor:
    return torch.ones((), dtype=z.dtype, device=z.device).copysign(z.detach())  # never 0


class LRP(TorchFunctionMode):
    """Within this context, every operation on what depends on the watched input follows its relevance rule.

    epsilon: the stabiliser of (2), in units of z. gamma: 0 for the epsilon rule; more favours contributions
    of one sign, by (3) or, if signed, (4). detach_biases: a second derivative takes biases in (2) and (9) as
    constants, as in ISNet. Call `watch(images)`, the model, `explain(score, inputs)`. Raises ValueError.
    """

    def __init__(
        self, epsilon: float = 1e-6, gamma: float = 0.0, signed: bool = False, detach_biases: bool = False
    ):
        super().__init__()
        if not (epsilon >= 0 and gamma >= 0):
            raise ValueError(f"LRP: epsilon {epsilon} and gamma {gamma} must not be negative")
        self.epsilon, self.gamma, self.signed = epsilon, gamma, signed
        self.detach_biases, self.explaining = detach_biases, []  # not empty in `explain`
        self.depends = WeakIdKeyDictionary()  # what depends on the watched input: a set, all values are True
        self.kept = WeakIdKeyDictionary()  # what must keep its values until the backward pass: a set, too
        self.warned, self.box, self.boxed = set(), [], False  # names; for (9) input and bounds, if it acted

    def watch(self, images: Tensor) -> Tensor:
        """Mark the input whose relevance is asked for; returns it, requiring a gradient."""
        images = images if images.requires_grad else images.detach().requires_grad_()
        self.depends[images] = True
        return images

    def explain(self, score: Tensor, inputs: list[Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
        """The changed gradients of the scores' sum with respect to inputs."""
        self.explaining.append(True)
        try:
            score = score.sum()
            return torch.autograd.grad(score, inputs, create_graph=create_graph, materialize_grads=True)
        finally:
            self.explaining.clear()

    def active(self, t) -> bool:
        """Whether t is a tensor that depends on the input."""
        return isinstance(t, Tensor) and (t in self.depends or t.requires_grad and t._base in self.depends)

    def route(self, *args) -> Tensor:
        """`_Route`, whose saved tensors keep their values."""
        with saved_tensors_hooks(lambda t: self.keep(t.detach()), lambda t: t):
            y = _Route.apply(self, *args)
        self.depends[y] = True
        return y

    def keep(self, t: Tensor) -> Tensor:
        """Mark t, which gets memory of its own when an operation is about to change it; returns it."""
        self.kept[t] = True
        return t

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.explaining or not any(map(self.active, tree_leaves((args, kwargs)))):
            return func(*args, **kwargs)
        name = func.__name__.strip("_")
        if name in COMPOSITE:
            with self:
                return _reenter(func)(*args, **kwargs)
        with torch._C.DisableTorchFunction():  # hides what is done here from a context around this one
            return self.operate(func, name, args, kwargs)

    def operate(self, func, name: str, args, kwargs):
        """Apply one operation with its rule; note what depends on the input."""
        written, twin, inplace = None, None, kwargs.get("inplace")
        if inplace or name == "setitem" or name in IN_PLACE or func.__name__ == name + "_":
            name, written = IN_PLACE.get(name, name), args[0]
            for t in self.kept:
                if t.untyped_storage().data_ptr() == written.untyped_storage().data_ptr():
                    t.data = t.detach().clone()
            if name in RULES:  # out of place on a copy, since rules may save it; written back
                twin = func if inplace else getattr(torch.Tensor, name, None) or getattr(F, name)
                kwargs = {k: v for k, v in kwargs.items() if k != "inplace"}
                args = (written.clone(), *args[1:])
                self.depends.update([(args[0], True)] * self.active(written))
        y = RULES[name](self, twin or func, *args, **kwargs) if name in RULES else func(*args, **kwargs)
        y = written.copy_(y) if twin else y
        changed = (y, written, None if written is None else written._base)  # the last: of a slice its whole
        new = [t for t in tree_leaves(changed) if isinstance(t, Tensor) and t.requires_grad]
        if new and not (name in RULES or name in KEEPS_GRADIENT or name in self.warned):
            self.warned.add(name)
            warnings.warn(f"LRP: no rule for '{name}'. {NO_RULE}", stacklevel=3)
        self.depends.update((t, True) for t in new)
        return y

    def linear(self, op: Callable, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        """z = op(x, w, b) with rules (2) to (4), or rule (9) at the watched input."""
        part = lambda change: [v if v is None else change(v) for v in (w, b)]  # noqa: E731
        y = z = ruled = op(x, w, b)
        if self.active(w):
            return self.half(y, x, w)
        if self.detach_biases and b is not None:
            b = b.detach()
            z = ruled = op(x, w, b)
        if self.box and x is self.box[0]:
            (_, low, high), self.boxed = self.box, True
            positive, negative = part(lambda v: v.clamp(min=0)), part(lambda v: v.clamp(max=0))
            return self.route(y, z - op(low, *positive) - op(high, *negative), z, 1e-9)
        if self.gamma and self.signed:
            sized = op(x.abs(), *part(torch.abs))  # |w| |x| + |b|
            ruled = (1 + self.gamma / 2) * z + (self.gamma / 2 * _sign(z)) * sized
        elif self.gamma:
            ruled = op(x, *part(lambda v: v + self.gamma * v.clamp(min=0)))
        return self.route(y, ruled, z, self.epsilon)

    def constant(self, x: Tensor) -> Tensor:
        """x, without relevance."""
        return self.route(x, x.detach())

    def half(self, y: Tensor, *factors) -> Tensor:
        """Rule (8) for the product y of factors; if only one depends on the input, y is linear in it."""
        return self.route(y, y / 2) if all(map(self.active, factors)) else y

    # The rules: each takes (func, *args, **kwargs) and returns the operation's exact output.
    def _layer(self, func, input, weight, bias=None, *args, **kwargs) -> Tensor:
        return self.linear(lambda x, w, b: func(x, w, b, *args, **kwargs), input, weight, bias)

    def _matmul(self, func, a, b, *args, **kwargs) -> Tensor:
        if self.active(a):
            return self.linear(lambda x, w, _: func(x, w, *args, **kwargs), a, b)
        return self.linear(lambda x, w, _: func(w, x, *args, **kwargs), b, a)

    def _einsum(self, func, equation, *operands) -> Tensor:
        x = tree_leaves(operands)
        if len(x) > 2:
            raise ValueError(f"LRP: einsum of {len(x)} tensors: write it as products of two")
        return self._matmul(lambda *x: func(equation, *x), *x) if len(x) == 2 else func(equation, *x)

    def _elementwise(self, func, input, *args, **kwargs) -> Tensor:
        """Rule (5)."""
        y = func(input, *args, **kwargs)
        return self.route(y, input, y, 1e-9) if self.active(input) else y

    def _norm(self, func, input, groups, weight=None, bias=None, eps=1e-5, *args) -> Tensor:
        """Rule (6). groups: the normalized_shape of a layer norm, or the number of groups of a group norm."""
        y = func(input, groups, weight, bias, eps)
        if isinstance(groups, int):
            rows = input.reshape(len(input), groups, -1)
            weight, bias = (v if v is None else v.view(-1, *[1] * (input.dim() - 2)) for v in (weight, bias))
        else:
            rows = input.flatten(-len(groups))
        centred = rows - rows.mean(dim=-1, keepdim=True)
        deviation = (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()
        z = (centred / self.constant(deviation)).view_as(input)
        return self.route(y, z * (1 if weight is None else weight) + (0 if bias is None else bias))

    def _batch_norm(self, func, input, mean, var, weight=None, bias=None, training=False, eps=1e-5, **kw):
        """Rule (7), with the batch's statistics in training mode and the running ones in evaluation mode."""
        y = func(input, mean, var, weight, bias, training, eps=eps, **kw)
        shape = (-1,) + (1,) * (input.dim() - 2)
        if training:
            var, mean = map(self.constant, torch.var_mean(input, [0, *range(2, input.dim())], correction=0))
        scale = (var + eps).rsqrt() * (1 if weight is None else weight)
        shift = (0 if bias is None else bias) - mean * scale
        return self.route(y, torch.addcmul(shift.view(shape), input, scale.view(shape)))

    def _attention(self, func, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **kw):
        """Softmax attention: two products, (8), and a softmax, which keeps its gradient."""
        if dropout_p:
            raise ValueError("LRP: attention dropout must be 0 while relevance is asked for")
        q, k, v = query, key, value  # (..., Q, d), (..., T, d), (..., T, d)
        y = func(q, k, v, attn_mask, 0.0, is_causal, **kw)
        scale = q.shape[-1] ** -0.5 if kw.get("scale") is None else kw["scale"]
        scores = self.half(q @ k.transpose(-2, -1) * scale, q, k)  # (..., Q, T)
        if is_causal:
            attn_mask = torch.ones_like(scores, dtype=torch.bool).tril()
        if attn_mask is not None:
            allowed = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -torch.inf) if allowed else scores + attn_mask
        z = scores.softmax(dim=-1) @ v
        return self.route(y, self.half(z, q if self.active(q) else k, v))


FAMILIES = {
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d": LRP._layer,
    "matmul bmm mm rmatmul": LRP._matmul,
    "addmm baddbmm": lambda self, f, b, x, w, **k: self.linear(lambda x, w, b: f(b, x, w, **k), x, w, b),
    "einsum": LRP._einsum,
    "mul rmul multiply": lambda self, func, a, b, *args, **kw: self.half(func(a, b, *args, **kw), a, b),
    # A divisor that depends on the input is a constant, like the deviation in (6)
    "div truediv divide true_divide": lambda self, func, a, b, *args, **kw: func(
        a, self.constant(b) if self.active(b) else b, *args, **kw
    ),
    "relu6 elu selu celu gelu silu mish sigmoid logsigmoid tanh softplus softsign hardtanh hardswish "
    "hardsigmoid clamp clamp_min clamp_max threshold square sqrt exp log pow": LRP._elementwise,
    "layer_norm group_norm": LRP._norm,
    "batch_norm": LRP._batch_norm,
    "scaled_dot_product_attention": LRP._attention,
}
RULES = {name: rule for names, rule in FAMILIES.items() for name in names.split()}
NO_RULE = "Its gradient stays: exact if it is piecewise linear, or else relevance is lost or counted twice."
KEEPS_GRADIENT = set(
    # Views, copies, choices of elements ("get" stands for properties such as x.T)
    "get getitem setitem reshape reshape_as view view_as flatten unflatten ravel transpose permute movedim t "
    "squeeze unsqueeze expand expand_as broadcast_to contiguous clone to type type_as float double half cpu "
    "bfloat16 cuda requires_grad unbind split split_with_sizes tensor_split chunk narrow select unfold fold "
    "diagonal tril triu flip roll tile repeat repeat_interleave stack cat concat hstack vstack pad where "
    "index_select index_copy index_add index_put gather scatter scatter_add masked_select masked_fill "
    "copy fill zero pixel_shuffle pixel_unshuffle channel_shuffle interpolate nan_to_num "
    # Sums, means and other piecewise linear functions; pooling is added below
    "add radd sub rsub subtract neg positive sum mean cumsum diff relu leaky_relu prelu rrelu abs sign round "
    "max min amax amin maximum minimum cummax cummin sort topk median dropout dropout1d dropout2d dropout3d "
    # Not linear: x * gradient still sums to a norm; softmax keeps its gradient in AttnLRP, and so do losses
    "norm vector_norm linalg_norm linalg_vector_norm std softmax log_softmax logsumexp cross_entropy "
    "nll_loss mse_loss l1_loss kl_div binary_cross_entropy_with_logits".split()
)
POOLS = "avg_pool adaptive_avg_pool max_pool adaptive_max_pool".split()
KEEPS_GRADIENT |= {f"{pool}{n}d{end}" for pool in POOLS for n in "123" for end in ("", "_with_indices")}
IN_PLACE = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "ipow": "pow"}
COMPOSITE = {"multi_head_attention_forward", "normalize"}  # Python functions of operations that have rules


def _reenter(func: types.FunctionType) -> types.FunctionType:
    """The same Python function, which calls operations through the context but not itself again."""
    unaware = {k: lambda *args: False for k in func.__globals__ if k.startswith("has_torch_function")}
    return types.FunctionType(func.__code__, func.__globals__ | unaware, func.__name__, func.__defaults__)


def relevance(
    model: Callable, images: Tensor, target: Tensor | Callable, epsilon: float = 1e-6, gamma: float = 0.0,
    input_rule: tuple[float, float] | None = None, create_graph: bool = False, signed: bool = False,
    layers: Sequence[nn.Module] = (), detach_biases: bool = False,
) -> tuple[Tensor, Tensor] | tuple[list[Tensor], Tensor]:  # fmt: skip
    """The signed LRP heatmap (B, C, H, W) of a classifier (B, C, H, W) -> (B, K), and its output.

    target: labels (B,), whose logits are explained; weights (B, K) of a sum of logits; or a function of the
    output to scores (B,). epsilon, gamma, signed, detach_biases: see `LRP`. input_rule: the range (low, high)
    of the pixels, for rule (9) in layers that get them. create_graph: to train through the heatmap. layers:
    modules, each called once; then a list takes the heatmap's place: it and the relevance of each module's
    output, in this order. Without biases, softmax and gates an image's relevance sums to its score. Raises
    ValueError for other shapes and types, labels out of range, and for what it can't follow in the model.
    """
    if not images.is_floating_point() or not len(images):
        raise ValueError(f"relevance needs float images, not {images.dtype} {tuple(images.shape)}")
    bounds, calls = [torch.full_like(images, v, requires_grad=True) for v in input_rule or ()], []

    def note(module: nn.Module, _, output):
        """Note a layer's output y and keep its values; hand the model y in a tensor that it may change."""
        y = tree_leaves(output)[0]
        calls.append((module, y, rules.keep(rules.route(y, y))))
        return tree_map(lambda t: rules.route(y, y) if t is y else t, output)

    with torch.enable_grad(), LRP(epsilon, gamma, signed, detach_biases) as rules, ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(note))
        inputs = [rules.watch(images), *bounds]
        seen = inputs[0].clone()  # a model may change its input in place
        rules.box = [seen, *bounds] if bounds else []
        output = model(seen)
        if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != len(images):
            raise ValueError(f"relevance needs output (B, K), not {getattr(output, 'shape', type(output))}")
        if bounds and not rules.boxed:
            raise ValueError("input_rule: the first operation must be a linear layer or a convolution")
        if not rules.active(output):
            reason = "traced or scripted models and custom autograd.Functions hide their operations"
            raise ValueError(f"relevance can't follow the output back to the images: {reason}")
        if sorted(id(m) for m, *_ in calls) != sorted(map(id, layers)):
            raise ValueError(f"each of the {len(layers)} layers must be called once: {len(calls)} call(s)")
        inner = sorted(calls, key=lambda call: [*layers].index(call[0]))
        gradients = rules.explain(_score(output, target), inputs + [y for _, y, _ in inner], create_graph)
    values = inputs + [kept for _, _, kept in inner]
    products = [x * g for x, g in zip(values, gradients)]  # equation (1)
    heatmap = sum(products[: len(inputs)])
    return ([heatmap, *products[len(inputs) :]] if layers else heatmap), output


def _score(output: Tensor, target: Tensor | Callable) -> Tensor:
    """The quantity (B,) to explain."""
    labels = not callable(target) and not target.is_floating_point() and target.shape == output.shape[:1]
    if callable(target):
        score = target(output)
    elif target.is_floating_point() and target.shape == output.shape:
        score = (output * target).sum(dim=1)
    elif labels and 0 <= target.min() <= target.max() < output.shape[1]:
        score = output.gather(1, target.long()[:, None])[:, 0]
    else:
        given = target.tolist() if labels else f"{target.dtype} {tuple(target.shape)}"
        remedy = "give labels (B,) from 0 to K - 1 as integers, or weights (B, K) as floats"
        raise ValueError(f"target {given}, output {tuple(output.shape)}: {remedy}")
    if score.shape != (len(output),):
        raise ValueError(f"a target must give one score an image, ({len(output)},), not {tuple(score.shape)}")
    return score


if __name__ == "__main__":
    from common import chapters

    chapters.lrp()  # prints a few facts and draws lrp.png
