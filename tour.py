"""All steps from top to bottom: one labelled image, a ViT with guided attention, a classifier.

    python tour.py    2 to 3 minutes on a CPU; prints APs of 93 to 95, AUCs of 0 and 95 to 97, draws tour.png

A hospital stamps an L on every image with an enlarged heart. A classifier relies on the L unless training
keeps it off the background. Foreground masks can do that, but only one image has masks.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Generator, nn
from torch.optim import AdamW

from attention_priors import guidance, priors_from_masks
from common.classify import Classifier
from common.metrics import auc, localisation_ap
from common.phantom import REGIONS, phantom, stamp
from common.plots import plt
from common.registration import carry, confidence, register
from crops import multi_crop
from dino import DINO
from isnet_lrp import background_loss, foreground_loss, relevance_range
from lrp import relevance
from resnet import ResNet
from vit import ViT

STEPS, GRID = 200, (8, 8)
RULE = {"epsilon": 0.01, "gamma": 3.0, "signed": True}  # the rule of LRP
torch.manual_seed(0)
torch.set_flush_denormal(True)  # relevance has denormal numbers, which make a CPU slow
generator = Generator().manual_seed(0)

# 1. Draw chest X-rays. The L agrees with the label in training and contradicts it in the test images.
images, masks, labels = phantom(800, seed=0)  # (N, 1, 64, 64) uint8, (N, 3, 64, 64) bool, (N, 4)
tests, test_masks, test_labels = phantom(300, seed=1)
sick, test_sick = labels[:, 0] == 1, test_labels[:, 0] == 1
images, tests = stamp(images, sick), stamp(tests, ~test_sick)
x, test_x = images / 127.5 - 1, tests / 127.5 - 1

# 2. One image has masks. Blurred, they are the priors; registration carries them to all other images.
one = int(masks.flatten(2).any(dim=2).all(dim=1).int().argmax())  # the first that shows all regions
priors = priors_from_masks(masks[one])  # (3, 64, 64), for left lung, right lung, heart
parts = [register(images[one], priors, part, deformable=True) for part in images.split(200)]
theta, flow, agreement = (torch.cat(tensors) for tensors in zip(*parts))

# 3. DINO learns features of two views of an image; SPAN guides one head by each prior, in the same crops.
encoder = ViT(img_size=64, patch_size=8, in_chans=1, embed_dim=96, depth=4, num_heads=6)
dino = DINO(encoder, embed_dim=96, koleo=0.1, max_entropy=0.8)
optimizer = AdamW([p for p in dino.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.04)
for step in range(STEPS):
    index = torch.randint(len(images), (48,), generator=generator)
    views, thetas = multi_crop(images[index] / 255, generator, size=64)
    views = [2 * v - 1 for v in views]
    loss, features = dino(views, teacher_temp=0.02)
    prior, sure = carry(priors, theta[index], flow[index]), confidence(agreement[index])
    span = guidance([f.attention for f in features], prior, thetas, [GRID], confidence=sure)
    optimizer.zero_grad()
    (loss + 3 * span).backward()
    nn.utils.clip_grad_norm_(dino.parameters(), 3.0)
    optimizer.step()
    dino.update_teacher(0.996)
    if step % 50 == 49:
        print(f"step {step + 1}: DINO {loss:.2f}, SPAN {span:.3f}")
if dino.health.collapsed():
    raise SystemExit(dino.health.diagnosis())

# 4. The guided heads attend to their regions, even in images that they were not trained on.
with torch.no_grad():
    gaze = torch.cat([encoder.eval()(part).attention[:, :3] for part in x.split(200)])  # (N, 3, 64)
    test_gaze = torch.cat([encoder(part).attention[:, :3] for part in test_x.split(200)])
aps = localisation_ap(test_gaze, test_masks, GRID).diagonal(dim1=1, dim2=2).nanmean(dim=0)  # (3,)
print("average precision: " + ", ".join(f"{region} {100 * ap:.1f}" for region, ap in zip(REGIONS, aps)))

# 5. Their attention becomes the masks of all training images.
maps = F.interpolate(gaze.unflatten(2, GRID), size=64, mode="bilinear")  # (N, 3, 64, 64)
# 0.4 of the largest value; train.py takes the pixels that hold most of the attention.
foreground = (maps > 0.4 * maps.amax(dim=(2, 3), keepdim=True)).any(dim=1, keepdim=True)  # (N, 1, 64, 64)
true = masks.any(dim=1, keepdim=True)
print(f"Dice of the masks: {100 * 2 * (foreground & true).sum() / (foreground.sum() + true.sum()):.1f}")


# 6. Two classifiers: plain, and with swapped backgrounds and relevance that must stay inside the masks.
def train(model: nn.Module, steps: int, c1: float = 0, c2: float = 0) -> nn.Module:
    """Train to find enlarged hearts; with ISNet if C1 and C2, the range of relevance, are given."""
    optimizer = AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        index = torch.randint(len(images), (16,), generator=generator)
        batch, y, m = x[index], sick[index].float(), foreground[index].float()
        if c1:  # backgrounds swapped in every step, relevance penalised in every third
            batch = batch * m + batch.roll(1, 0) * (1 - m)  # train.py fills the other's foreground first
        if c1 and step % 3 == 0:
            # Weights of 1: a single logit is its own log-odds.
            R, logits = relevance(model, batch, torch.ones(16, 1), create_graph=True, **RULE)
            # train.py: weight 0.3, also on inner layers, and with a margin around the foreground
            isnet = background_loss(R, m, decay=0.97, E=0.1) + foreground_loss(R, m, c1, c2, hybrid=True)
        else:
            logits, isnet = model(batch), torch.zeros(16)
        loss = F.binary_cross_entropy_with_logits(logits[:, 0], y) + isnet.mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    return model.eval()


# The plain classifier reads the L at once, so it gets fewer steps.
first = Classifier(ResNet(in_chans=1, embed_dim=64), classes=1)  # an encoder, and a linear layer on `pooled`
plain = train(copy.deepcopy(first), 600)
some = x[:200]
R, _ = relevance(plain, some, torch.ones(len(some), 1), **RULE)
blind = train(first, 900, *relevance_range(R.abs().sum(dim=(1, 2, 3))))
heat = {}
for name, model in {"plain": plain, "ISNet": blind}.items():
    heat[name], logits = relevance(model, test_x, torch.ones(len(tests), 1), **RULE)
    print(f"{name} classifier, AUC with the L on normal hearts: {100 * auc(logits[:, 0], test_sick):.1f}")

# 7. One picture: test image, three heads, relevance of both classifiers.
figure, axes = plt.subplots(4, 6, figsize=(9, 6.4), layout="constrained")
for i, row in enumerate(axes):
    shown = [(tests[i, 0], "gray", 0, 255)]
    shown += [(A, "magma", 0, 0.15) for A in test_gaze[i].unflatten(1, GRID)]
    for R in heat.values():
        picture = R[i, 0]
        shown.append((picture / picture.abs().mean(), "RdBu_r", -12, 12))  # one scale, in units of the mean
    for axis, (picture, colours, low, high) in zip(row, shown):
        axis.imshow(picture.numpy(), cmap=colours, vmin=low, vmax=high)
        axis.axis("off")
for axis, title in zip(axes[0], ["test image", *REGIONS, "relevance, plain", "relevance, ISNet"]):
    axis.set_title(title, fontsize=9)
figure.savefig("tour.png", dpi=100)
print("drew tour.png")
