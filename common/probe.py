"""How good an encoder's features are, with all labels or few (claims 2 and 3).

    knn        the 20 training images with the most similar features vote, each with weight exp(cos / 0.07),
               as in DINO (Wu et al. 2018, arXiv 1805.01978)
    linear     logistic regression on standardised features, with the weight decay best on validation images
    heads      the same on the patches averaged by each head's attention: D features a head
    finetune   the same linear layer and the encoder, trained further together

All but `finetune` keep the encoder frozen; all but `heads` see `Features.pooled`. Labels (N, K) are multi-hot
with NaN for unknown: findings, measured by their mean AUC, or classes, measured by accuracy as well.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from tqdm import tqdm

from common.classify import Classifier, classification_loss, is_multiclass
from common.data import BATCH, SPLITS, Data, at_a_time, batches, prepared
from common.explain import scores_of
from common.metrics import CannotMeasure, auc, known_mean

PROBES = ["knn", "linear", "heads", "finetune"]
DECAYS = [10.0**n for n in range(-5, 1)]
FRACTIONS = (0.01, 0.05, 0.1, 0.25, 1.0)  # of the labels
DRAWS = 5  # of each fraction below 1
MANY = 5_000_000  # scores: a larger fit tries 3 weight decays only, with 30 steps each
STEPS = 100  # of fine-tuning, at least


@torch.no_grad()
def features_of(encoder: nn.Module, images: Tensor, heads: bool = False) -> Tensor:
    """Pooled features (M, D) float64 of images (M, C, S, S) uint8, in evaluation mode; or, if `heads`, the
    patches averaged by each head's attention, (M, heads * D).
    """
    encoder.eval()
    pooled, total = [], math.ceil(len(images) / at_a_time(BATCH, images))
    for x in tqdm(batches(images, encoder), "features", total, leave=False, disable=None):
        features = encoder(x)
        vectors = features.pooled  # (B, D)
        if heads:
            weights = features.attention / features.attention.sum(dim=2, keepdim=True).clamp_min(1e-12)
            vectors = (weights @ features.patches).flatten(1)  # (B, heads * D)
        pooled.append(vectors.cpu())
    return torch.cat(pooled).double()


def knn_scores(x: Tensor, labels: Tensor, queries: Tensor, k: int = 20, temperature: float = 0.07) -> Tensor:
    """Weighted votes (M, K) in [0, 1] for queries (M, D), by features x (N, D) with labels (N, K).

    Only images whose label is known vote on a finding; NaN if there is none.
    """
    x, queries = F.normalize(x, dim=1), F.normalize(queries, dim=1)
    votes = torch.full((len(queries), labels.shape[1]), torch.nan, dtype=x.dtype)
    patterns, group = (~labels.isnan()).T.unique(dim=0, return_inverse=True)  # (G, N), (K,)
    for g in patterns.any(dim=1).nonzero()[:, 0].tolist():  # findings known for the same images go together
        known, columns = patterns[g], (group == g).nonzero()[:, 0].tolist()
        own = x[known]
        for rows in torch.arange(len(queries)).split(1000):  # all M x N similarities may not fit into memory
            near = (queries[rows] @ own.T).topk(min(k, len(own)), dim=1)
            weights = (near.values / temperature).softmax(dim=1)
            for column in columns:
                votes[rows, column] = (weights * labels[known, column][near.indices]).sum(dim=1)
    return votes


def linear_layer(x: Tensor, labels: Tensor, decay: float, multiclass: bool, steps: int = 200) -> nn.Linear:
    """Logistic regression of labels (N, K) on features x (N, D); the loss has decay / 2 * |weight|^2."""
    layer = nn.Linear(x.shape[1], labels.shape[1], dtype=x.dtype)
    layer.load_state_dict({name: torch.zeros_like(p) for name, p in layer.named_parameters()})
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = decay / 2 * layer.weight.square().sum()
        loss = classification_loss(layer(x), labels.to(x.dtype), multiclass) + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    return layer.requires_grad_(False)


def score(scores: Tensor, labels: Tensor, multiclass: bool) -> dict[str, float]:
    """mAUC and, for classes, accuracy of scores (M, K) with labels (M, K); NaN scores don't count."""
    found = {"mAUC": known_mean(auc(scores[:, k], labels[:, k]) for k in range(labels.shape[1]))}
    if multiclass:
        one = labels.sum(dim=1) == 1  # known, and of one class
        found["accuracy"] = float((scores.argmax(dim=1) == labels.argmax(dim=1))[one].double().mean())
    return found


