"""What an encoder is good for: k nearest neighbours, a linear layer, fine-tuning; with all labels or few.

    knn: the k training images with the most similar features vote, each with the weight exp(cos / T)
        (Wu et al. 2018); k = 20 and T = 0.07 as in DINO.
    linear: logistic regression on standardised features by L-BFGS, with the weight decay that is best on
        validation images.
    heads: the same on the patches, averaged with each attention head's weights: D features a head.
    finetune: that linear layer and the encoder trained on together, a fixed number of steps.

The encoder is frozen but for fine-tuning; all but `heads` see its `Features.pooled`. Labels (N, K) are
multi-hot with NaN for unknown: findings, measured by the mean of their AUCs, or classes, of which each image
has one, measured by accuracy as well. With a share of the labels, each is measured over several draws of
training images, which are the same for every encoder. Claims 2 and 3 rest on this file. Next to read:
`measure.py`.
"""

import copy
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from tqdm import tqdm

from common.models import Classifier, classification_loss, exclusive
from common.data import Data, batches, prepared
from common.metrics import CannotMeasure, auc, known_mean

DECAYS = [10.0**n for n in range(-5, 1)]
SHARES = (0.01, 0.05, 0.1, 0.25, 1.0)  # of the labels
DRAWS = 5  # of so many training images; of all there is one


@torch.no_grad()
def features_of(encoder: nn.Module, images: Tensor, heads: bool = False) -> Tensor:
    """Pooled features (M, D) float64 of images (M, C, S, S) uint8, in evaluation mode.

    heads: in place of them, the patches averaged by each head's attention, (M, heads * D).
    """
    encoder.eval()
    found = []
    for part in batches(images, encoder):
        features = encoder(part)
        if heads:
            weights = features.attention / features.attention.sum(dim=2, keepdim=True).clamp_min(1e-12)
            found.append((weights @ features.patches).flatten(1).cpu())  # (B, heads, D) -> (B, heads * D)
        else:
            found.append(features.pooled.cpu())
    return torch.cat(found).double()


def knn_scores(x: Tensor, labels: Tensor, queries: Tensor, k: int = 20, temperature: float = 0.07) -> Tensor:
    """Weighted votes (M, K) in [0, 1] for queries (M, D) by features x (N, D) with labels (N, K).

    Images with unknown labels have no vote on them; where nobody has one, the vote is NaN.
    """
    similarity = F.normalize(queries, dim=1) @ F.normalize(x, dim=1).T  # (M, N)
    votes = []
    for labelled in labels.T:  # each finding has neighbours that know it
        known = ~labelled.isnan()
        near = similarity[:, known].topk(min(k, int(known.sum())), dim=1)
        weights = (near.values / temperature).softmax(dim=1)
        vote = (weights * labelled[known][near.indices]).sum(dim=1)
        votes.append(vote if known.any() else torch.full_like(vote, torch.nan))
    return torch.stack(votes, dim=1)


def linear_layer(x: Tensor, labels: Tensor, decay: float, one_class: bool) -> nn.Linear:
    """Logistic regression of labels (N, K) on features x (N, D); decay: of |weight|^2 / 2 in the loss."""
    layer = nn.Linear(x.shape[1], labels.shape[1], dtype=x.dtype)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = classification_loss(layer(x), labels.to(x.dtype), one_class)
        loss = loss + decay / 2 * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return layer.requires_grad_(False)


def score(scores: Tensor, labels: Tensor, one_class: bool) -> dict[str, float]:
    """The mean AUC of scores (M, K) against labels (M, K) where there is one, and of classes the accuracy.

    A score that is NaN belongs to a finding that nobody could learn: it does not count.
    """
    each = [auc(scores[:, k], labels[:, k]) for k in range(labels.shape[1])]
    found = {"mAUC": known_mean(each)}
    if one_class:
        known = ~labels.isnan().any(dim=1)
        found["accuracy"] = float((scores.argmax(dim=1) == labels.argmax(dim=1))[known].double().mean())
    return found


def of_all(encoder: nn.Module, parts: dict[str, Data], heads: bool = False) -> dict[str, Tensor]:
    """The features of each part's images."""
    return {part: features_of(encoder, parts[part].images, heads) for part in ("train", "val", "test")}


def by_neighbours(encoder: nn.Module, parts: dict[str, Data]) -> Callable[[Tensor, int], dict[str, float]]:
    """k-NN as a function of the training images (n,) whose labels it may use: {"mAUC", "accuracy"}."""
    x, labels = of_all(encoder, parts), parts["train"].labels

    def measured(index: Tensor, draw: int) -> dict[str, float]:
        votes = knn_scores(x["train"][index], labels[index], x["test"])
        return score(votes, parts["test"].labels, exclusive(labels))

    return measured


