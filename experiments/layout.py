"""The rows of all tables of runs: which figures of which experiments they show."""

from typing import NamedTuple

from experiments.claims import BACKBONES, SHORTCUTS
from experiments.commands import RESNET_CHANGES, SPAN_CHANGES, VIT_CHANGES

OBJECTS = {  # title: experiment, and the map that is measured
    "ViT, CLS: mean of its heads": ("vit_cls", "mean_of_heads"),
    "ViT, CLS: best head, chosen by masks": ("vit_cls", "best_head"),
    "ViT, mean: class activation map": ("vit_gap", "class_activation"),
    "**ViT, SimPool**": ("vit_simpool", "mean_of_heads"),
    "ViT, SimPool with four heads: their mean": ("vit_heads", "mean_of_heads"),
    "ResNet, mean: class activation map": ("resnet_gap", "class_activation"),
    "**ResNet, SimPool**": ("resnet_simpool", "mean_of_heads"),
    "untrained ViT, SimPool": ("vit_simpool", "untrained"),
    "untrained ResNet, SimPool": ("resnet_simpool", "untrained"),
    "a Gaussian in the middle of the image": ("vit_simpool", "middle"),
}
FEW_LABELS = {
    "scratch": "labels alone", "half": "labels alone, half the steps",
    "joint": "labels and relations together, patches shuffled",
    "ordered": "labels and relations together, patches in order",
    "tuned_relvit": "RelViT, then labels", "tuned_dino": "DINO, then labels",
    "pre_relvit": "RelViT itself",
}  # fmt: skip
LOCALISATION = {  # title: experiment, and what is measured
    "prior": ("long_span", "prior"),
    "registered prior": ("long_span", "aligned_prior"),
    "registered prior, at every pixel": ("long_span", "aligned_prior_every_pixel"),
    "**60 epochs: attention, one reference image**": ("long_span", "attention"),
    "60 epochs: attention, prior not registered (as published)": ("long_published", "attention"),
    "60 epochs: DINO, best head chosen on validation images": ("long_dino", "attention"),
    "60 epochs: DINO, published loss, best head": ("dino_long", "attention"),
    "60 epochs: DINO, mean of all heads": ("long_dino", "mean_of_heads"),
    "untrained encoder, best head": ("untrained", "attention"),
    "9 epochs, the default: attention, one reference image": ("phantom_span", "attention"),
    "9 epochs, the default: attention, all masks": ("phantom_masks", "attention"),
    "9 epochs, the default: SimPool's attention": ("simpool_span", "attention"),
}
FEW_MASKS = {  # of digits; some also of leaves and hearts
    "plain": "plain",
    "swap_one": "1 mask: backgrounds swapped, masks registered, twice the margin",
    "blind_one": "**1 mask: ISNet with swapping (default), masks registered**",
    "blind_attention": "1 mask: default, masks of SPAN's attention",
    "blind_two": "**2 masks, one of each class: default, the others registered**",
    "blind_ten": "10 masks: default, the others registered, twice the margin",
    "blind_all": "all masks: default",
}
WAYS = {  # against backgrounds
    "plain": "plain", "multitask": "multi-task", "gated": "attention-gated", "gain": "GAIN",
    "rrr": "right for the right reasons", "pipeline": "segmenter, then classifier",
    "swap": "backgrounds swapped", "published": "ISNet as published", "alone": "ISNet alone",
    "blind": "**ISNet with swapping (default)**", "tight": "default, `--isnet-margin 0`",
    "blind_close": "**default, one mask, registered**",
    "swap_close": "backgrounds swapped, one mask, registered",
    "blind_attention": "**default, one mask, SPAN's attention**",
}  # fmt: skip
FROM_ONE_MASK = ["blind_close", "swap_close", "blind_attention"]
READOUTS = {"linear": "linear layer", "heads": "each head's patches", "finetune": "fine-tuned"}


class Row(NamedTuple):
    """Figures of one experiment, beside those of a reference."""

    title: str
    experiment: str
    figures: list[str]  # "FIGURE", or "EXPERIMENT FIGURE" of another experiment
    reference: str = ""


Tables = dict[str, tuple[str, list[Row]]]  # {table: header and rows}


