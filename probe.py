"""What an encoder knows without being trained for it: k nearest neighbours and a linear layer.

Both see only `Features.pooled` of a frozen encoder, taken from training images with labels.

    k-NN (Wu et al. 2018): the k training images with the most similar features vote, each with the weight
        exp(cos / T); k = 20 and T = 0.07 as in DINO.
    linear: logistic regression on standardised features by L-BFGS, with the weight decay that is best on
        validation images.

Labels (N, K) are multi-hot with NaN for unknown: findings, measured by the mean of their AUCs, or classes, of
which each image has one, measured by accuracy as well. Next to read: `evaluate.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classify import classification_loss, exclusive, prepared
from data import Data
from evaluate import BATCH, CannotMeasure
from metrics import auc

DECAYS = [10.0**n for n in range(-5, 1)]


@torch.no_grad()
def pooled_of(encoder: nn.Module, images: Tensor) -> Tensor:
    """Pooled features (M, D) of images (M, C, S, S) uint8, in evaluation mode."""
    encoder.eval()
    return torch.cat([encoder(prepared(part)).pooled for part in images.split(BATCH)])


def knn_scores(x: Tensor, labels: Tensor, queries: Tensor, k: int = 20, temperature: float = 0.07) -> Tensor:
    """Weighted votes (M, K) in [0, 1] for queries (M, D) by features x (N, D) with labels (N, K).

    Images with unknown labels have no vote on them; where nobody has one, the vote is 0.
    """
    similarity = F.normalize(queries, dim=1) @ F.normalize(x, dim=1).T  # (M, N)
    votes = []
    for labelled in labels.T:  # each finding has neighbours that know it
        known = ~labelled.isnan()
        near = similarity[:, known].topk(min(k, int(known.sum())), dim=1)
        weights = (near.values / temperature).softmax(dim=1)
        votes.append((weights * labelled[known][near.indices]).sum(dim=1))
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
    return layer


def score(scores: Tensor, labels: Tensor, one_class: bool) -> dict[str, float]:
    """The mean AUC of scores (M, K) against labels (M, K) where there is one, and of classes the accuracy."""
    each = torch.tensor([auc(scores[:, k], labels[:, k]) for k in range(labels.shape[1])])
    found = {"mAUC": float(each.nanmean())}
    if one_class:
        known = ~labels.isnan().any(dim=1)
        found["accuracy"] = float((scores.argmax(dim=1) == labels.argmax(dim=1))[known].double().mean())
    return found


def probe(encoder: nn.Module, parts: dict[str, Data]) -> dict[str, float]:
    """How well labels of test images are told: {"knn_mAUC", "linear_mAUC", with classes "knn_accuracy" ...}.

    Raises CannotMeasure if a part has no label.
    """
    for part in ("train", "val", "test"):
        if parts[part].labels is None or parts[part].labels.isnan().all():
            raise CannotMeasure(f"no {part} image has a label: k-NN and linear probe can't be measured")
    x = {part: pooled_of(encoder, parts[part].images).double() for part in ("train", "val", "test")}
    labels, one_class = parts["train"].labels, exclusive(parts["train"].labels)
    found = {"knn": score(knn_scores(x["train"], labels, x["test"]), parts["test"].labels, one_class)}
    mean, deviation = x["train"].mean(dim=0), x["train"].std(dim=0, correction=0).clamp(min=1e-9)
    x = {part: (features - mean) / deviation for part, features in x.items()}
    best = None
    for decay in DECAYS:
        layer = linear_layer(x["train"], labels, decay, one_class)
        with torch.no_grad():
            on_val = score(layer(x["val"]), parts["val"].labels, one_class)
            on_val = on_val.get("accuracy", on_val["mAUC"])
            if best is None or on_val > best:
                best, found["linear"] = on_val, score(layer(x["test"]), parts["test"].labels, one_class)
    return {f"{how}_{what}": value for how, values in found.items() for what, value in values.items()}
