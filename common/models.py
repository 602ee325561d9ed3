"""Models as the settings describe them: built, started from other weights, loaded from runs."""

from pathlib import Path

import torch
from torch import nn

from common.baselines import AttentionGate, Pipeline, Segmenter
from common.checkpoint import DataSpec, Run, load_run
from common.classify import Classifier
from common.config import Config
from common.data import normalise
from common.weights import fit, read_weights, sizes
from dino import DINO
from relvit import TASKS, RelViT
from resnet import ResNet
from simpool import GAP, SimPool
from vit import ViT, resized


def build_encoder(config: Config, in_chans: int) -> ViT | ResNet:
    """The encoder that the settings describe. Raises ValueError for sizes that don't fit."""
    D, pool = config.embed_dim, None  # None: the ViT's CLS token, the ResNet's mean
    if config.baseline == "gated":
        pool = AttentionGate(D)
    elif config.pool == "simpool":
        pool = SimPool(D, config.simpool_gamma, config.pool_heads)
    elif config.pool == "gap" and config.backbone == "vit":
        pool = GAP()
    if config.backbone == "resnet":
        return ResNet(in_chans, D, pool=pool)
    dimensions = config.img_size, config.patch_size, in_chans, D, config.depth, config.num_heads
    return ViT(*dimensions, drop_path=config.drop_path, pool=pool, registers=config.registers)


def build_classifier(config: Config, encoder: ViT | ResNet, classes: int, in_chans: int) -> nn.Module:
    """A classifier around an encoder, with what a baseline adds to it."""
    model = Classifier(encoder, classes)
    if config.baseline == "multitask":
        model.segmenter = nn.Linear(encoder.embed_dim, 1)
    if config.baseline == "pipeline":
        return Pipeline(model, Segmenter(build_encoder(config, in_chans)))
    return model


def load_model(folder: Path, run: Run) -> nn.Module:
    """The classifier of a run, or its encoder (the student's). Raises ValueError if it does not fit."""
    encoder = build_encoder(run.config, run.spec.channels)
    if run.config.task != "classify":
        return load_part(folder, run, encoder)
    model = build_classifier(run.config, encoder, len(run.spec.classes), run.spec.channels)
    return load_part(folder, run, model, "")


def load_part(folder: Path, run: Run, model: nn.Module, prefix: str | None = None) -> nn.Module:
    """Load a run's weights with a prefix, by default its encoder's (the student's). Positions of a ViT are
    resized to its images. Raises ValueError for weights that do not fit."""
    if prefix is None:
        prefix = "student." if (run.config.task, run.config.ssl) == ("pretrain", "dino") else "encoder."
    weights = {k: v for k, v in run.checkpoint["model"].items() if not k.startswith("relvit.")}
    weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    if isinstance(model, ViT) and "pos_embed" in weights:
        side = run.config.img_size // run.config.patch_size
        weights["pos_embed"] = resized(weights["pos_embed"], (side, side), model.native_grid)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{folder} doesn't fit: {last_line(error)}") from None
    return model


def last_line(error: RuntimeError) -> str:
    """Of load_state_dict's message: a weight of another size, or missing ones."""
    return str(error).splitlines()[-1].strip()[:200]


def start_from(init: Path, encoder: nn.Module) -> nn.Module:
    """Load the encoder of a run, or a file of published weights. Raises ValueError if it does not fit."""
    if not init.is_file():
        return load_part(init, load_run(init), encoder)
    weights, left = read_weights(init)
    try:
        fit(weights, encoder)
    except RuntimeError as error:
        raise ValueError(f"{init} doesn't fit: {last_line(error)}") from None
    found, size = sizes(weights), encoder.native_grid[0] * encoder.patch_size
    if found["num_heads"] not in (None, encoder.num_heads):  # other heads fit, and attend to something else
        print(f"warning: {init}: releases of this width have {found['num_heads']} heads; check --num-heads")
    about = f"{found['embed_dim']} wide, {found['depth']} deep, patches of {found['patch_size']} px"
    resized = f"positions of {found['img_size']} px" + (" resized" if found["img_size"] != size else "")
    without = f"; left out: {', '.join(left)}" if left else ""
    print(f"{init}: a ViT {about}, {encoder.num_heads} heads, {resized}{without}")
    return encoder


def make_encoder(config: Config, channels: int) -> nn.Module:
    """A new encoder, or that of --init. Raises ValueError."""
    encoder = build_encoder(config, channels)
    if config.init and not config.resume:
        start_from(config.init, encoder)
    classifies = config.task == "classify" and config.backbone == "vit"
    if classifies and not (config.init and encoder.pos_embed.any()):
        # With a deviation of 0.02, positions are too weak beside patches, and some classifiers do not learn.
        nn.init.trunc_normal_(encoder.pos_embed, std=0.2)
    return encoder


def build_model(config: Config, spec: DataSpec, encoder: nn.Module, grid: tuple[int, int]) -> nn.Module:
    """What is trained around an encoder: a classifier, RelViT or DINO. grid (h, w): the images' patches."""
    if config.task == "classify":
        model = build_classifier(config, encoder, len(spec.classes), spec.channels)
        if config.relations:
            model.relvit = RelViT(encoder, config.embed_dim, grid, config.relations)
    elif config.ssl == "relvit":
        nn.init.zeros_(encoder.pos_embed)  # RelViT trains without positions, so the saved encoder has none
        cells = (config.mega_patches, config.mega_patches) if config.mega_patches else grid
        model = RelViT(encoder, config.embed_dim, cells, config.relations or TASKS)
    elif config.ssl == "none":
        model = nn.ModuleDict({"encoder": encoder})
    else:
        settings = {name: getattr(config, name) for name in ("center_momentum", "koleo", "max_entropy")}
        model = DINO(encoder, config.embed_dim, config.out_dim, **settings)
    for relvit in (m for m in model.modules() if isinstance(m, RelViT)):
        chance = ", ".join(f"{task} {value:.3g}" for task, value in relvit.chance.items())
        print(f"a constant prediction reaches {chance}")
    if config.compile:
        for module in (model.student, model.teacher) if isinstance(model, DINO) else (model.encoder,):
            module.compile()
    return model


def decayed(model: nn.Module, weight_decay: float) -> list[dict]:
    """The learned parameters in two groups for an optimizer: matrices decay, biases and norms do not."""
    learned = [p for p in model.parameters() if p.requires_grad]
    matrices = {"params": [p for p in learned if p.dim() > 1], "weight_decay": weight_decay}
    return [matrices, {"params": [p for p in learned if p.dim() <= 1], "weight_decay": 0.0}]


def lrp_rule(config: Config) -> dict:
    """The relevance rule of the settings, as arguments of `relevance`."""
    rule = {"epsilon": config.lrp_epsilon, "gamma": config.lrp_gamma, "signed": True}
    pixels = tuple(normalise(torch.tensor([0.0, 1.0])).tolist())
    return rule | ({"input_rule": pixels, "detach_biases": True} if config.preset == "published" else {})
