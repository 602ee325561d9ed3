"""The ViT computes what the published one computes, and returns its attention at hardly any cost."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from vit import Features, ViT

GOLDEN = Path(__file__).parent / "golden"


def small(**options) -> ViT:
    sizes = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 12, "depth": 3, "num_heads": 3}
    return ViT(**{**sizes, **options}).eval()


def test_features_and_attention_equal_those_of_the_published_vit():
    golden = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "dino_vit.npz").items()}
    img, patch, *size = [int(golden[f"config.{name}"]) for name in ("img", "patch", "dim", "depth", "heads")]
    vit = ViT(img, patch, 3, *size).eval()
    weights = {k.removeprefix("weight."): v for k, v in golden.items() if k.startswith("weight.")}
    vit.load_state_dict(weights, strict=True)
    features, maps = vit(golden["images"]), vit.attention_maps(golden["images"])
    torch.testing.assert_close(features.pooled, golden["cls"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features.patches, golden["tokens_last"][:, 1:], rtol=1e-5, atol=1e-5)
    attention = golden["last_self_attention"]
    torch.testing.assert_close(maps[:, -1], attention, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(features.attention, attention[:, :, 0, 1:], rtol=1e-5, atol=1e-6)
    x = vit.embed(golden["images"])
    for block in vit.blocks[:-1]:
        x, _ = block(x)
    torch.testing.assert_close(vit.norm(x), golden["tokens_second_last"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", [0, 1, -1, -3])
def test_the_returned_row_is_the_cls_row_of_the_full_map_in_every_block(layer):
    vit, images = small(), torch.rand(2, 1, 16, 16)
    maps = vit.attention_maps(images)
    torch.testing.assert_close(vit(images, layer=layer).attention, maps[:, layer, :, 0, 1:])
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(2, 3, 3, 17))


def test_returning_attention_changes_neither_features_nor_their_gradient_and_has_one_of_its_own():
    vit, images = small(), torch.rand(2, 1, 16, 16)
    results = []
    for layer in (None, -1):
        vit.zero_grad()
        features = vit(images, layer=layer)
        features.pooled.square().sum().backward()
        results.append((features.pooled, vit.blocks[-1].attn.qkv.weight.grad.clone()))
    assert vit(images, layer=None).attention is None
    assert all(torch.equal(a, b) for a, b in zip(*results))
    vit.zero_grad()
    vit(images).attention[:, 0, 5].sum().backward()
    assert vit.blocks[-1].attn.qkv.weight.grad.abs().sum() > 0


def test_memory_of_the_row_grows_with_the_number_of_patches_and_not_with_its_square():
    def row_bytes(side: int) -> int:
        """Bytes that autograd keeps because the row is returned."""
        vit, images, kept = small(img_size=side).requires_grad_(), torch.rand(1, 1, side, side), {}
        for layer in (None, -1):
            held = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.nbytes) or t, lambda t: t):
                vit(images, layer=layer)
            kept[layer] = sum(held)
        return kept[-1] - kept[None]

    small_grid, large_grid = row_bytes(16), row_bytes(64)  # 16 times the patches
    assert small_grid > 0 and large_grid < 17 * small_grid


def test_other_image_sizes_get_resized_positions():
    vit = small()
    features = vit(torch.rand(2, 1, 8, 24))
    assert vit.grid(torch.rand(2, 1, 8, 24)) == (2, 6)
    assert features.patches.shape == (2, 12, 12) and features.attention.shape == (2, 3, 12)
    assert torch.equal(vit.positions_for((4, 4)), vit.pos_embed)
    with torch.no_grad():  # a constant embedding stays constant
        vit.pos_embed.fill_(0.7)
    torch.testing.assert_close(vit.positions_for((2, 6)), torch.full((1, 13, 12), 0.7))
    with torch.no_grad():  # one that depends on the row alone still does
        vit.pos_embed[:, 1:] = torch.arange(4.0).repeat_interleave(4)[None, :, None]
    rows = vit.positions_for((2, 6))[0, 1:, 0].view(2, 6)
    torch.testing.assert_close(rows, rows[:, :1].expand(2, 6))
    assert rows[1, 0] > rows[0, 0] + 1


def test_a_vit_for_oblong_images_reads_patches_row_by_row():
    vit, images = small(img_size=(8, 16), depth=1), torch.zeros(1, 1, 8, 16)
    assert vit.native_grid == (2, 4)
    images[:, :, 4:, :4] = 1  # row 1, column 0: patch 4
    tokens = vit.embed(images, positions=False)[0, 1:]
    assert [i for i in range(8) if not torch.equal(tokens[i], tokens[0])] == [4]


def test_without_positions_the_order_of_patches_means_nothing():
    vit, images = small(), torch.rand(1, 1, 16, 16)
    swapped = torch.cat([images[:, :, 8:], images[:, :, :8]], dim=2)  # exchanges whole rows of patches
    torch.testing.assert_close(vit(images, positions=False).pooled, vit(swapped, positions=False).pooled)
    assert not torch.allclose(vit(images).pooled, vit(swapped).pooled, atol=1e-5)


def test_a_pool_replaces_the_cls_token_and_the_last_norm_comes_after_it():
    """In this order as in SimPool's release: before the pool, it would be undone by the shift of (16)."""
    seen = []

    class Mean(nn.Module):
        def forward(self, patches):
            seen.append(patches)
            return patches.mean(dim=1), torch.full(patches.shape[:2], 1 / patches.shape[1])

    vit = small(pool=Mean(), registers=2)
    features = vit(torch.rand(2, 1, 16, 16))
    assert isinstance(features, Features) and seen[0].shape == (2, 16, 12)
    assert not hasattr(vit, "cls_token") and vit.pos_embed.shape == (1, 16, 12)
    torch.testing.assert_close(features.pooled, vit.norm(seen[0].mean(dim=1)))
    torch.testing.assert_close(features.patches, vit.norm(seen[0]))
    assert features.attention.shape == (2, 1, 16)


def test_stochastic_depth_drops_whole_branches_and_keeps_the_mean():
    torch.manual_seed(0)
    block = small(drop_path=0.5).blocks[-1].train()
    kept = block.keep(torch.ones(4000, 2, 3))
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(kept, kept[:, :1, :1].expand_as(kept)) and abs(kept.mean() - 1) < 0.1
    assert torch.equal(block.eval().keep(kept), kept)


def test_sizes_that_do_not_divide_are_refused_with_sizes_that_work():
    message = "100x100 px cannot be cut into patches of 16 px: use a multiple of 16, such as 96 or 112"
    with pytest.raises(ValueError, match=message):
        ViT(100, 16)
    with pytest.raises(ValueError, match="use a multiple of 4, such as 4$"):
        small()(torch.rand(1, 1, 16, 2))
    with pytest.raises(ValueError, match="embed_dim 10 is not a multiple of num_heads 3"):
        ViT(embed_dim=10, num_heads=3)
