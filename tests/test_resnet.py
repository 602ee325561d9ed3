"""The ResNet has the ViT's face, and the shapes of its paper."""

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


def test_a_pooling_module_supplies_features_and_attention():
    class First(nn.Module):
        def forward(self, x):
            return x[:, 0], torch.eye(x.shape[1])[:1].expand(len(x), -1)

    features = ResNet(1, 16, pool=First())(torch.rand(2, 1, 32, 32))
    assert torch.equal(features.pooled, features.patches[:, 0]) and features.attention.shape == (2, 1, 16)


def test_the_shortcut_is_the_identity_unless_the_shape_changes():
    encoder = ResNet(3, 16, (2, 1))
    kinds = [len(block.shortcut) for block in encoder.blocks]
    assert kinds == [0, 0, 2]
    block = encoder.blocks[0].eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(1, 8, 4, 4)
    assert torch.equal(block(x), x)  # equation (1) with F = 0


def test_a_width_that_cannot_be_halved_is_refused():
    with pytest.raises(ValueError, match="multiple of 4"):
        ResNet(1, 18)
