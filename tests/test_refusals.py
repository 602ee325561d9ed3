"""What cannot be done is refused: arguments by name, settings in one line with value, limit and remedy."""

import math

import numpy as np
import pytest
import torch
from conftest import image_folder, save, seeded
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as attend

import train
from attention_priors import priors_from_masks, priors_from_statistics, span_loss
from common.checks import check_step
from common.config import parse
from common.phantom import stamp
from common.regions import check_masses
from common.registration import align
from common.splits import load
from common.weights import exported
from crops import random_crops
from isnet_lrp import background_loss, foreground_loss, log_odds
from lrp import relevance
from relvit import TASKS, RelViT
from resnet import ResNet
from simpool import GAP, SimPool
from vit import ViT

TWO, MASK = torch.ones(1, 2, 4), torch.ones(2, 1, 8, 8)
FLAT, RELU, IMAGES, TARGET = nn.Flatten(), nn.ReLU(), torch.rand(4, 1, 3, 3), torch.tensor([0, 1, 2, 0])
pytestmark = pytest.mark.usefixtures("few_test_images")


def stamped(size: int, kind: str, masks: torch.Tensor | None = None):
    return stamp(torch.zeros(2, 1, size, size, dtype=torch.uint8), torch.ones(2) > 0, kind, masks)


PUBLISHED = "CLS, or SimPool with 1 head, gamma 1.25, no registers"


def written(registers: int, pool: nn.Module):
    return exported(ViT(16, 8, 3, 32, 1, 2, pool=pool, registers=registers))


