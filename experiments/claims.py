"""The claims: which figure must reach which bar in every seed. README.md shows the first of each number."""

from collections.abc import Iterable
from itertools import product
from typing import NamedTuple

BACKBONES, BARS = {"resnet": "ResNet", "vit": "ViT"}, {"resnet": 95, "vit": 92}  # of flipped AUCs
SHORTCUTS = {
    "corner": "an L in a corner", "anywhere": "an L anywhere", "tint": "a tint", "border": "a frame",
}  # fmt: skip
FLIPPED, EQUAL = "AUC with the marker flipped", "60 epochs each"
BEST, ON_GRID = "that of DINO's heads (best on validation)", "the registered prior's on the same grid"
PUBLISHED = "DINO's (published loss)"
UNTRAINED = "linear mAUC minus an untrained encoder's"
AT_HOSPITALS = {  # ways that ISNet is compared with
    "pipeline": "a segmenter, then a classifier", "multitask": "multi-task learning", "gain": "GAIN",
    "gated": "an attention gate", "rrr": "right for the right reasons", "swap": "swapped backgrounds alone",
    "published": "ISNet as published",
}  # fmt: skip


class Claim(NamedTuple):
    """A figure in percent, or its difference to another."""

    number: int
    text: str
    bar: float
    figure: str  # "EXPERIMENT FIGURE"
    minus: str = ""  # the same, or "EXPERIMENT" if the figure is the same
    paper: str = ""  # the paper's figure, where it has one


def on_shortcuts(
    number: int, who: str, way: str, backbones: Iterable[str] = BACKBONES, kinds: Iterable[str] = SHORTCUTS
) -> list[tuple]:
    """A claim for each backbone and kind of shortcut, as arguments of `Claim`."""
    rows = []
    for run in backbones:
        for kind in kinds:
            text = f"{who}, {BACKBONES[run]}: {FLIPPED} ({SHORTCUTS[kind]})"
            rows.append((number, text, BARS[run], f"{way}_{run}_{kind} auc_flipped"))
    return rows


def of_guidance() -> list[tuple]:
    """Claims 1 and 2 on drawn X-rays: SPAN against DINO with both losses, and against no training."""
    dino = "long_dino"
    span, early = "long_span attention_mAP", "phantom_span attention_mAP"  # early: 9 epochs, the default
    raw, linear, knn = "long_published", "long_span linear_mAUC", "long_span knn_mAUC"
    later = f"DINO (published loss), then 9 epochs of SPAN: linear mAUC minus {PUBLISHED}"
    at_pixels = "minus the registered prior's at every pixel"
    return [
        (1, f"{EQUAL}, priors registered (ours): SPAN's mAP minus {BEST}", 58.7, span, dino, "+58.7"),
        (1, f"{EQUAL}, not registered (as published): mAP minus {BEST}", 58.7, f"{raw} attention_mAP", dino),
        (1, f"{EQUAL}: mAP minus that of DINO's heads (published loss)", 58.7, span, "dino_long"),
        (1, f"{EQUAL}: mAP minus that of DINO's averaged heads", 58.7, span, f"{dino} mean_of_heads_mAP"),
        (1, f"SPAN's mAP after 9 epochs minus {BEST} after 60", 58.7, early, dino),
        (1, "60 epochs: mAP minus the unregistered prior's", 15, span, "long_span prior_mAP"),
        (1, f"60 epochs: mAP minus {ON_GRID}", 0, span, "long_span aligned_prior_mAP"),
        (1, f"60 epochs: mAP {at_pixels}", 0, span, "long_span aligned_prior_every_pixel_mAP"),
        (1, f"9 epochs: mAP minus {ON_GRID}", 0, early, "phantom_span aligned_prior_mAP"),
        (1, f"9 epochs: mAP {at_pixels}", 0, early, "phantom_span aligned_prior_every_pixel_mAP"),
        (1, "9 epochs: mAP with one image's masks minus all images'", -1, early, "phantom_masks"),
        (2, f"{EQUAL}: SPAN's linear mAUC minus DINO's", 2.2, linear, dino, "+2.2"),
        (2, f"{EQUAL}: k-NN mAUC minus DINO's", 2.2, knn, dino),
        (2, f"{EQUAL}: SPAN's {UNTRAINED}", 2.2, linear, "untrained"),
        (2, f"{EQUAL}: linear mAUC minus {PUBLISHED}", 2.2, linear, "dino_long"),
        (2, f"{EQUAL}: k-NN mAUC minus {PUBLISHED}", 2.2, knn, "dino_long"),
        (2, f"{EQUAL}: fine-tuned mAUC minus {PUBLISHED}", 2.2, "long_span finetune_mAUC", "dino_long"),
        (2, f"{EQUAL}: mAUC of heads' patches minus {PUBLISHED}", 2.2, "long_span heads_mAUC", "dino_long"),
        (2, f"{EQUAL}, not registered: linear mAUC minus DINO's", 2.2, f"{raw} linear_mAUC", dino),
        (2, later, 2.2, "after_dino linear_mAUC", "dino_long"),
        (2, "SPAN's linear mAUC after 9 epochs minus DINO's after 60", 2.2, "phantom_span linear_mAUC", dino),
    ]


