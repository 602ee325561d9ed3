"""Layer-wise relevance propagation (LRP): how much each pixel contributes to a score, for any PyTorch model.

LRP distributes a score backwards, layer by layer. Here every rule modifies the gradient g at the output of
an operation, so one backward pass computes all relevance:

    R = x * (changed gradient d score / d x)                                                         (1)
    linear, convolution    z = w x + b         g <- g z / (z + eps sign z)                           (2)
    the same with gamma    z' = w' x + b'      g <- g z / (z' + eps sign z'), back through z'        (3)
                           w' = w + gamma max(w, 0), b' likewise
    or, if signed          z' = z + gamma (z + sign(z) (|w| |x| + |b|)) / 2, the rest as in (3)      (4)
    elementwise            y = f(x)            g <- g f(x) / x instead of g f'(x)                    (5)
    layer, group, RMS norm the deviation is a constant; subtracting the mean stays linear            (6)
    batch norm             mean and deviation are constants; not folded into the layer before it     (7)
    a @ b, a * b           both depend on the input: g <- g / 2, half of the relevance to each       (8)
    input layer            z' = w x - max(w, 0) low - min(w, 0) high for pixels in [low, high]       (9)

(2) epsilon, (3) gamma and (9) z^B rule: Montavon et al. 2019; in (9) biases cancel. (4), the generalised
gamma rule: Andeol et al. 2021. (5), (6), (8): AttnLRP, arXiv 2402.05602. In a / b, b is a constant. (3) needs
x, z >= 0: elsewhere z' can be 0 where z is not, and relevance explodes; so it does by (5) at x near 0 if f(0)
is not 0 (sigmoid, exp). (4) equals (3) for x, z >= 0, favours contributions of z's sign, and keeps z / z' in
[0, 1]. Operations without a rule keep their gradient, exact if f(c x) = c f(x) for c > 0; others warn.

`LRP` is a `TorchFunctionMode`: it sees conv2d, gelu, matmul ... as any model calls them, in place or not, but
not what a custom `autograd.Function` does. The rules act only in `explain`: outputs and other gradients stay.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

TINY = 1e-9  # epsilon of (5) and (9), which need a denominator other than 0 but no damping


class _Share(torch.autograd.Function):
    """g top / (z + eps sign z), where (top, z) are the z and z' of (2) to (4) and (9), or f(x) and x of (5).
    Its derivative is written by hand, which saves memory in every layer."""

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
    """Return y. Gradients go to y; in `explain` they go to z, as g top / (z + eps sign z) or as g."""

    @staticmethod
    def forward(ctx, rules: "LRP", y: Tensor, z: Tensor, top: Tensor | None = None, epsilon: float = 0.0):
        ctx.rules, ctx.epsilon = rules, epsilon
        if top is not None:
            ctx.save_for_backward(*([z] if top is z else [top, z]))  # `backward` takes the first and the last
        return y.detach()  # y itself would become a view, which PyTorch refuses to change in place

    @staticmethod
    def backward(ctx, g: Tensor):
        if not ctx.rules.explaining:
            return None, g, None, None, None
        if ctx.saved_tensors:
            saved = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in ctx.saved_tensors]
            g = _Share.apply(g, saved[0], saved[-1], ctx.epsilon).to(g.dtype)
        return None, None, g, None, None


def _sign(z: Tensor) -> Tensor:
    return torch.ones((), dtype=z.dtype, device=z.device).copysign(z.detach())  # never 0


class LRP(TorchFunctionMode):
    """In this context, each operation on tensors that depend on the watched input follows its relevance rule.

    epsilon: the stabiliser of (2), above 0, in units of z. gamma: 0 for the epsilon rule; larger values
    favour contributions of one sign, by (3) or, if signed, (4). detach_biases: derivatives of relevance take
    biases as constants, as in ISNet. Call `watch(images)`, the model, `explain(score, inputs)`. Raises
    ValueError.
    """

    def __init__(
        self, epsilon: float = 1e-6, gamma: float = 0.0, signed: bool = False, detach_biases: bool = False
    ):
        if not (epsilon > 0 and gamma >= 0):  # where z = 0, a stabiliser of 0 would give 0 / 0
            raise ValueError(f"LRP: epsilon {epsilon} must be above 0, gamma {gamma} not negative")
        self.epsilon, self.gamma, self.signed, self.detach_biases = epsilon, gamma, signed, detach_biases
        self.explaining, self.warned = False, set()  # whether `explain` runs; names that were warned of
        self.depends = WeakIdKeyDictionary()  # what depends on the watched input: a set, all values are True
        self.kept = WeakIdKeyDictionary()  # {tensor to keep: its _version then, or None once it is a copy}
        self.box, self.boxed = [], False  # the input and its bounds for rule (9), and whether it was applied

    def watch(self, images: Tensor) -> Tensor:
        """Mark the input to explain; returns it, requiring a gradient."""
        images = images if images.requires_grad else images.detach().requires_grad_()
        self.depends[images] = True
        return images

    def explain(self, score: Tensor, inputs: list[Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
        """The changed gradients of the scores' sum with respect to inputs; None for unused ones."""
        self.explaining = True
        try:
            return torch.autograd.grad(score.sum(), inputs, create_graph=create_graph, allow_unused=True)
        finally:
            self.explaining = False

    def active(self, t) -> bool:
        """Whether t is a tensor that depends on the input and has a gradient."""
        return isinstance(t, Tensor) and t.requires_grad and (t in self.depends or t._base in self.depends)

    def route(self, *args) -> Tensor:
        """Apply `_Route`, and let its saved tensors keep their values."""
        with saved_tensors_hooks(lambda t: self.keep(t.detach()), self.read):
            return _Route.apply(self, *args)

    def keep(self, t: Tensor) -> Tensor:
        """Mark t, so that it is copied before an operation changes it in place; returns it."""
        self.kept[t] = t._version
        return t

    def read(self, t: Tensor) -> Tensor:
        """Return a kept tensor. Raises ValueError if a function hidden from this context has changed it."""
        if self.kept[t] in (None, t._version):
            return t
        raise ValueError("LRP: out= or a scripted function has changed a tensor in place: give it a copy")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name, changed = kwargs or {}, func.__name__.strip("_"), None
        if func in (torch.batch_norm, torch.instance_norm):
            name = f"torch.{name}"  # its arguments have another order than those of F's
        if name == "setitem" or func.__name__ == name + "_" or kwargs.get("inplace"):
            changed = (*args, *kwargs.values())[0]  # the first argument, whether it has a name or not
            for t in self.kept:  # copy kept tensors whose memory is about to change
                if t.untyped_storage().data_ptr() == changed.untyped_storage().data_ptr():
                    t.data, self.kept[t] = t.detach().clone(), None
        leaves = () if self.explaining else tree_leaves((args, kwargs))
        others = [t for t in leaves if not self.active(t)]
        nodes = (n for t in others if isinstance(n := getattr(t, "grad_fn", None), BackwardCFunction))
        self.warn({n.name() for n in nodes} - {"_RouteBackward"}, HIDDEN)
        if len(others) == len(leaves):  # nothing depends on the input, or `explain` runs
            return func(*args, **kwargs)
        if name in ("multi_head_attention_forward", "normalize"):
            # Run a copy that does not know of this context, so that its operations arrive here one by one.
            unaware = {k: lambda *args: False for k in func.__globals__ if k.startswith("has_torch_function")}
            twin = FunctionType(func.__code__, func.__globals__ | unaware, name, func.__defaults__)
            with self:
                return twin(*args, **kwargs)
        if changed is not None and name in RULES:  # a rule may save its input: change a copy, write it back
            twin = func if kwargs.pop("inplace", False) else getattr(Tensor, name, None) or getattr(F, name)
            with self:
                changed.copy_(twin(changed.clone(), *args[1:], **kwargs))
            if name in CONSTANT:
                self.depends.pop(changed, None)
            return changed
        with torch._C.DisableTorchFunction():  # an outer context must not see these operations
            y = RULES[name](self, func, *args, **kwargs) if name in RULES else func(*args, **kwargs)
            written = (y, changed, getattr(changed, "_base", None))  # writing a slice changes its base
            new = [t for t in tree_leaves(written) if isinstance(t, Tensor) and t.requires_grad]
            if new and "pool" not in name:
                self.warn({name} - RULES.keys() - KEEPS_GRADIENT, KEPT)
            if not (name in CONSTANT or "div" in name and args and not self.active(args[0])):
                self.depends.update((t, True) for t in new)
        return y

    def warn(self, names: set[str], why: str) -> None:
        """Warn of operations without a rule, once of each."""
        for name in names - self.warned:
            warnings.warn(f"LRP: no rule for '{name}'. {why}", stacklevel=3)
        self.warned |= names

    def linear(self, op: Callable, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        """z = op(x, w, b) with rules (2) to (4), or rule (9) at the watched input."""

        def part(change: Callable) -> list:
            return [v if v is None else change(v) for v in (w, b)]

        y = z = ruled = op(x, w, b)
        if self.active(w):
            return self.half(y, x, w)
        if self.detach_biases and b is not None:
            b = b.detach()
            z = ruled = op(x, w, b)
        if self.box[1:] and x is self.box[0] and not x._version:  # not changed in place
            _, low, high = self.box
            self.boxed = True
            positive, negative = part(lambda v: v.clamp(min=0)), part(lambda v: v.clamp(max=0))
            return self.route(y, z - op(low, *positive) - op(high, *negative), z, TINY)
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
        return self.route(y, input, y, TINY) if self.active(input) else y

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

    def _instance_norm(self, func, input, *, weight, bias, use_input_stats, eps, **running):
        """Rule (6) with one channel a group; with running statistics, rule (7)."""
        y = func(input, weight=weight, bias=bias, use_input_stats=use_input_stats, eps=eps, **running)
        if use_input_stats:
            return self.route(y, self._norm(F.group_norm, input, input.shape[1], weight, bias, eps))
        known = running["running_mean"], running["running_var"], weight, bias
        return self.route(y, self._batch_norm(F.batch_norm, input, *known, eps=eps))

    def _batch_norm(self, func, input, mean, var, weight=None, bias=None, training=False, eps=1e-5, **kw):
        """Rule (7), with the batch's statistics in training mode and the running ones in evaluation mode."""
        y = func(input, mean, var, weight, bias, training, eps=eps, **kw)
        shape = (-1,) + (1,) * (input.dim() - 2)
        if training:
            dims = [0, *range(2, input.dim())]
            mean, var = self.constant(input.mean(dims)), self.constant(input.var(dims, correction=0))
        scale = (var + eps).rsqrt() * (1 if weight is None else weight)
        shift = (0 if bias is None else bias) - mean * scale
        return self.route(y, torch.addcmul(shift.view(shape), input, scale.view(shape)))

    def _attention(self, func, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **kw):
        """Softmax attention: two products, (8), and a softmax, which keeps its gradient."""
        if dropout_p:
            raise ValueError("LRP: attention dropout must be 0 while relevance is asked for")
        y = func(query, key, value, attn_mask, 0.0, is_causal, **kw)  # (..., Q, d) for keys (..., T, d)
        scale = query.shape[-1] ** -0.5 if kw.get("scale") is None else kw["scale"]
        if kw.get("enable_gqa") and query.shape[-3] != key.shape[-3]:
            raise ValueError("LRP: attention with enable_gqa: repeat keys and values for each head instead")
        scores = self.half(query @ key.transpose(-2, -1) * scale, query, key)  # (..., Q, T)
        attn_mask = torch.ones_like(scores, dtype=torch.bool).tril() if is_causal else attn_mask
        if attn_mask is not None:
            allowed = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -torch.inf) if allowed else scores + attn_mask
            if scores.isneginf().all(dim=-1).any():
                raise ValueError("LRP: attention in which a query sees no key: leave such queries out")
        z = scores.softmax(dim=-1) @ value
        return self.route(y, self.half(z, query if self.active(query) else key, value))