REFUSED = [
    ("2 priors but 1 attention heads", lambda: span_loss(torch.ones(1, 1, 4), TWO, TWO[:, :, 0])),
    ("B, R or N differ", lambda: span_loss(torch.ones(1, 2, 9), TWO, TWO[:, :, 0])),
    (r"share \(1, 1\).*differ", lambda: span_loss(TWO, TWO, TWO[:, :1, 0])),
    ("unknown SPAN loss 'l1': choose kl, mse or dice", lambda: span_loss(TWO, TWO, TWO[:, :, 0], "l1")),
    ("prior 1 .* is empty", lambda: priors_from_masks(torch.tensor([[[1.0]], [[0.0]]]))),
    ("negative priors: do not normalise", lambda: priors_from_statistics(torch.randn(3, 1, 8, 8))),
    ("give at least 2", lambda: priors_from_statistics(torch.ones(1, 1, 8, 8))),
    ("0 < a <= b <= 1", lambda: random_crops(2, (0.5, 0.2), seeded())),
    ("100x100 px .* patches of 16 px: use a multiple of 16, such as 96 or 112", lambda: ViT(100, 16)),
    ("use a multiple of 4, such as 4$", lambda: ViT(16, 4, 1, 12, 1, 3)(torch.rand(1, 1, 16, 2))),
    ("embed_dim 10 is not a multiple of num_heads 3", lambda: ViT(embed_dim=10, num_heads=3)),
    ("multiple of 4", lambda: ResNet(1, 18)),
    ("num_heads 3 must divide dim 8", lambda: SimPool(8, num_heads=3)),
    *[("gamma .* must lie between 0.1 and 10", lambda g=g: SimPool(8, g)) for g in (0.0, 64.0, math.nan)],
    *[("SimPool pools", lambda s=s: SimPool(8)(torch.zeros(s))) for s in ((2, 0, 8), (2, 5, 7), (2, 8))],
    *[(PUBLISHED, lambda p=p: written(0, p)) for p in (SimPool(32, 1.25, 2), SimPool(32, 3), GAP())],
    (PUBLISHED, lambda: written(2, SimPool(32, 1.25))),
    ("1x8 patches have no relations", lambda: RelViT(FLAT, 18, (1, 8), TASKS)),
    ("no task; choose from relations", lambda: RelViT(FLAT, 18, (2, 2), ())),
    ("unknown task 'relation'; choose from relations", lambda: RelViT(FLAT, 18, (2, 2), ("relation",))),
    ("embed_dim 8 is too small for 9 relations", lambda: RelViT(FLAT, 8, (2, 2), TASKS)),
    (r"target \[.*\], output .*: give labels \(B,\)", lambda: relevance(FLAT, IMAGES, TARGET + 7)),
    (r"output \(B, K\)", lambda: relevance(nn.Identity(), IMAGES, TARGET)),
    (r"target torch.*\), output .*: give labels \(B,\)", lambda: relevance(FLAT, IMAGES, TARGET.float())),
    (r"target torch.*\), output .*: give labels \(B,\)", lambda: relevance(FLAT, IMAGES, TARGET[:, None])),
    ("follow the output back to the images", lambda: relevance(lambda x: FLAT(x.detach()), IMAGES, TARGET)),
    ("layers: ReLU", lambda: relevance(lambda x: FLAT(x) + RELU(IMAGES[0]), IMAGES, TARGET, layers=[RELU])),
    ("1 layers must be called once: 0", lambda: relevance(FLAT, IMAGES, TARGET, layers=[nn.ReLU()])),
    ("called once: 2", lambda: relevance(lambda x: FLAT(x) + FLAT(x), IMAGES, TARGET, layers=[FLAT])),
    ("one score an image", lambda: relevance(FLAT, IMAGES, lambda output: output)),
    ("dropout must be 0", lambda: relevance(lambda x: attend(x, x, x, None, 0.5), IMAGES, TARGET)),
    ("float images", lambda: relevance(FLAT, IMAGES.to(torch.uint8), TARGET)),
    ("einsum of 3 tensors", lambda: relevance(lambda x: torch.einsum("b...,b...,b...", x, x, x), IMAGES, 0)),
    *[("epsilon .* must be above 0", lambda e=e: relevance(FLAT, IMAGES, TARGET, e)) for e in (0, -1)],
    ("gamma -1 not negative", lambda: relevance(FLAT, IMAGES, TARGET, 0.1, -1)),
    ("repeat keys", lambda: relevance(lambda x: attend(x.tile(2, 1, 1), x, x, enable_gqa=True), IMAGES, 0)),
    ("sees no key", lambda: relevance(lambda x: attend(x, x, x, torch.eye(3) > 1), IMAGES, TARGET)),
    (r"mask \(2, 1, 4, 4\) does not fit heatmap", lambda: background_loss(MASK, MASK[:, :, ::2, ::2])),
    *[("decay .* must be in", lambda x=x: background_loss(MASK, MASK, *x)) for x in ((0, 1), (1, 0))],
    ("explain logits", lambda: log_odds(torch.zeros(2, 1), torch.tensor([0, 0]))),
    ("only 0 .* and 1", lambda: background_loss(MASK, MASK / 2)),
    ("0 < c1 < c2", lambda: foreground_loss(MASK, MASK, 2.0, 1.0)),
    (r"image is \(1, 2, 4\), images \(1, 8, 8\): resize", lambda: align(TWO[0][None], MASK)),
    ("marker moustache is not one of corner, anywhere, tint, border, disc", lambda: stamped(64, "moustache")),
    ("images of 16 px are too small for a marker", lambda: stamped(16, "corner")),
    ("has no place for a marker", lambda: stamped(64, "anywhere", torch.ones(2, 1, 64, 64) > 0)),
    (r"3 training image\(s\) for 4 processes: take fewer", lambda: check_step(parse([])[0], 3, 4)),
    ("a marker can be drawn only on phantoms", lambda: load("parts", 64, train_images=2, marker=1.0)),
    *[("can't be file names", lambda n=n: check_masses("run", {n: 0.5})) for n in ("../heart", "..", "")],
]  # fmt: skip


@pytest.mark.parametrize("line, call", REFUSED)
def test_bad_arguments_are_named(line, call):
    with pytest.raises(ValueError, match=line):
        call()