def of_guidance() -> Tables:
    """DINO and SPAN: where their heads look, and what their features know."""
    regions = ["AP_left_lung", "AP_right_lung", "AP_heart", "mAP"]
    where = [Row(title, run, [f"{of}_{x}" for x in regions]) for title, (run, of) in LOCALISATION.items()]
    of_features = ["knn_mAUC", "linear_mAUC"]
    equal = [
        Row("untrained encoder", "untrained", of_features),
        Row("DINO, default loss", "long_dino", of_features),
        Row("**SPAN with DINO, default loss**", "long_span", of_features, "long_dino"),
        Row("SPAN with DINO, priors not registered", "long_published", of_features, "long_dino"),
        Row("DINO, published loss", "dino_long", of_features, "long_dino"),
        Row("DINO, published loss, then SPAN for 9 epochs (default)", "after_dino", of_features, "dino_long"),
        Row("plates: untrained encoder", "untrained_plates", of_features),
        Row("plates, DINO's settings: DINO", "plates_dino", of_features),
        Row("plates, DINO's settings: **SPAN, statistics**", "plates_span", of_features, "plates_dino"),
        Row("plates, SPAN's defaults: 9 epochs, batches of 32", "plates_default", of_features),
    ]
    figures = ["attention_mAP", "linear_mAUC"]
    ablation = [Row("none", "phantom_span", figures)]
    ablation += [Row(f"`{flag}`", run, figures, "phantom_span") for run, flag in SPAN_CHANGES.items()]
    parts = "AP_plate", "AP_holes", "AP_defect", "mAP"
    of_parts = {  # title: experiment, what is measured, reference
        "prior on the grid of patches": ("untrained_plates", "prior", ""),
        "prior at every pixel": ("untrained_plates", "prior_every_pixel", ""),
        "untrained encoder": ("untrained_plates", "attention", ""),
        "DINO": ("plates_dino", "attention", ""),
        "**SPAN, priors from statistics**": ("plates_span", "attention", "plates_dino"),
    }
    plates = [Row(k, run, [f"{of}_{x}" for x in parts], to) for k, (run, of, to) in of_parts.items()]
    transfer = []
    for how, readout in READOUTS.items():
        figures = [f"{how}_mAUC{n}" for n in ("_1_percent", "_5_percent", "_10_percent", "_25_percent", "")]
        transfer.append(Row(f"DINO: {readout}", "dino_long", figures))
        transfer.append(Row(f"**SPAN**: {readout}", "long_span", figures, "dino_long"))
    labels = "mean AUC of findings; labels: | 1 % | 5 % | 10 % | 25 % | all"
    return {
        "localisation": ("pixel AP | left lung | right lung | heart | mAP", where),
        "equal_length": ("60 epochs, batches of 64, unless noted | k-NN, mAUC | linear layer, mAUC", equal),
        "ablation": ("added flag | attention mAP | linear layer, mAUC", ablation),
        "transfer": (labels, transfer),
        "parts": ("AP, heads and priors chosen on validation images | plate | holes | defect | mAP", plates),
    }


def of_shortcuts() -> Tables:
    """Classifiers and markers: single changes of ISNet alone, folders with few masks."""
    changes = {"plain_resnet_corner": "ResNet without ISNet", "alone_resnet_corner": "ResNet, ISNet alone"}
    changes |= {run: f"ResNet, ISNet alone `{flag}`" for run, flag in RESNET_CHANGES.items()}
    changes["alone_vit_corner"] = "ViT, ISNet alone"
    changes |= {run: f"ViT, ISNet alone `{flag}`" for run, flag in VIT_CHANGES.items()}
    figures = ["auc_same", "auc_removed", "auc_flipped", "relevance_share_same"]
    failures, masks = [Row(title, run, figures) for run, title in changes.items()], []
    of_few = ["auc_same", "accuracy_same", "relevance_share_same", "mask_dice"]
    for kind in ("digits", "leaves", "hearts"):
        masks += [Row(f"{kind}, {title}", f"{kind}_{run}", of_few) for run, title in FEW_MASKS.items()]
    return {
        "failures": ("AUC | as in training | removed | flipped | relevance in lungs and heart", failures),
        "few_masks": ("marker flipped | AUC | accuracy | relevance in the mask | Dice of masks", masks),
    }


def of_backgrounds() -> Tables:
    """ISNet by default, alone and as published on all shortcuts; all methods at hospitals and on grounds."""
    blind, hospitals, grounds = [], [], []
    exchanged = ("original", "mixed_same", "mixed_rand", "no_foreground", "only_background")
    for backbone, name in BACKBONES.items():
        for kind, words in SHORTCUTS.items():
            figures = ["auc_same", "auc_flipped", "auc_unseen", "relevance_share_same"]
            for way, title in WAYS.items():
                dice = "mask_dice" if way in FROM_ONE_MASK else "no_dice"
                blind.append(Row(f"{words}, {name}: {title}", f"{way}_{backbone}_{kind}", [*figures, dice]))
        for way, title in WAYS.items():
            at = [f"auc_{x}" for x in ("same", "flipped", "hospital_A", "hospital_B", "hospital_C")]
            at += [f"{x}_hospital_C" for x in ("accuracy", "relevance_share", "segmentation_Dice")]
            hospitals.append(Row(f"{name}: {title}", f"{way}_{backbone}_hospitals", at))
            of = [*(f"accuracy_{x}" for x in exchanged), "relevance_share_same"]
            grounds.append(Row(f"{name}: {title}", f"{way}_{backbone}_grounds", of))
    at_each = "AUC | as in training | flipped | at A | at B | at C"
    return {
        "blind": ("AUC | as in training | flipped | unseen kind | relevance inside | Dice of masks", blind),
        "hospitals": (f"{at_each} | accuracy at C | relevance inside, C | segmenter's Dice, C", hospitals),
        "grounds": (f"accuracy | {' | '.join(exchanged).replace('_', ' ')} | relevance inside", grounds),
    }


