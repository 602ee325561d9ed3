"""Maps that outline the one object of an image, and the controls beside them."""

import pytest
import torch

from common.classify import Classifier
from common.data import Data, prepared
from common.metrics import CannotMeasure
from common.objects import class_activation, measure_objects, outlined
from resnet import ResNet
from simpool import GAP
from vit import ViT

GRID = (4, 4)


def squares(n: int = 12, regions: int = 1) -> Data:
    """Images of 16 px with a bright square of 8 px, on the grid of patches of 4 px, and its mask."""
    masks = torch.zeros(n, regions, 16, 16, dtype=torch.bool)
    for i in range(n):
        top, left = 4 * (i % 3), 4 * (i // 3 % 3)
        masks[i, :, top : top + 8, left : left + 8] = True
    images = (masks[:, :1] * 200).to(torch.uint8)
    names, known = [str(i) for i in range(n)], torch.ones(n, dtype=torch.bool)
    labels = torch.eye(2)[torch.arange(n) % 2]
    return Data(images, masks, known, labels, names, [f"object {r}" for r in range(regions)], ["a", "b"])


def test_a_map_of_the_object_reaches_everything_and_one_of_the_background_nothing():
    data = squares()
    maps = torch.nn.functional.avg_pool2d(data.masks.float(), 4).flatten(2)  # (M, 1, N)
    found = outlined(maps, maps, data.masks, data.masks, GRID)
    assert found["AP"] > 0.99 and found["CorLoc"] == 1 and found["MaxBoxAccV2"] > 0.99
    inverted = outlined(1 - maps, 1 - maps, data.masks, data.masks, GRID)
    assert inverted["AP"] < 0.2 and inverted["CorLoc"] < 0.2


def test_a_class_activation_map_shows_the_logits_of_patches_for_the_images_likeliest_class():
    torch.manual_seed(0)
    for encoder in (ViT(16, 4, 1, 12, 1, 2, pool=GAP()), ResNet(1, 4)):
        model, images = Classifier(encoder, 3).eval(), squares().images
        with torch.no_grad():
            logits, patches = model(prepared(images)), model.head(encoder(prepared(images)).patches)
            maps = class_activation(model, images)[:, 0]
        shown = patches[torch.arange(len(images)), :, logits.argmax(dim=1)]
        torch.testing.assert_close(maps, shown - shown.amin(dim=1, keepdim=True))
    torch.testing.assert_close(patches.mean(dim=1), logits)  # in a ResNet their mean is the image's logit


def test_the_best_head_and_two_controls_stand_beside_the_mean_of_heads():
    torch.manual_seed(0)
    encoder, data = ViT(16, 4, 1, 12, 1, 2), squares()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    found = measure_objects(encoder, {"val": data, "test": data}, -1)
    assert list(found) == ["mean of heads", "best head", "untrained", "middle"]
    assert found["untrained"] != found["mean of heads"] and found["best head"]["AP"] >= 0.1
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    trained = found["middle"]
    torch.nn.init.normal_(encoder.pos_embed)
    assert measure_objects(encoder, {"val": data, "test": data}, -1)["middle"] == trained  # needs no network


def test_what_has_no_map_of_one_object_says_so():
    data = {"val": squares(), "test": squares()}
    with pytest.raises(CannotMeasure, match="even pooling without labels"):
        measure_objects(ViT(16, 4, 1, 12, 1, 2, pool=GAP()), data, -1)
    two = squares(regions=2)
    with pytest.raises(CannotMeasure, match="masks of one region"):
        measure_objects(ViT(16, 4, 1, 12, 1, 2), {"val": two, "test": two}, -1)