FEW = "--train-images 8"
SETTINGS = {
    "--lr nan": "--lr nan: it must lie between",
    "--global-scale 0.5 0.2": "--global-scale 0.5 0.2: give two fractions",
    "--span-layer 4": "--span-layer 4: it must lie between -4 and 3",
    "--accumulate 33": "--accumulate 33: it must lie between 1 and 32",
    f"--num-heads 2 {FEW}": "3 priors (left lung, right lung, heart) but 2 heads",
    "--device abacus": "--device abacus is unknown: choose auto, cpu, cuda or mps",
    f"--sample nobody {FEW}": "`nobody` is not drawn",
    "--prior nowhere.npy": "nowhere.npy is not sample, masks, statistics, none, or a .npy file",
    "--pool simpool --pool-heads 5": "--pool-heads 5 must divide --embed-dim 96",
    "--pool gap": "--pool gap has no attention to guide: add --prior none",
    "--backbone resnet --prior none --pool cls": "--pool cls needs --backbone vit",
    "--ssl none --prior none": "--ssl none learns from a --prior",
    "--ssl relvit --mega-patches 9": "--mega-patches 9: more than the 8 patches per side",
    "--ssl relvit --backbone resnet --pool simpool": "needs --backbone vit",
    "--isnet 1": "--isnet needs --task classify",
    f"--task classify --findings gout {FEW}": "`gout` is not in",
    "--task classify --backbone vit --isnet 1 --relations angles": "masks don't follow: choose one",
    "--task classify --isnet 1 --amp": "--amp is for pretraining and plain classifiers",
    "--task classify --preset published --backbone vit": "needs --backbone resnet",
    f"--task classify --isnet 1 --accumulate 5 {FEW}": "2 images in each of 5 part(s) of a step, which has 8",
    f"--task classify --baseline swap --accumulate 5 {FEW}": ": add images, lower --accumulate, or",
    f"--accumulate 8 --koleo 0 {FEW}": "keeps DINO from collapse (--koleo, --max-entropy) needs 2 images",
    "--task classify --baseline gated --pool simpool": "leave out --pool",
    "--task classify --compile": "--compile is for pretraining",
    "--task classify --baseline swap --isnet 1": "--baseline excludes --isnet",
    "--task classify --isnet 1 --masks nowhere": "nowhere is not data, prior, attention, or a folder",
    "--task classify --isnet 1 --masks attention": "--masks attention needs --init RUN; or",
    "--task classify --isnet 1 --masks prior --prior masks": "are the data's own masks: leave out both",
    "--task classify --isnet 1 --masks prior --prior statistics": "clusters cover the whole image; leave out",
    "--ssl relvit --no-follow": "--no-follow does nothing without --ssl dino or none and --prior",
    "--prior none --span-weight 2": "does nothing without --prior",
    "--prior masks --align none": "--align none does nothing without --prior sample or --masks prior",
    "--patch-size 64 --local-crops-number 2": "--local-crops-number needs 2 patches a side or more",
    "--local-scale 0.1 0.2": "--local-scale 0.1 0.2 does nothing without --local-crops-number",
    "--task classify --align none": "--task pretrain or --masks prior or --isnet and --masks data or ",
    "--task classify --momentum 0.5": "does nothing without --task pretrain",
    "--relations angles": "--relations angles does nothing without --ssl relvit or --task classify",
    "--task classify --baseline gated --masks prior": "without --isnet or --baseline multitask or ",
    "--task classify --depth 6": "--depth 6 does nothing without --backbone vit",
}


@pytest.mark.parametrize("words", SETTINGS)
def test_settings_without_sense_are_refused_before_anything_is_written(words, tmp_path, refused):
    assert SETTINGS[words] in refused(train.main, *words.split(), "--out", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_masks_of_images_without_a_label_are_no_foreground_to_learn_from(tmp_path, refused):
    rows = "a.png,0,train", "b.png,1,train", "c.png,,train"
    data = image_folder(tmp_path / "data", "file,ill,split", *rows)
    for name in "abc":
        save(data / "masks" / "lungs" / f"{name}.png", np.eye(16, dtype=np.uint8) * 255 * (name == "c"))
    words = f"--task classify --isnet 1 --img-size 16 --data {data} --out {tmp_path / 'run'}"
    assert "all masks are empty; draw the foreground" in refused(train.main, *words.split())
