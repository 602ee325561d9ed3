"""How well maps outline the one object of an image: AP at every pixel, MaxBoxAccV2 and CorLoc.

With attention pooling, the maps are the mean over its heads, and the head with the best AP on validation
images, which can't be chosen without masks. With mean pooling, the map is the class activation map of the
likeliest class (Zhou et al. 2016, arXiv 1512.04150): the patches' logits, whose mean is the image's. Two
controls need no learning: a Gaussian in the middle of each image, and the same network with random weights.
MaxBoxAccV2 by definition takes its threshold from test images; CorLoc takes it from validation images. The
object's box encloses all parts of its mask, even a stray pixel. AP is a mean over images (PxAP of Choe et
al. 2020 pools all pixels).
"""

import copy

import torch
from torch import Tensor, nn

from common.data import Data, batches, select
from common.explain import attention_of, pools_evenly
from common.metrics import CannotMeasure, at_pixels, box_overlaps, corloc, localisation_ap, max_box_acc
from vit import ViT


def class_activation(model: nn.Module, images: Tensor) -> Tensor:
    """Class activation maps (M, 1, N) of a classifier with an even pooling, of the likeliest class."""
    model.eval()
    encoder, maps, pooled = model.encoder, [], []
    if vit := isinstance(encoder, ViT):
        hook = encoder.pool.register_forward_pre_hook(lambda _, x: pooled.append(x[0]))
    for x in batches(images, model):
        features = encoder(x)
        patches = features.patches  # (B, N, D)
        if vit:  # its LayerNorm divides the patches' mean by that mean's deviation, not each by its own
            raw, norm = pooled.pop(), encoder.norm
            variance = raw.mean(dim=1, keepdim=True).var(dim=2, correction=0, keepdim=True)  # (B, 1, 1)
            centred = raw - raw.mean(dim=2, keepdim=True)
            patches = centred / (variance + norm.eps).sqrt() * norm.weight + norm.bias
        likeliest, logits = model.head(features.pooled).argmax(dim=1), model.head(patches)
        maps.append(logits[torch.arange(len(x)), :, likeliest].cpu())  # (B, N) of (B, N, K)
    if vit:
        hook.remove()
    return torch.cat(maps)[:, None]


def untrained(model: nn.Module) -> nn.Module:
    """A copy with new random weights, as its layers and `vit.ViT` draw them; train.py may scale some."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        copied = copy.deepcopy(model).cpu()
        for module in copied.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for module in copied.modules():
            if isinstance(module, ViT):
                module.init_weights()
                if module.registers:
                    nn.init.normal_(module.reg_token, std=1e-6)
    return copied.to(next(model.parameters()).device)


def shows_one(data: Data) -> Data:
    """The images whose masks are known and not empty."""
    return select(data, data.has_masks & data.masks.flatten(1).any(dim=1))


@torch.no_grad()
def measure_objects(model: nn.Module, splits: dict[str, Data], layer: int) -> dict[str, dict[str, float]]:
    """{map: {AP, MaxBoxAccV2 or CorLoc: value in [0, 1]}} on test images, of an encoder or a classifier.

    Images without an object are left out. Raises CannotMeasure without masks of one region, or for a model
    that pools by a mean but has no linear layer of logits, which a class activation map needs.
    """
    val, test = (shows_one(splits[name]) for name in ("val", "test"))
    if len(test.regions) != 1 or not test.names or not val.names:
        raise CannotMeasure("objects: test and validation images must have masks of exactly one region")
    encoder = getattr(model, "encoder", model)
    even = pools_evenly(encoder)
    if even and not hasattr(model, "head"):
        raise CannotMeasure("no map shows the object: mean pooling without a linear classifier behind it")

    def maps_of(network: nn.Module) -> list[Tensor]:  # of validation and test images, (M, heads, N)
        if even:
            return [class_activation(network, data.images) for data in (val, test)]
        return [attention_of(getattr(network, "encoder", network), d.images, layer) for d in (val, test)]

    grid, maps, random = encoder.grid(test.images), maps_of(model), maps_of(untrained(model))
    y, x = ((2 * torch.arange(n) + 1) / n - 1 for n in grid)  # centres of patches
    middle = torch.exp(-2 * (y[:, None].square() + x.square())).flatten()  # a standard deviation of S / 4
    shown = {"class activation" if even else "mean of heads": [m.mean(dim=1, keepdim=True) for m in maps]}
    if maps[0].shape[1] > 1:
        best = localisation_ap(maps[0], val.masks, grid).nanmean(dim=0)[:, 0].argmax()
        shown["best head"] = [m[:, best, None] for m in maps]
    shown["untrained"] = [m.mean(dim=1, keepdim=True) for m in random]
    shown["middle"] = [middle.expand(len(data.names), 1, -1) for data in (val, test)]
    return {name: outlined(*pair, val.masks, test.masks, grid) for name, pair in shown.items()}


def outlined(chosen_on: Tensor, maps: Tensor, val: Tensor, test: Tensor, grid: tuple) -> dict[str, float]:
    """Scores of maps (M, 1, N) with masks (M, 1, H, W); CorLoc's threshold is from chosen_on and val.

    Boxes are of maps from 0, their lowest pixel, to 1, as in the paper of MaxBoxAccV2.
    """

    def overlaps(maps: Tensor, masks: Tensor) -> Tensor:
        found = []
        for m, k in at_pixels(maps, masks, grid):  # (b, 1, H * W)
            m = (m - m.amin(dim=2, keepdim=True)).view(len(m), *masks.shape[2:])
            found.append(box_overlaps(m, k.view(m.shape)))
        return torch.cat(found, dim=2)  # (2, THRESHOLDS, M)

    (best, largest), (_, of_val) = overlaps(maps, test), overlaps(chosen_on, val)
    ap = float(localisation_ap(maps, test, grid).nanmean())
    return {"AP": ap, "MaxBoxAccV2": max_box_acc(best), "CorLoc": corloc(largest, of_val)}