def of_real_images() -> list[tuple]:
    """Claims 1 and 2: SPAN against DINO with the same loss, on X-rays, horses and lesions."""
    rows = []
    for steps, long in ((350, ""), (1440, "long_")):
        real, alone = f"Real X-rays, {steps} steps each: SPAN's", f"{long}dino_chest"
        mAP, features = f"{long}span_chest attention_mAP", f"{long}span_chest linear_mAUC"
        rows += [
            (1, f"{real} mAP minus {BEST}", 58.7, mAP, alone),
            (1, f"{real} mAP minus {ON_GRID}", 0, mAP, f"{long}span_chest aligned_prior_mAP"),
            (2, f"{real} linear mAUC minus DINO's", 2.2, features, alone),
            (2, f"{real} k-NN mAUC minus DINO's", 2.2, f"{long}span_chest knn_mAUC", alone),
            (2, f"{real} {UNTRAINED}", 2.2, features, "untrained_chest"),
        ]
    for data in ("horses", "lesions"):
        text, ap = f"{data.title()}, 350 steps each, one mask: SPAN's AP", f"span_{data} attention_mAP"
        rows += [
            (1, f"{text} minus {BEST}", 0, ap, f"dino_{data}"),
            (1, f"{text} minus the unregistered prior's", 0, ap, f"span_{data} prior_mAP"),
            (1, f"{text} minus {ON_GRID}", 0, ap, f"span_{data} aligned_prior_mAP"),
            (1, f"{text} minus its AP if priors are not registered", 0, ap, f"fixed_{data}"),
        ]
    return rows


def of_few_labels_and_plates() -> list[tuple]:
    """Claims 3 and 4: SPAN's features with few labels, and its priors from statistics."""
    rows = []
    for how, name in {"linear": "linear mAUC", "heads": "mAUC of each head's patches"}.items():
        for n in (5, 10, 1):
            text = f"{EQUAL}, {n} % of labels: SPAN's {name} minus {PUBLISHED}"
            rows.append((3, text, 0, f"long_span {how}_mAUC_{n}_percent", "dino_long"))
    plates = f"Plates, priors from statistics, {EQUAL}: SPAN's"
    for figure in ("linear_mAUC", "knn_mAUC", "attention_mAP"):
        name = figure.replace("_", " ").replace("knn", "k-NN")
        for whose, other in {"DINO's": "plates_dino", "an untrained encoder's": "untrained_plates"}.items():
            rows.append((4, f"{plates} {name} minus {whose}", 0, f"plates_span {figure}", other))
    for where, prior in {"on the same grid": "prior_mAP", "at every pixel": "prior_every_pixel_mAP"}.items():
        text = f"{plates} attention mAP minus the best prior's {where}"
        rows.append((4, text, 0, "plates_span attention_mAP", f"untrained_plates {prior}"))
    return rows