def best_layer(x: dict[str, Tensor], splits: dict[str, Data], index: Tensor) -> nn.Linear:
    """The linear layer fitted to training images (n,), with the weight decay best on validation images.

    It takes features that are not standardised. The logit of a finding that is known for no image is NaN.
    Raises CannotMeasure if validation images can't tell which decay is best.
    """
    labels, val = splits["train"].labels, splits["val"]
    mean, deviation = x["train"].mean(dim=0), x["train"].std(dim=0, correction=0).clamp(min=1e-9)  # (D,)
    z = (x["train"][index] - mean) / deviation  # (n, D)
    multiclass, layers = is_multiclass(labels), []
    many = len(z) * labels.shape[1] > MANY  # thousands of classes: minutes a fit
    for decay in tqdm(DECAYS[1::2] if many else DECAYS, "fits", leave=False, disable=None):
        layer = linear_layer(z, labels[index], decay, multiclass, 30 if many else 200)
        layer.weight.div_(deviation)
        layer.bias.sub_(layer.weight @ mean)
        layers.append(layer)
    metric = "accuracy" if multiclass else "mAUC"
    layers = [layer for layer in layers if layer.weight.isfinite().all()]  # the others diverged
    if not layers:
        raise CannotMeasure("no fit of the linear layer converged: the features may not be finite")
    scores = [score(layer(x["val"]), val.labels, multiclass)[metric] for layer in layers]
    if all(map(math.isnan, scores)):
        raise CannotMeasure("no validation finding is both present and absent: no weight decay can be chosen")
    best = layers[scores.index(max(scores))]
    best.bias[labels[index].isnan().all(dim=0)] = torch.nan
    return best


def finetuned_scores(
    encoder: nn.Module, splits: dict[str, Data], x: dict[str, Tensor], index: Tensor, seed: int
) -> Tensor:
    """Logits (M, K) of test images, after a copy of the encoder was fine-tuned on training images (n,).

    Starts from `best_layer`, since a random one would distort the features (Kumar et al. 2022, arXiv
    2202.10054). Batches of 32, STEPS steps or 5 epochs of AdamW if these are longer; lr from 1e-4 to 1e-7.
    """
    train, layer, device = splits["train"], best_layer(x, splits, index), next(encoder.parameters()).device
    model, unknown = Classifier(copy.deepcopy(encoder), layer.out_features).to(device), layer.bias.isnan()
    model.head.load_state_dict({"weight": layer.weight, "bias": layer.bias.nan_to_num()})
    size, generator = min(32, len(index)), Generator().manual_seed(seed)
    steps = max(STEPS, 5 * len(index) // size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-3, steps)
    model.train()
    with torch.random.fork_rng(devices=[]):  # stochastic depth draws from PyTorch's own generator
        torch.manual_seed(seed)
        for _ in tqdm(range(steps), "steps", leave=False, disable=None):
            batch = index[torch.randperm(len(index), generator=generator)[:size]]
            logits, labels = model(prepared(train.images[batch].to(device))), train.labels[batch].to(device)
            loss = classification_loss(logits, labels, is_multiclass(train.labels))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            falling.step()
    return scores_of(model, splits["test"].images, multiclass=False).masked_fill(unknown, torch.nan)


def draw_labelled(labels: Tensor, fraction: float, draw: int) -> Tensor:
    """Indices (n,) of a fraction of the images with labels (N, K); draw: the number of the draw."""
    known = (~labels.isnan()).any(dim=1).nonzero()[:, 0]
    order = torch.randperm(len(known), generator=Generator().manual_seed(draw))
    return known[order[: round(fraction * len(known))]]


def probe(
    encoder: nn.Module, splits: dict[str, Data], how: str, fractions: tuple[float, ...] = (1.0,),
    features: dict[str, Tensor] | None = None,
) -> dict[float, dict[str, list[float]]]:  # fmt: skip
    """Measure an encoder by one of PROBES: {label fraction: {"mAUC" or "accuracy": one value per draw}}.

    Fractions of fewer than 2 images are left out. features: caches pooled features by split for more probes.
    Raises CannotMeasure without labels.
    """
    for split in ("train", "test") if how == "knn" else SPLITS:
        if splits[split].labels.isnan().all():
            raise CannotMeasure(f"no {split} image has a label: {how} can't be measured")
    labels, found = splits["train"].labels, {}
    x = {} if features is None or how == "heads" else features  # features (M, D) by split; heads has its own
    draws = [(f, draw) for f in fractions for draw in range(DRAWS if f < 1 else 1)]
    drawn = [(f, draw, index) for f, draw in draws if len(index := draw_labelled(labels, f, draw)) >= 2]
    if not drawn:
        raise CannotMeasure(f"{how} can't be measured with fewer than 2 labelled training images")
    for split in (split for split in SPLITS if split not in x):
        x[split] = features_of(encoder, splits[split].images, heads=how == "heads")
    for f, draw, index in tqdm(drawn, how, leave=False, disable=None):
        if how == "knn":
            scores = knn_scores(x["train"][index], labels[index], x["test"])
        elif how == "finetune":
            scores = finetuned_scores(encoder, splits, x, index, draw)
        else:
            scores = best_layer(x, splits, index)(x["test"])
        if how != "knn" and is_multiclass(labels):
            scores = scores.log_softmax(dim=1)  # a softmax compares logits of one image, AUC compares images
        for metric, value in score(scores, splits["test"].labels, is_multiclass(labels)).items():
            found.setdefault(f, {}).setdefault(metric, []).append(value)
    return found
