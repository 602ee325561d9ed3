"""The claims: what must reach which bar in every seed. README.md has the first of each number."""

from typing import NamedTuple

BACKBONES = {"resnet": "ResNet", "vit": "ViT"}
KINDS = {"anywhere": "an L anywhere", "tint": "a tint", "border": "a frame"}  # of shortcuts
SHORTCUTS = {"corner": "an L in a corner", **KINDS}


class Claim(NamedTuple):
    """A figure in percent, its difference to another, or its percentage of the way from `minus` to `end`."""

    number: int
    text: str
    bar: float
    figure: str  # "EXPERIMENT FIGURE"
    minus: str = ""  # the same, or "EXPERIMENT" if the figure is the same
    end: str = ""  # "EXPERIMENT"
    paper: str = ""  # the paper's figure, where it has one


def on_all_shortcuts(number: int, who: str, way: str) -> list[tuple]:
    """A claim for each backbone and shortcut, as arguments of `Claim`."""
    rows = []
    for run, bar in {"resnet": 95, "vit": 92}.items():
        for kind, shortcut in SHORTCUTS.items():
            text = f"{who}, {BACKBONES[run]}: AUC with {shortcut} flipped"
            rows.append((number, text, bar, f"{way}_{run}_{kind} auc_flipped"))
    return rows


def of_guidance() -> list[tuple]:
    """Claims 1 to 4: SPAN against DINO."""
    best, equal, span = "DINO's heads (best on validation)", "60 epochs each", "long_span attention_mAP"
    dino, early = "dino_long", "phantom_span attention_mAP"  # DINO with its own loss; SPAN by default
    rows: list[tuple] = [
        (1, f"{equal}: SPAN's attention mAP, above {best}", 58.7, span, dino, "", "+58.7"),
        (1, f"{equal}, priors not registered", 58.7, "long_published attention_mAP", dino),
        (1, f"{equal}, to the mean of DINO's heads", 58.7, span, f"{dino} mean_of_heads_mAP"),
        (1, "SPAN after 9 epochs, above DINO after 60", 58.7, early, dino),
        (1, "60 epochs: above the prior as it is", 15, span, "long_span prior_mAP"),
        (1, "60 epochs: above the registered prior, same grid", 0, span, "long_span aligned_prior_mAP"),
        (1, "60 epochs: above that prior at each pixel", 0, span, "long_span aligned_prior_every_pixel_mAP"),
        (1, "9 epochs: above the registered prior, same grid", 0, early, "phantom_span aligned_prior_mAP"),
        (1, "15 epochs: to that with all images' masks", -1, "span attention_mAP", "masks"),
        (2, f"{equal}: SPAN's linear mAUC, above DINO's", 2.2, "long_span linear_mAUC", dino, "", "+2.2"),
        (2, f"{equal}: k-NN's mAUC", 2.2, "long_span knn_mAUC", dino),
        (2, f"{equal}: fine-tuned", 2.2, "long_span finetune_mAUC", dino),
        (2, f"{equal}: each head's patches (our readout)", 2.2, "long_span heads_mAUC", dino),
        (2, f"{equal}, priors not registered: linear mAUC", 2.2, "long_published linear_mAUC", dino),
        (2, f"{equal}, a tenth of SPAN's weight: linear mAUC", 2.2, "long_light linear_mAUC", dino),
        (2, "SPAN for 15 epochs after DINO's 60: linear mAUC", 2.2, "after_dino linear_mAUC", dino),
        (2, "SPAN after 9 epochs, above DINO after 60", 2.2, "phantom_span linear_mAUC", dino),
    ]
    for how, name in {"linear": "linear layer", "heads": "each head's patches"}.items():
        for n in (5, 10, 1):
            text = f"{equal}, {n} % of labels: {name}, above DINO's"
            rows.append((3, text, 0, f"long_span {how}_mAUC_{n}_percent", dino))
    for figure, name in {"linear_mAUC": "linear mAUC", "knn_mAUC": "k-NN's mAUC"}.items():
        text = f"Priors from statistics, {equal}: {name}"
        rows.append((4, text, 0, f"plates_span {figure}", "plates_dino"))
    rows.append((4, f"{equal}: attention mAP", 0, "plates_span attention_mAP", "plates_dino"))
    return rows


