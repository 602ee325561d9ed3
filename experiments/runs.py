"""Which runs show what: the claims and their bars, and the rows of the README's tables. Only words and names.

`reproduce.sh` makes the runs, each named EXPERIMENT-SEED, and `tables.py` fills the README from them. A
claim is a line of CLAIMS: its number, what is claimed, the paper's figure, the bar here, EXPERIMENT FIGURE,
and what is taken off: nothing, an experiment (. is the same) and, if it is another one, its figure; or "A
from B": then it is the share of the way from B to A. Next to read: `tables.py`.
"""

ABLATIONS = {
    "span": "default: KL, last block, global crops, bent alignment, blur 2.5 %",
    "affine_alignment": "affine alignment only",
    "no_alignment": "no alignment",
    "no_following": "priors don't follow the crops",
    "mse": "MSE in place of KL",
    "dice": "Dice in place of KL",
    "layer_before": "second-last block guided",
    "local_crops": "2 local crops besides",
    "no_blur": "prior not blurred",
}

SHORTCUT = {
    "unmarked": "no marker in training",
    "plain": "plain",
    "multitask": "multi-task",
    "gated": "attention-gated",
    "gain": "GAIN",
    "rrr": "right for the right reasons",
    "pipeline": "segmenter, then classifier",
    "swap": "backgrounds swapped",
    "isnet": "**ISNet, true masks**",
    "isnet_prior": "**ISNet, one mask, registered**",
    "isnet_attention": "**ISNet, one mask, SPAN's attention**",
    "pipeline_attention": "segmenter, then classifier, the same mask",
    "swap_attention": "backgrounds swapped, the same mask",
}
KINDS = {
    "anywhere": "an L anywhere beside the regions",
    "tint": "a tint of the background",
    "border": "a frame",
}
AGAINST = {  # ... and what is trained with them
    "plain": "ResNet, plain",
    "isnet": "**ResNet, ISNet**",
    "pipeline": "ResNet, segmenter, then classifier",
    "swap": "ResNet, backgrounds swapped",
    "vit_plain": "ViT, plain",
    "vit_isnet": "**ViT, ISNet**",
}
FAILURES = {
    "isnet_resnet": "ResNet, as it should be",
    "plain_resnet": "no ISNet at all",
    "pixels_only": "relevance of the image alone, no inner layers",
    "epsilon_rule": "epsilon rule in place of gamma = 3",
    "one_logit": "the label's logit explained, not log-odds",
    "mean_pooling": "mean over the background, not ranked",
    "large_e": "E = 1, as published, in place of 0.1",
    "constant_weight": "weight of 3 to the end",
    "isnet_vit": "ViT, as it should be",
    "vit_unguided": "relevance alone, attention unguided",
    "vit_pixels_only": "relevance of the image alone",
}
POOLINGS = {  # what was learned: {experiment: (how it was pooled, what to compare it with)}
    "enlarged heart, with labels": {
        "unmarked_vit": ("ViT, CLS", None),
        "vit_gap_labels": ("ViT, mean", "unmarked_vit"),
        "vit_simpool_labels": ("**ViT, SimPool**", "unmarked_vit"),
        "unmarked_resnet": ("ResNet, mean", None),
        "resnet_simpool_labels": ("**ResNet, SimPool**", "unmarked_resnet"),
    },
    "without labels, DINO": {
        "vit_cls_dino": ("ViT, CLS", None),
        "vit_gap_dino": ("ViT, mean", "vit_cls_dino"),
        "vit_simpool_dino": ("**ViT, SimPool**", "vit_cls_dino"),
        "vit_simpool_span": ("**ViT, SimPool, guided by SPAN**", "vit_cls_dino"),
        "resnet_gap_dino": ("ResNet, mean", None),
        "resnet_simpool_dino": ("**ResNet, SimPool**", "resnet_gap_dino"),
    },
}
FEW_LABELS = {
    "scratch": "labels alone",
    "joint": "labels and relations together",
    "tuned_relvit": "RelViT, then labels",
    "tuned_dino": "DINO, then labels",
    "half": "labels alone, half the steps",
    "tuned_relvit_long": "RelViT 5 times as long, then labels",
}
COSTS = {  # tables of benchmark.py's ratios: what the rows are, and {the ratio: the head of its column}
    "floors": (
        "training step, over",
        {
            "training step / its operations' floor": "its operations as large matrix products",
            "training step / its bytes' floor": "its bytes as large copies",
        },
    ),
    "exposure": (
        "attention layer, over the same without its row",
        {
            "attention layer with its row / without": "with its row",
            "attention layer written out / without its row": "written out",
        },
    ),
    "isnet_costs": (
        "ISNet over plain",
        {
            "training step, ISNet / plain": "training step",
            "memory kept for the backward pass, ISNet / plain": "memory kept for the backward pass",
        },
    ),
}
CLAIMS = """
1 | SPAN's attention mAP, above DINO's best heads | +58.7 | 58.7 | span attention_mAP | dino
1 | ... above DINO's after longer training | | 58.7 | span attention_mAP | dino_long
1 | ... above the prior as it is | | 15 | span attention_mAP | . prior_mAP
1 | ... above the aligned prior, on the same grid | | 0 | span attention_mAP | . aligned_prior_mAP
1 | ... above it at every pixel | | 0 | span attention_mAP | . aligned_prior_every_pixel_mAP
1 | ... to that with all images' masks | | -1 | span attention_mAP | masks
2 | SPAN transfers: linear layer's mAUC, above DINO's | +2.2 | 2.2 | span linear_mAUC | dino
2 | ... fine-tuned | | 2.2 | span finetune_mAUC | dino
2 | ... each head's patches (our readout) | | 2.2 | span heads_mAUC | dino
3 | With 1 % of labels: linear layer, above DINO's | | 0 | span linear_mAUC_1_percent | dino
3 | ... 5 % | | 0 | span linear_mAUC_5_percent | dino
3 | ... 10 % | | 0 | span linear_mAUC_10_percent | dino
3 | With 1 % of labels: each head's patches | | 0 | span heads_mAUC_1_percent | dino
3 | ... 5 % | | 0 | span heads_mAUC_5_percent | dino
3 | ... 10 % | | 0 | span heads_mAUC_10_percent | dino
4 | Priors from statistics, parts: linear layer, above DINO's | | 0 | parts_span linear_mAUC | parts_dino
4 | ... each head's patches | | 0 | parts_span heads_mAUC | parts_dino
4 | ... attention mAP | | 0 | parts_span attention_mAP | parts_dino
5 | ISNet, ResNet: AUC with the marker flipped | | 85 | isnet_resnet flipped |
5 | ... to the marker as in training | | -5 | isnet_resnet flipped | . same
5 | ... to training without marker | | -5 | isnet_resnet flipped | unmarked_resnet same
5 | ISNet, ViT: AUC with the marker flipped | | 85 | isnet_vit flipped |
5 | ... to the marker as in training | | -5 | isnet_vit flipped | . same
5 | ... to training without marker | | -5 | isnet_vit flipped | unmarked_vit same
6 | RelViT, then 50 labels a class: to alone | | 0 | tuned_relvit_symbols50 accuracy | scratch_symbols50
6 | ... 5 times as long, same label steps | | 0 | tuned_relvit_long_symbols50 accuracy | half_symbols50
6 | ... relations and labels together | | 0 | joint_symbols50 accuracy | scratch_symbols50
6 | RelViT, then 500 labels a class: to alone | | 0 | tuned_relvit_symbols500 accuracy | scratch_symbols500
6 | ... 5 times as long, same label steps | | 0 | tuned_relvit_long_symbols500 accuracy | half_symbols500
6 | ... relations and labels together | | 0 | joint_symbols500 accuracy | scratch_symbols500
7 | SimPool on the heart, labels, ViT: AP, to CLS | | 0 | vit_simpool_labels attention_AP_heart | unmarked_vit
7 | ... ResNet, to the mean | | 0 | resnet_simpool_labels attention_AP_heart | unmarked_resnet
7 | ... without labels (DINO), ViT, to CLS | | 0 | vit_simpool_dino attention_AP_heart | vit_cls_dino
7 | ... ResNet, to the mean | | 0 | resnet_simpool_dino attention_AP_heart | resnet_gap_dino
7 | ... linear layer, ViT, to CLS | | 0 | vit_simpool_dino linear_mAUC | vit_cls_dino
8 | One mask, registered, ResNet: flipped, to as in training | | -5 | isnet_prior_resnet flipped | . same
8 | ... share of true masks' gain, % | | 80 | isnet_prior_resnet flipped | isnet_resnet from plain_resnet
8 | ... ViT: flipped, to as in training | | -5 | isnet_prior_vit flipped | . same
8 | ... share of true masks' gain, % | | 80 | isnet_prior_vit flipped | isnet_vit from plain_vit
8 | One mask, attention, ResNet: flipped, to as in training | | -5 | isnet_attention_resnet flipped | . same
8 | ... share of true masks' gain, % | | 80 | isnet_attention_resnet flipped | isnet_resnet from plain_resnet
8 | ... ViT: flipped, to as in training | | -5 | isnet_attention_vit flipped | . same
8 | ... share of true masks' gain, % | | 80 | isnet_attention_vit flipped | isnet_vit from plain_vit
"""
TRANSFER = {  # title: (experiment, what to compare it with)
    "DINO": ("dino", None),
    "**SPAN**": ("span", "dino"),
}
PLATES = {"DINO": ("parts_dino", None), "**SPAN, priors from statistics**": ("parts_span", "parts_dino")}