def of_isnet() -> list[tuple]:
    """Claims 5 and 8: ISNet with true masks, and with those of one image."""
    rows = on_shortcuts(5, "ISNet with swapping", "blind")
    for run, backbone in BACKBONES.items():
        at_c = f"{backbone}, third hospital: AUC minus that of"
        for way, name in AT_HOSPITALS.items():
            for isnet, who in {"blind": "ISNet with swapping", "published": "ISNet as published"}.items():
                if isnet != way and not (run == "vit" and "published" in (isnet, way)):  # it is for ResNets
                    auc, other = f"{isnet}_{run}_hospitals auc_hospital_C", f"{way}_{run}_hospitals"
                    rows.append((5, f"{who}, {at_c} {name}", 1, auc, other))
        text = f"ISNet with swapping, {at_c} {AT_HOSPITALS['pipeline']}".replace("AUC", "accuracy")
        accuracy, other = f"blind_{run}_hospitals accuracy_hospital_C", f"pipeline_{run}_hospitals"
        rows.append((5, text, 0, accuracy, other))
    rows += on_shortcuts(5, "ISNet alone (no swapping)", "alone")
    rows += on_shortcuts(5, "ISNet as published", "published", ["resnet"])
    rows += on_shortcuts(8, "ISNet with swapping, one mask, registered", "blind_close")
    for number, way, masks in ((5, "", ""), (8, "_close", ", one mask, registered")):
        rows += on_shortcuts(number, f"Swapping alone{masks}", f"swap{way}")
        for (run, backbone), (kind, shortcut) in product(BACKBONES.items(), SHORTCUTS.items()):
            who = f"ISNet with swapping{masks}, {backbone}"
            text = f"{who}: {FLIPPED} ({shortcut}), minus that of swapping alone"
            isnet, swapping = f"blind{way}_{run}_{kind} auc_flipped", f"swap{way}_{run}_{kind}"
            rows.append((number, text, 0, isnet, swapping))
    attention = "ISNet with swapping, one mask, SPAN's attention"
    rows += on_shortcuts(8, attention, "blind_attention", ["resnet"], ["corner", "tint"])
    of_hearts = {"one": "one mask, of an enlarged heart", "two": "two masks, one of each class"}
    for masks, who in of_hearts.items():
        text = f"ISNet with swapping, {who}, registered, ResNet: AUC with a tint flipped (hearts)"
        rows.append((8, text, 95, f"hearts_blind_{masks} auc_same"))
    real, unmarked = "Real X-rays, ISNet with swapping", "plain_resnet_chest auc_same"
    flipped = "ResNet: AUC with an L flipped, minus a plain one's without any L"
    marker, hospitals = "resnet_chest_marker auc_same", "resnet_chest_hospitals auc_hospitals_flipped"
    return rows + [
        (5, f"{real}, {flipped}", -5, f"blind_{marker}", unmarked),
        (5, f"{real}, ResNet: AUC with two hospitals flipped", 70, f"blind_{hospitals}"),
        (8, f"{real}, one mask, registered, {flipped}", -5, f"blind_close_{marker}", unmarked),
    ]


def of_relations_and_poolings() -> list[tuple]:
    """Claims 6 and 7: RelViT and SimPool."""
    rows = []
    for n in (250, 1000):
        alone, auc, who = f"scratch_phantom{n}", f"phantom{n} auc_same", f"{n} images"
        relvit, tuned = f"{who}: mAUC of (RelViT, then labels) minus", f"tuned_relvit_{auc}"
        joint = f"{who}: mAUC of relations and labels together, patches"
        rows += [
            (6, f"{relvit} labels alone for as many steps", 0, tuned, alone),
            (6, f"{relvit} (DINO, then labels)", 0, tuned, f"tuned_dino_phantom{n}"),
        ]
        if n == 250:
            half = f"{relvit} labels alone for half the steps", 0, tuned, f"half_phantom{n}"
            ordered = f"{joint} in order, minus labels alone", 0, f"ordered_{auc}", alone
            shuffled = f"{joint} shuffled, minus labels alone", 0, f"joint_{auc}", alone
            rows += [(6, *half), (6, *ordered), (6, *shuffled)]
    vit, net, ap, cam = "object_vit", "object_resnet", "mean_of_heads_AP", "class_activation_AP"
    accuracy, minus_cam = "accuracy_same", "AP on objects minus that of a class activation map"
    heads = "AP on objects minus that of CLS's averaged heads"
    rows += [
        (7, f"SimPool with labels, ViT: {heads}", 0, f"{vit}_simpool {ap}", f"{vit}_cls"),
        (7, f"SimPool with four heads, ViT: {heads}", 0, f"{vit}_heads {ap}", f"{vit}_cls"),
        (7, f"SimPool, ViT: {minus_cam}", 0, f"{vit}_simpool {ap}", f"{vit}_gap {cam}"),
        (7, "SimPool, ViT: accuracy minus that of CLS", -1, f"{vit}_simpool {accuracy}", f"{vit}_cls"),
        (7, f"SimPool with labels, ResNet: {minus_cam}", 0, f"{net}_simpool {ap}", f"{net}_gap {cam}"),
        (7, "SimPool, ResNet: accuracy minus mean pooling's", -1, f"{net}_simpool {accuracy}", f"{net}_gap"),
    ]
    return rows


def claims() -> list[Claim]:
    """All claims, in the order of their numbers."""
    rows = of_guidance() + of_real_images() + of_few_labels_and_plates()
    rows += of_isnet() + of_relations_and_poolings()
    return sorted((Claim(*row) for row in rows), key=lambda claim: claim.number)
