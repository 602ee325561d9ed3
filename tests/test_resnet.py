"""The ResNet has the interface of the ViT and the shapes of its paper."""

import pytest
import torch
from torch import nn

from resnet import ResNet


@pytest.mark.parametrize("size", [(32, 32), (30, 44)])
def test_features_are_the_last_map_row_by_row_and_its_mean(size):
    encoder = ResNet(1, 16, (1, 2, 1)).eval()
    images, maps = torch.rand(2, 1, *size), []
    encoder.blocks[-1].register_forward_hook(lambda module, inputs, output: maps.append(output))
    features, (h, w) = encoder(images), encoder.grid(images)
    assert features.patches.shape == (2, h * w, 16) and maps[0].shape == (2, 16, h, w)
    assert torch.equal(features.patches[:, 1 * w + 2], maps[0][:, :, 1, 2])
    torch.testing.assert_close(features.pooled, maps[0].mean(dim=(2, 3)))
    torch.testing.assert_close(features.attention, torch.full((2, 1, h * w), 1 / (h * w)))


def test_the_shortcut_is_the_identity_unless_the_shape_changes():
    """Equations (1), (2)."""
    encoder = ResNet(3, 16, (2, 1))
    assert [len(block.shortcut) for block in encoder.blocks] == [0, 0, 2]
    block, x = encoder.blocks[0].eval(), torch.rand(1, 8, 4, 4)
    nn.init.zeros_(block.bn2.weight)
    assert torch.equal(block(x), x)  # equation (1) with F = 0