def of_isnet() -> list[tuple]:
    """Claims 5 and 8: ISNet with true masks, and with those of one image."""
    rows = on_all_shortcuts(5, "ISNet by default", "blind")
    hospital = "blind_resnet_hospitals auc_hospital_C", "pipeline_resnet_hospitals"
    rows.append((5, "ResNet, at a third hospital: above a segmenter, then a classifier", 1, *hospital))
    for run, name in BACKBONES.items():
        flipped = f"isnet_{run} auc_flipped"
        rows += [
            (5, f"ISNet alone, {name}: AUC with the marker flipped", 85, flipped),
            (5, f"{name}: to training without marker", -5, flipped, f"unmarked_{run} auc_same"),
        ]
        for kind, shortcut in KINDS.items():
            experiment = f"isnet_{kind}" if run == "resnet" else f"vit_isnet_{kind}"
            rows.append((5, f"alone, {name}: {shortcut} flipped", 85, f"{experiment} auc_flipped"))
    rows += on_all_shortcuts(8, "One mask, registered, default", "blind_one")
    close = on_all_shortcuts(8, "One mask, registered, --swap-margin 0.0125", "blind_close")
    rows += [row for row in close if "_resnet_" in row[3]]
    flush = "One mask, registered, --swap-margin 0, ResNet: AUC with an L in a corner flipped"
    rows.append((8, flush, 95, "flush_one_resnet_corner auc_flipped"))
    rows += on_all_shortcuts(8, "One mask, SPAN's attention, default", "blind_attention")
    for masks, made in {"prior": "registered", "attention": "attention"}.items():
        for run, name in BACKBONES.items():
            one, who = f"isnet_{masks}_{run}", f"{made}, {name}"
            flipped = f"{one} auc_flipped"
            rows += [
                (8, f"ISNet alone, one mask, {who}: AUC with the marker flipped", 85, flipped),
                (8, f"{who}: share of true masks' gain, %", 80, flipped, f"plain_{run}", f"isnet_{run}"),
            ]
    return rows


def of_relations_and_poolings() -> list[tuple]:
    """Claims 6 and 7: RelViT and SimPool."""
    rows = []
    for n in (250, 1000):
        alone, auc, who = f"scratch_phantom{n}", f"phantom{n} auc_same", f"{n} images"
        relvit = f"RelViT, then labels, {who}: mAUC, to labels alone for as many steps"
        rows += [
            (6, relvit, 0, f"tuned_relvit_{auc}", alone),
            (6, f"{who}: to labels alone, half the steps", 0, f"tuned_relvit_{auc}", f"half_phantom{n}"),
            (6, f"{who}: to DINO, then labels", 0, f"tuned_relvit_{auc}", f"tuned_dino_phantom{n}"),
            (6, f"{who}: relations and labels together, patches in order", 0, f"ordered_{auc}", alone),
            (6, f"{who}: relations and labels together, shuffled", 0, f"joint_{auc}", alone),
        ]
    vit, resnet, ap, cam = "object_vit", "object_resnet", "mean_of_heads_AP", "class_activation_AP"
    accuracy, above_cam = "accuracy_same", "AP on objects, above a class activation map"
    rows += [
        (7, "SimPool, labels, ViT: AP on objects, above CLS's heads", 0, f"{vit}_simpool {ap}", f"{vit}_cls"),
        (7, "ViT, four heads each: the same", 0, f"{vit}_heads {ap}", f"{vit}_cls"),
        (7, f"ViT: {above_cam}", 0, f"{vit}_simpool {ap}", f"{vit}_gap {cam}"),
        (7, "ViT: accuracy, to CLS", -1, f"{vit}_simpool {accuracy}", f"{vit}_cls"),
        (7, f"SimPool, labels, ResNet: {above_cam}", 0, f"{resnet}_simpool {ap}", f"{resnet}_gap {cam}"),
        (7, "ResNet: accuracy, to the mean", -1, f"{resnet}_simpool {accuracy}", f"{resnet}_gap"),
    ]
    return rows


def claims() -> list[Claim]:
    """All claims, in the order of their numbers."""
    rows = of_guidance() + of_isnet() + of_relations_and_poolings()
    return sorted((Claim(*row) for row in rows), key=lambda claim: claim.number)