def of_real_images() -> Tables:
    """Horses, lesions and X-rays: SPAN and DINO; classifiers with a marker or the hospital as a shortcut."""
    maps = ["prior_mAP", "aligned_prior_mAP", "attention_mAP"]
    features, guided = [*maps, "knn_mAUC", "linear_mAUC"], {"chest": [], "horses": [], "lesions": []}
    for data, rows in guided.items():
        figures = features if data == "chest" else maps
        rows.append(Row("untrained encoder", f"untrained_{data}", figures))
        for steps, long in {350: "", 1440: "long_"}.items() if data == "chest" else [(350, "")]:
            span, dino = f"{long}span_{data}", f"{long}dino_{data}"
            rows.append(Row(f"{steps} steps: DINO, best head chosen on validation images", dino, figures))
            rows.append(Row(f"**{steps} steps: SPAN, one reference image**", span, figures, dino))
        rows.append(Row("350 steps: SPAN, prior not registered", f"fixed_{data}", figures, f"dino_{data}"))
    inside, hospitals = ["auc_removed", "relevance_share_same", "mask_dice"], []
    unmarked = ["no_L", "auc_same", *inside[1:]]
    marker = [Row("masks of the lungs as images: plain", "plain_resnet_chest_masks", unmarked)]
    for way, title in WAYS.items():
        marker.append(Row(f"no L in training: {title}", f"{way}_resnet_chest", unmarked))
    for way, title in WAYS.items():
        marker.append(Row(title, f"{way}_resnet_chest_marker", ["auc_same", *inside]))
        at = [f"auc_hospitals_{x}" for x in ("trained", "flipped", "Shenzhen", "Montgomery")]
        hospitals.append(Row(title, f"{way}_resnet_chest_hospitals", [*at, "relevance_share_same"]))
    shown = "span attention, fixed attention, span prior, span aligned_prior, dino attention"
    each = [words.split() for words in f"{shown}, untrained attention".split(", ")]
    titles = {"lesions": "30 skin lesions", "horses": "49 horses", "chest": "lungs in 243 chest X-rays"}
    real = [Row(title, "", [f"{x}_{data} {of}_mAP" for x, of in each]) for data, title in titles.items()]
    of = "**SPAN** | SPAN, not registered (as published) | prior | registered prior"
    columns = "prior | registered prior | attention"
    where = "AUC | as in training | flipped | within Shenzhen | within Montgomery | relevance inside"
    return {
        "real": (f"AP on test images | {of} | DINO's best heads | untrained, best heads", real),
        "horses": (f"AP of horses | {columns}", guided["horses"]),
        "lesions": (f"AP of lesions | {columns}", guided["lesions"]),
        "chest": (f"mAP of lungs, AUC | {columns} | k-NN | linear layer", guided["chest"]),
        "chest_marker": ("AUC | L flipped | no L in the test | relevance inside | Dice of masks", marker),
        "chest_hospitals": (where, hospitals),
    }


def of_objects() -> Tables:
    """SimPool beside CLS and the mean: does its attention outline the object that decides the label?"""
    rows, scores = [], ("AP", "MaxBoxAccV2", "CorLoc")
    for title, (run, of) in OBJECTS.items():
        accuracy = "no_accuracy" if of in ("untrained", "middle") else "accuracy_same"
        rows.append(Row(title, f"object_{run}", [*(f"{of}_{score}" for score in scores), accuracy]))
    return {"objects": (f"objects anywhere | {' | '.join(scores)} | accuracy", rows)}


def of_few_labels() -> Tables:
    """RelViT and DINO beside labels alone, and whether RelViT has learned its relations."""
    rows, figures = [], ["auc_same", "relations_test"]
    for n in (250, 1000):
        for how, title in FEW_LABELS.items():
            alone = "" if how == "scratch" else f"scratch_phantom{n}"
            rows.append(Row(f"{n} images: {title}", f"{how}_phantom{n}", figures, alone))
    return {"few_findings": ("phantoms | mean AUC of findings | accuracy of relations, test images", rows)}


def layout() -> Tables:
    """Header and rows of all tables of runs."""
    synthetic = of_guidance() | of_shortcuts() | of_backgrounds() | of_objects() | of_few_labels()
    return synthetic | of_real_images()
