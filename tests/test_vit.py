"""The ViT computes what the published one computes, and returns its attention at hardly any cost."""

import pytest
import torch
import torch.nn.functional as F
from conftest import golden, seeded

from simpool import GAP
from vit import ViT, resized

IMAGES = torch.rand(2, 1, 16, 16, generator=seeded())


def small(**options) -> ViT:
    sizes = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 12, "depth": 3, "num_heads": 3}
    return ViT(**{**sizes, **options}).eval()


def test_features_and_attention_equal_those_of_the_published_vit():
    """Equations (1) to (8)."""
    numbers, weights = golden("dino_vit.npz")
    img, patch, *size = [int(numbers[f"config.{name}"]) for name in ("img", "patch", "dim", "depth", "heads")]
    vit = ViT(img, patch, 3, *size).eval()
    vit.load_state_dict(weights, strict=True)
    features, maps = vit(numbers["images"]), vit.attention_maps(numbers["images"])
    torch.testing.assert_close(features.pooled, numbers["cls"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features.patches, numbers["tokens_last"][:, 1:], rtol=1e-5, atol=1e-5)
    attention = numbers["last_self_attention"]
    torch.testing.assert_close(maps[:, -1], attention, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(features.attention, attention[:, :, 0, 1:], rtol=1e-5, atol=1e-6)
    x = vit.embed(numbers["images"])
    for block in vit.blocks[:-1]:
        x, _ = block(x)
    torch.testing.assert_close(vit.norm(x), numbers["tokens_second_last"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("registers, layer", [(0, -1), (0, 1), (2, 0), (2, -2)])
def test_the_returned_row_is_that_of_the_full_map_can_be_trained_and_changes_no_feature(registers, layer):
    vit = small(registers=registers)
    maps, seen, plain = vit.attention_maps(IMAGES), vit(IMAGES, layer=layer), vit(IMAGES, layer=None)
    torch.testing.assert_close(seen.attention, maps[:, layer, :, 0, 1 + registers :])
    assert plain.attention is None and torch.equal(plain.pooled, seen.pooled)
    if registers:
        assert torch.equal(vit.embed(IMAGES)[:, 1:3], vit.reg_token.expand(2, -1, -1))  # after CLS
    assert torch.autograd.grad(seen.attention[:, 0, 5].sum(), vit.blocks[layer].attn.qkv.weight)[0].any()


@pytest.mark.parametrize("options", [{}, {"registers": 2}, {"pool": GAP()}])
def test_without_patches_the_rest_of_the_features_is_the_same_and_so_are_gradients(options):
    """Though a last block with a CLS token transforms that token alone."""
    found, vit, seen = [], small(drop_path=0.5, **options).double().train(), []
    vit.blocks[-1].mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    for patches in (True, False):
        torch.manual_seed(1)
        features = vit(IMAGES.double(), patches=patches)
        loss = features.pooled.square().sum() + features.attention.square().sum()
        gradients = torch.autograd.grad(loss, vit.parameters(), allow_unused=True)
        found.append((features.pooled, features.attention, *gradients))
    assert features.patches is None
    torch.testing.assert_close(*found)
    assert seen == ([16, 16] if options.get("pool") else [17 + options.get("registers", 0), 1])


def test_in_bfloat16_a_cpu_still_mixes_the_values_in_float32_and_its_gradients_stay_near(monkeypatch):
    vit, seen, mix = small(), [], F.scaled_dot_product_attention
    watched = lambda q, *kv: seen.append(q.dtype) or mix(q, *kv)  # noqa: E731
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    gradients = []
    for low in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            features = vit(IMAGES)
        loss = features.pooled.float().square().sum() + features.attention.float().square().sum()
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, vit.parameters())]))
    assert set(seen) == {torch.float32}
    assert F.cosine_similarity(*gradients, dim=0) > 0.99
    assert vit.bfloat16()(IMAGES.bfloat16()).pooled.dtype == torch.bfloat16  # also without autocast


def test_other_image_sizes_get_resized_positions():
    vit, images = small(), torch.rand(2, 1, 8, 24)
    features = vit(images)
    assert vit.grid(images) == (2, 6) and small(img_size=(8, 16)).native_grid == (2, 4)
    assert features.patches.shape == (2, 12, 12) and features.attention.shape == (2, 3, 12)
    assert resized(vit.pos_embed, (4, 4), (4, 4)) is vit.pos_embed
    vit.pos_embed.data[:, 1:] = torch.arange(4.0).repeat_interleave(4)[None, :, None]  # by the row alone
    wider = resized(vit.pos_embed, (4, 4), (2, 6))  # still is
    assert torch.equal(wider[:, 0], vit.pos_embed[:, 0])  # CLS has no place to be resized
    rows = wider[0, 1:, 0].view(2, 6)
    torch.testing.assert_close(rows, rows[:, :1].expand(2, 6))
    assert rows[1, 0] > rows[0, 0] + 1


def test_a_pool_replaces_the_cls_token_and_the_last_norm_comes_after_it():
    """In this order as in SimPool's release: before the pool, it would be undone by the shift of (16)."""
    patches, vit = [], small(pool=GAP(), registers=2)
    vit.pool.register_forward_hook(lambda module, inputs, output: patches.extend(inputs))
    features = vit(IMAGES)
    assert patches[0].shape == (2, 16, 12) and features.attention.shape == (2, 1, 16)
    assert not hasattr(vit, "cls_token") and vit.pos_embed.shape == (1, 16, 12)
    torch.testing.assert_close(features.pooled, vit.norm(patches[0].mean(dim=1)))
    torch.testing.assert_close(features.patches, vit.norm(patches[0]))


def test_stochastic_depth_drops_whole_branches_more_often_in_later_blocks_and_keeps_the_mean():
    assert [block.drop_path for block in small(drop_path=0.5).blocks] == [0, 0.25, 0.5]
    block, x = small(drop_path=0.2).blocks[-1].train(), torch.rand(2, 5, 12)
    kept = block.keep(torch.ones(4000, 2, 3))
    assert kept.unique().tolist() == pytest.approx([0, 1.25])
    assert torch.equal(kept, kept[:, :1, :1].expand_as(kept)) and abs(kept.mean() - 1) < 0.05
    assert torch.equal(block.eval().keep(kept), kept)
    block.train().drop_path = 1 - 1e-6  # neither branch is left
    assert torch.equal(block(x)[0], x)


def test_matrices_start_as_in_the_release():
    linear = [module for module in small().modules() if isinstance(module, torch.nn.Linear)]
    assert all(0.014 < module.weight.std() < 0.026 and not module.bias.any() for module in linear)