CONSTANT = ["rsqrt", "reciprocal", "rdiv"]  # what they return has no relevance, as a divisor
FAMILIES = {  # the rules: they take (self, func, *args, **kwargs) and return the operation's exact output
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d": LRP._layer,
    "matmul bmm mm rmatmul": LRP._matmul,
    "addmm baddbmm": lambda self, f, b, x, w, **k: self.linear(lambda x, w, b: f(b, x, w, **k), x, w, b),
    "einsum": LRP._einsum,
    "mul rmul multiply": lambda self, f, input, other, **k: self.half(f(input, other, **k), input, other),
    "addcmul": lambda s, f, x, a, b, **k: s.route(f(x, a, b, **k), x + s.half(f(0 * x, a, b, **k), a, b)),
    "div truediv divide true_divide": lambda s, f, input, other, **k: f(
        input, s.constant(other) if s.active(other) else other, **k
    ),
    " ".join(CONSTANT): lambda self, func, *args, **kw: self.constant(func(*args, **kw)),
    "relu6 elu selu celu gelu silu mish sigmoid logsigmoid tanh softplus softsign hardtanh hardswish "
    "hardsigmoid clamp clamp_min clamp_max threshold square sqrt exp log pow rms_norm": LRP._elementwise,
    "layer_norm group_norm": LRP._norm,  # an RMS norm subtracts nothing, so (5) is (6) for it, but for x = 0
    "batch_norm": LRP._batch_norm,
    "instance_norm": LRP._instance_norm,
    "scaled_dot_product_attention": LRP._attention,
}
RULES = {name: rule for names, rule in FAMILIES.items() for name in names.split()}
HIDDEN = "If it depends on the images, neither it nor what follows up to the next sum has rules."
KEPT = "Its gradient is kept: exact if f(c x) = c f(x), else relevance is lost or counted twice."
KEEPS_GRADIENT = set(
    # Views, copies, choices of elements ("get" stands for properties such as x.T)
    "get getitem setitem reshape reshape_as view view_as flatten unflatten transpose swapaxes swapdims "
    "permute movedim moveaxis t squeeze unsqueeze expand expand_as broadcast_to contiguous clone to type "
    "type_as float double half cpu bfloat16 cuda requires_grad unbind split split_with_sizes tensor_split "
    "hsplit vsplit chunk ravel narrow select unfold fold diagonal tril triu flip roll tile repeat "
    "repeat_interleave stack cat concat concatenate hstack vstack pad where index_select index_copy "
    "index_add index_put gather scatter scatter_add take_along_dim masked_select masked_fill copy fill zero "
    "pixel_shuffle pixel_unshuffle channel_shuffle interpolate grid_sample nan_to_num "
    # Sums, means and other piecewise linear functions; all poolings as well
    "add radd sub rsub subtract neg positive sum mean cumsum diff relu leaky_relu prelu rrelu abs sign round "
    "max min amax amin maximum minimum cummax cummin sort topk median dropout dropout1d dropout2d dropout3d "
    # Not linear, but x * gradient sums to a norm, and AttnLRP keeps softmax's gradient; losses keep theirs
    "norm vector_norm linalg_norm linalg_vector_norm std softmax log_softmax logsumexp cross_entropy "
    "nll_loss mse_loss l1_loss kl_div binary_cross_entropy_with_logits".split()
)


