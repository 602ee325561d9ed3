"""How well maps outline the one object of an image: AP at every pixel, MaxBoxAccV2 and CorLoc.

A pooling by attention shows the mean over its heads, and the head with the best AP on validation masks, which
are not there when one looks for objects without masks. An even pooling shows the class activation map of the
likeliest class (Zhou et al. 2016, arXiv 1512.04150), the patches' own logits. Two controls show what needs no
learning: a Gaussian in the middle of each image, and the same network with random weights.
"""

import copy

import torch
from torch import Tensor, nn

from common.data import Data, batches, select
from common.explain import attention_of, pools_evenly
from common.metrics import CannotMeasure, at_pixels, box_overlaps, corloc, localisation_ap, max_box_acc


def class_activation(model: nn.Module, images: Tensor) -> Tensor:
    """Class activation maps (M, 1, N) >= 0 of a classifier with an even pooling, of the likeliest class."""
    model.eval()
    maps = []
    for x in batches(images, model):
        features = model.encoder(x)
        likeliest, logits = model.head(features.pooled).argmax(dim=1), model.head(features.patches)
        maps.append(logits[torch.arange(len(x)), :, likeliest].cpu())  # (B, N) of (B, N, K)
    maps = torch.cat(maps)
    return (maps - maps.amin(dim=1, keepdim=True))[:, None]


def untrained(model: nn.Module) -> nn.Module:
    """A copy with new random weights; embeddings that have no layer of their own stay."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        copied = copy.deepcopy(model)
        for module in copied.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return copied


@torch.no_grad()
def measure_objects(model: nn.Module, splits: dict[str, Data], layer: int) -> dict[str, dict[str, float]]:
    """{map: {AP, MaxBoxAccV2 or CorLoc: value in [0, 1]}} on test images, of an encoder or a classifier.

    The best head and CorLoc's threshold are chosen on validation images. Raises CannotMeasure without masks
    of one region, and for an even pooling without labels.
    """
    val, test = (select(splits[name], splits[name].has_masks) for name in ("val", "test"))
    if len(test.regions) != 1 or not test.names or not val.names:
        raise CannotMeasure("objects are measured where test and validation images have masks of one region")
    encoder = getattr(model, "encoder", model)
    if pools_evenly(encoder) and model is encoder:
        raise CannotMeasure("an even pooling without labels has no map of the object")

    def maps_of(network: nn.Module) -> list[Tensor]:  # of validation and test images, (M, heads, N)
        if pools_evenly(encoder):
            return [class_activation(network, data.images) for data in (val, test)]
        network = getattr(network, "encoder", network)
        return [attention_of(network, data.images, layer) for data in (val, test)]

    grid, maps, random = encoder.grid(test.images), maps_of(model), maps_of(untrained(model))
    y, x = (torch.linspace(-1, 1, n) for n in grid)
    middle = torch.exp(-2 * (y[:, None].square() + x.square())).flatten()  # a standard deviation of S / 4
    shown = {"mean of heads": [m.mean(dim=1, keepdim=True) for m in maps]}
    if maps[0].shape[1] > 1:
        best = localisation_ap(maps[0], val.masks, grid).nanmean(dim=0)[:, 0].argmax()
        shown["best head"] = [m[:, best, None] for m in maps]
    shown["untrained"] = [m.mean(dim=1, keepdim=True) for m in random]
    shown["middle"] = [middle.expand(len(data.names), 1, -1) for data in (val, test)]
    return {name: outlined(*pair, val.masks, test.masks, grid) for name, pair in shown.items()}


def outlined(chosen_on: Tensor, maps: Tensor, val: Tensor, test: Tensor, grid: tuple) -> dict[str, float]:
    """Scores of maps (M, 1, N) with masks (M, 1, H, W); CorLoc's threshold is from chosen_on and val."""

    def overlaps(maps: Tensor, masks: Tensor, largest: bool) -> Tensor:
        parts = ((m.view(k.shape[0], *masks.shape[2:]), k) for m, k in at_pixels(maps, masks, grid))
        found = [box_overlaps(m, k.view(m.shape), largest) for m, k in parts]
        return torch.cat(found, dim=1)  # (thresholds, M)

    boxes = overlaps(chosen_on, val, True), overlaps(maps, test, True)
    ap = localisation_ap(maps, test, grid).nanmean()
    return {
        "AP": float(ap),
        "MaxBoxAccV2": max_box_acc(overlaps(maps, test, False)),
        "CorLoc": corloc(boxes[1], boxes[0]),
    }
