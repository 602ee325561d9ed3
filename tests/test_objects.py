"""Maps that outline the one object of an image, and the controls beside them."""

import pytest
import torch

from common.classify import Classifier
from common.data import Data, prepared, select
from common.metrics import CannotMeasure
from common.objects import class_activation, measure_objects, outlined, untrained
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


def test_a_map_of_the_object_reaches_everything_at_any_offset_and_one_of_the_background_nothing():
    data = squares()
    maps = torch.nn.functional.avg_pool2d(data.masks.float(), 4).flatten(2)  # (M, 1, N)
    found = outlined(maps, maps, data.masks, data.masks, GRID)
    assert found["AP"] > 0.99 and found["CorLoc"] == 1 and found["MaxBoxAccV2"] > 0.99
    assert outlined(maps + 7, maps + 7, data.masks, data.masks, GRID) == pytest.approx(found)
    inverted = outlined(1 - maps, 1 - maps, data.masks, data.masks, GRID)
    assert inverted["AP"] < 0.2 and inverted["CorLoc"] < 0.2


def test_corloc_takes_its_threshold_from_validation_images():
    maps, small, large = torch.zeros(1, 1, 4, 4), *torch.zeros(2, 1, 1, 16, 16, dtype=torch.bool)
    maps[..., :3, :3], maps[..., 0, 0], small[..., :4, :4], large[..., :12, :12] = 0.5, 1, True, True
    maps = maps.flatten(2)
    assert outlined(maps, maps, small, small, GRID)["CorLoc"] == 1
    assert outlined(maps, maps, large, small, GRID)["CorLoc"] == 0  # a low one is best there


def test_a_class_activation_map_shows_the_logits_of_patches_for_the_images_likeliest_class():
    for encoder in (ViT(16, 4, 1, 12, 1, 2, pool=GAP()), ResNet(1, 4)):
        model, images = Classifier(encoder, 3).eval(), squares().images
        with torch.no_grad():
            logits, patches = model(prepared(images)), model.head(encoder(prepared(images)).patches)
            maps = class_activation(model, images)[:, 0]
        torch.testing.assert_close(maps, patches[torch.arange(len(images)), :, logits.argmax(dim=1)])
    torch.testing.assert_close(patches.mean(dim=1), logits)  # in a ResNet their mean is the image's logit


def test_the_head_that_is_best_on_validation_images_and_two_controls_stand_beside_the_mean(monkeypatch):
    encoder, val, test = ViT(16, 4, 1, 12, 1, 2), squares(), squares(6)
    patches = torch.nn.functional.avg_pool2d(val.masks.float(), 4).flatten(2)

    def attention(network: ViT, images: torch.Tensor, layer: int) -> torch.Tensor:
        right = patches[: len(images)]
        return torch.cat([1 - right, right], dim=1) if network is encoder else torch.ones_like(right)

    monkeypatch.setattr("common.objects.attention_of", attention)
    found = measure_objects(encoder, {"val": val, "test": test}, -1)
    assert list(found) == ["mean of heads", "best head", "untrained", "middle"]
    assert found["best head"]["AP"] > 0.99 > 0.3 > found["mean of heads"]["AP"] == found["untrained"]["AP"]
    middle = torch.zeros(6, 1, 16, 16, dtype=torch.bool)
    middle[..., 4:12, 4:12] = True
    aligned = {name: data._replace(masks=middle[:1].expand(len(data.names), -1, -1, -1)) for name, data in
        (("val", val), ("test", test))}  # fmt: skip
    assert measure_objects(encoder, aligned, -1)["middle"]["CorLoc"] == 1


def test_the_untrained_control_shares_no_weight_and_leaves_the_model_alone():
    model = Classifier(ViT(16, 4, 1, 12, 1, 2, registers=1), 2)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(3)
    control = untrained(model)
    assert all((weight == 3).all() for weight in model.parameters())
    assert not any((weight == 3).any() for weight in control.parameters())


def test_images_without_an_object_do_not_count():
    encoder, data = ViT(16, 4, 1, 12, 1, 2), squares()
    empty = data._replace(masks=data.masks.clone())
    empty.masks[6:] = False
    some = measure_objects(encoder, {"val": data, "test": select(data, torch.arange(6))}, -1)
    assert measure_objects(encoder, {"val": data, "test": empty}, -1) == some


def test_what_has_no_map_of_one_object_says_so():
    data = {"val": squares(), "test": squares()}
    with pytest.raises(CannotMeasure, match="even pooling without one layer of logits"):
        measure_objects(ViT(16, 4, 1, 12, 1, 2, pool=GAP()), data, -1)
    two = squares(regions=2)
    with pytest.raises(CannotMeasure, match="masks of one region"):
        measure_objects(ViT(16, 4, 1, 12, 1, 2), {"val": two, "test": two}, -1)