def best_layer(x: dict[str, Tensor], parts: dict[str, Data], index: Tensor) -> nn.Linear:
    """The linear layer for training images (n,), with the weight decay that is best on validation images.

    It is fitted to standardised features (by all training images, which needs no labels), and then made to
    take features as they are. Of a finding that no image knows its logit is NaN. Raises CannotMeasure if
    validation images are of no use for the choice.
    """
    labels, val = parts["train"].labels, parts["val"]
    mean, deviation = x["train"].mean(dim=0), x["train"].std(dim=0, correction=0).clamp(min=1e-9)  # (D,)
    z, one_class = (x["train"][index] - mean) / deviation, exclusive(labels)
    layers = [linear_layer(z, labels[index], decay, one_class) for decay in DECAYS]
    for layer in layers:
        layer.weight.div_(deviation)
        layer.bias.sub_(layer.weight @ mean)
    name = "accuracy" if one_class else "mAUC"
    scores = [score(layer(x["val"]), val.labels, one_class)[name] for layer in layers]
    if all(map(math.isnan, scores)):
        raise CannotMeasure(
            "validation images have no finding both with and without: no weight decay is best"
        )
    best = layers[scores.index(max(scores))]
    best.bias[labels[index].isnan().all(dim=0)] = torch.nan
    return best


def by_linear_layer(
    encoder: nn.Module, parts: dict[str, Data], heads: bool = False
) -> Callable[[Tensor, int], dict[str, float]]:
    """The linear layer as a function of the training images (n,) whose labels it may use."""
    x, labels = of_all(encoder, parts, heads), parts["train"].labels

    def measured(index: Tensor, draw: int) -> dict[str, float]:
        logits = best_layer(x, parts, index)(x["test"])
        return score(logits, parts["test"].labels, exclusive(labels))

    return measured


def by_finetuning(
    encoder: nn.Module, parts: dict[str, Data], lr: float = 1e-4, batch_size: int = 32, steps: int = 100
) -> Callable[[Tensor, int], dict[str, float]]:
    """Fine-tuning as a function of the training images (n,) whose labels it may use.

    It starts from the linear layer, lest a random one spoil the encoder (Kumar et al. 2022, arXiv
    2202.10054). AdamW without decay; at least `steps` steps and at least 5 epochs, in which lr falls to 0.
    """
    images, labels, test = parts["train"].images, parts["train"].labels, parts["test"]
    x, one_class, device = of_all(encoder, parts), exclusive(labels), next(encoder.parameters()).device

    def measured(index: Tensor, draw: int) -> dict[str, float]:
        generator = Generator().manual_seed(draw)
        model = Classifier(copy.deepcopy(encoder), labels.shape[1]).to(device)
        layer = best_layer(x, parts, index)
        nowhere = layer.bias.isnan()  # a finding that no image knows
        model.head.load_state_dict({"weight": layer.weight, "bias": layer.bias.nan_to_num()})
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0)
        size = min(batch_size, len(index))
        total = max(steps, 5 * len(index) // size)
        falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-3, total)
        model.train()
        for _ in range(total):
            batch = index[torch.randperm(len(index), generator=generator)[:size]]
            logits = model(prepared(images[batch].to(device)))
            loss = classification_loss(logits, labels[batch].to(device), one_class)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            falling.step()
        model.eval()
        with torch.no_grad():
            logits = torch.cat([model(part).cpu() for part in batches(test.images, model)])
        return score(logits.masked_fill(nowhere, torch.nan), test.labels, one_class)

    return measured


PROBES = {
    "knn": by_neighbours,
    "linear": by_linear_layer,
    "heads": partial(by_linear_layer, heads=True),
    "finetune": by_finetuning,
}


def drawn(labels: Tensor, share: float, draw: int) -> Tensor:
    """Indices (n,) of a share of the images that have labels (N, K), by the draw's number."""
    known = (~labels.isnan()).any(dim=1).nonzero()[:, 0]
    order = torch.randperm(len(known), generator=Generator().manual_seed(draw))
    return known[order[: round(share * len(known))]]


def probe(
    encoder: nn.Module, parts: dict[str, Data], how: str, shares: tuple[float, ...] = (1.0,)
) -> dict[float, dict[str, list[float]]]:
    """Measure an encoder by one of PROBES: {share of the labels: {"mAUC" or "accuracy": a value a draw}}.

    Shares of less than 2 images are left out. Raises CannotMeasure if a part that is needed has no label.
    """
    for part in ("train", "test") if how == "knn" else ("train", "val", "test"):
        if parts[part].labels is None or parts[part].labels.isnan().all():
            raise CannotMeasure(f"no {part} image has a label: {how} can't be measured")
    labels = parts["train"].labels
    shares = [share for share in shares if len(drawn(labels, share, 0)) >= 2]
    if not shares:
        raise CannotMeasure(f"a single training image has a label: {how} can't be measured")
    measured, found = PROBES[how](encoder, parts), {}
    todo = [(share, draw) for share in shares for draw in range(DRAWS if share < 1 else 1)]
    for share, draw in tqdm(todo, desc=how, leave=False):
        for name, value in measured(drawn(labels, share, draw), draw).items():
            found.setdefault(share, {}).setdefault(name, []).append(value)
    return found