def relevance(
    model: Callable, images: Tensor, target: Tensor | Callable, epsilon: float = 1e-6, gamma: float = 0.0,
    input_rule: tuple[float | Tensor, ...] | None = None, create_graph: bool = False, signed: bool = False,
    layers: Sequence[nn.Module] = (), detach_biases: bool = False,
) -> tuple[Tensor, Tensor] | tuple[list[Tensor], Tensor]:  # fmt: skip
    """The signed LRP heatmap (B, C, H, W) of a classifier (B, C, H, W) -> (B, K), and its output.

    target: labels (B,), whose logits are explained; weights (B, K) of a sum of logits; or a function of the
    output to scores (B,), free of rules. epsilon, gamma, signed, detach_biases: see `LRP`. input_rule: the
    range (low, high) of pixels, numbers or tensors, for rule (9) in layers that get them. create_graph: to
    train through the heatmap. layers: modules that the model calls once; then a list is returned: the
    heatmap, and the relevance of each module's output. Without biases and softmax, and with a rule for each
    operation, an image's relevance sums to its score. Raises ValueError for other shapes, types or labels,
    and for what it can't follow.
    """
    if not images.is_floating_point() or not len(images):
        raise ValueError(f"relevance needs float images, not {images.dtype} {tuple(images.shape)}")
    bounds, calls = [torch.zeros_like(images).add_(v).requires_grad_() for v in input_rule or ()], []

    def note(module: nn.Module, _, output):  # keep the first output and its gradient's edge
        y = given = tree_leaves(output)[0]
        if not isinstance(y, Tensor) or not y.requires_grad:
            raise ValueError(f"layers: {type(module).__name__} gives no tensor with a gradient")
        if y._is_view():  # a change in place would move a view's gradient
            y = rules.route(given, given)
            rules.depends.update([(y, True)] if rules.active(given) else [])
        calls.append((module, get_gradient_edge(given), rules.keep(rules.route(given, given))))
        return output if y is given else tree_map(lambda t: y if t is given else t, output)

    with torch.enable_grad(), LRP(epsilon, gamma, signed, detach_biases) as rules, ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(note))
        inputs = [rules.watch(images), *bounds]
        rules.box = [inputs[0].clone(), *bounds]  # a model may change its input in place
        hooks.callback(rules.box.clear)  # the graph holds the rules, which must not hold the graph
        output = model(rules.box[0])
        if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != len(images):
            raise ValueError(f"relevance needs output (B, K), not {getattr(output, 'shape', type(output))}")
        if bounds and not rules.boxed:
            raise ValueError("input_rule: the first operation must be a linear layer or a convolution")
        if not rules.active(output):
            reason = "no_grad, detach, traced models and custom autograd.Functions hide operations"
            raise ValueError(f"relevance can't follow the output back to the images: {reason}")
        if sorted(id(m) for m, *_ in calls) != sorted(map(id, layers)):
            raise ValueError(f"each of the {len(layers)} layers must be called once: {len(calls)} call(s)")
        found = {module: (edge, rules.read(kept)) for module, edge, kept in reversed(calls)}
        edges, values = ([found[layer][i] for layer in layers] for i in (0, 1))
        with torch._C.DisableTorchFunction():  # no rule applies to a score
            score = _score(output, target)
        gradients = rules.explain(score, inputs + edges, create_graph)
    products = [x * (0 if g is None else g) for x, g in zip(inputs + values, gradients)]  # equation (1)
    products = products if create_graph else [R.detach() for R in products]
    heatmap = sum(products[: len(inputs)])
    return ([heatmap, *products[len(inputs) :]] if layers else heatmap), output


def _score(output: Tensor, target: Tensor | Callable) -> Tensor:
    """The quantity (B,) to explain."""
    if callable(target):
        score = target(output)
        if score.shape != output.shape[:1]:
            raise ValueError(f"a target must give one score an image, not {tuple(score.shape)}")
        return score
    target = torch.as_tensor(target, device=output.device)
    if target.is_floating_point() and target.shape == output.shape:
        return (output * target).sum(dim=1)
    labels = not target.is_floating_point() and target.shape == output.shape[:1]
    if labels and 0 <= target.min() <= target.max() < output.shape[1]:
        return output.gather(1, target.long()[:, None])[:, 0]
    given = target.tolist() if labels else f"{target.dtype} {tuple(target.shape)}"
    remedy = "give labels (B,) from 0 to K - 1 as integers, or weights (B, K) as floats"
    raise ValueError(f"target {given}, output {tuple(output.shape)}: {remedy}")


if __name__ == "__main__":
    from common import chapters

    chapters.lrp()  # prints a few facts and draws lrp.png
