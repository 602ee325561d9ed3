"""Published weights in and out: DINO, DeiT, timm, DINOv2, SimPool ... become our ViT, and ours are exported.

A state dict is recognised by its keys, inside any holder (teacher, student, model, state_dict) and with any
prefix (module., backbone. ...). Differences from `vit.py` are folded into weights; features stay the same:

    LayerScale x + gamma f(x)             gamma is multiplied into the last matrix of f
    ImageNet's (x - m) / s                goes into the patch embedding; assumed for all colour weights
    grey images                           the kernels of the three channels are summed
    registers, distillation token         become `registers`, with the token's position added
    no position for CLS, another size     a zero is added; positions are resized, as `vit.resized` does

Heads are left out. Other operations (SwiGLU, normalised queries, rotary positions) are refused by their keys.
"""

import argparse
import math
import pickle
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from simpool import SimPool
from vit import ViT, resized

HOLDERS = ["teacher", "student", "model", "state_dict", "model_state_dict"]
FIRST, BIAS = "patch_embed.proj.weight", "patch_embed.proj.bias"
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # attention heads by width, in all releases named here
DROPPED = "head head_dist heads fc classifier pre_logits mask_token projector predictor pool".split()
LAYERS = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]  # of a block
SIMPOOL = [f"pool.{name}" for name in ("norm_patches.weight", "norm_patches.bias", "wq.weight", "wk.weight")]
MEAN, DEVIATION = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]  # (3, 1, 1)


def reason(error: Exception) -> str:
    """Why a file cannot be read, in a few words; names code that it would run."""
    text = " ".join(str(error).split())
    if isinstance(error, pickle.UnpicklingError):  # torch's own message advises to load it unsafely
        code = re.search(r"nsupported (?:global: )?GLOBAL (\S+)", text)
        return f"it holds {code[1]}, which might run code" if code else "it is not a file of tensors"
    return f"{type(error).__name__}: {text[:80]}"


def read_weights(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """A ViT's weights (a DINO checkpoint's teacher) under the names of `vit.ViT`, and what was left out.

    No code in the file is run. Raises ValueError for a file that cannot be read or holds no such ViT.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # an optional package

            found = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # DINO saves its settings as one
                found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged and foreign files make the unpickler fail in many ways
        raise ValueError(f"{path} can't be read as weights, a dict of tensors: {reason(error)}") from None
    found = found if isinstance(found, dict) else {}
    if "history" in found:
        raise ValueError(f"{path} belongs to a run of train.py: name its folder, {path.parent}")
    found = next((found[holder] for holder in HOLDERS if isinstance(found.get(holder), dict)), found)
    found = {str(k): v for k, v in found.items()}
    prefix = next((k.removesuffix(FIRST) for k in found if k.endswith(FIRST)), "")
    weights = {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}
    try:
        known, left = translated({k: v.float() for k, v in weights.items() if isinstance(v, Tensor)})
    except Exception as error:  # a foreign file may have tensors of any number and shape
        why = f"it lacks {error.args[0]}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"{path} holds no ViT that is known here: {why}") from None
    if damaged := [k for k, v in known.items() if not v.isfinite().all()]:
        raise ValueError(f"{path}: {damaged[0]} is not finite; take another checkpoint")
    others = {k.removeprefix("module.").split(".")[0] for k in found if not k.startswith(prefix)}
    return known, sorted({*left, *others})


def translated(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Published names and parts as ours, and what is left out. Raises ValueError or KeyError."""
    constants = ("simpool.beta", "simpool.gamma", "simpool.eps")  # the norm cancels beta, ours sets gamma
    names = {k: k.replace("simpool.", "pool.").replace("register_tokens", "reg_token") for k in weights}
    w = {name: weights[k] for k, name in names.items() if k not in constants}
    if "dist_token" in w:
        w["reg_token"] = w.pop("dist_token") + w["pos_embed"][:, 1:2]
        w["pos_embed"] = torch.cat([w["pos_embed"][:, :1], w["pos_embed"][:, 2:]], dim=1)
    if "cls_token" in w and math.isqrt(w["pos_embed"].shape[1]) ** 2 == w["pos_embed"].shape[1]:
        w["pos_embed"] = F.pad(w["pos_embed"], (0, 0, 1, 0))  # a zero for CLS
    known = [FIRST, BIAS, "pos_embed", "norm.weight", "norm.bias"]
    known += [k for k in ("cls_token", "reg_token", *SIMPOOL) if k in w]
    for i in range(sizes(w)["depth"]):
        block = f"blocks.{i}"
        for scale, last in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
            gamma = w.pop(f"{block}.{scale}.gamma", torch.ones(()))
            w[f"{block}.{last}.weight"] = w[f"{block}.{last}.weight"] * gamma.reshape(-1, 1)
            w[f"{block}.{last}.bias"] = w[f"{block}.{last}.bias"] * gamma
        w.setdefault(f"{block}.attn.qkv.bias", torch.zeros(len(w[f"{block}.attn.qkv.weight"])))
        known += [f"{block}.{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias")]
    strange = [k for k in w if k not in known and k.split(".")[0] not in DROPPED]
    missing = [k for k in known if k not in w]
    if strange or missing:
        raise ValueError(f"it {'has' if strange else 'lacks'} {', '.join((strange or missing)[:4])}")
    places = w["pos_embed"].shape[1] - ("cls_token" in w)
    if w["pos_embed"].dim() != 3 or math.isqrt(places) ** 2 != places:
        raise ValueError(f"its {places} positions are not a square grid of patches")
    return {k: w[k] for k in known}, [k.split(".")[0] for k in w if k not in known]


def sizes(weights: dict[str, Tensor]) -> dict[str, int | str]:
    """The settings of train.py that build a ViT for such weights; num_heads is None for an unknown width."""
    D, _, patch_size, _ = weights[FIRST].shape
    depth = 1 + max(int(k.split(".")[1]) for k in weights if k.startswith("blocks."))
    pool = "cls" if "cls_token" in weights else "simpool" if "pool.wq.weight" in weights else "gap"
    side = math.isqrt(weights["pos_embed"].shape[1] - (pool == "cls"))
    registers = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    found = {"backbone": "vit", "img_size": side * patch_size, "patch_size": patch_size, "embed_dim": D}
    found |= {"depth": depth, "num_heads": HEADS.get(D), "registers": registers}
    return found | {"pool": pool, "pool_heads": 1, "simpool_gamma": 1.25}


def fit(weights: dict[str, Tensor], vit: ViT) -> None:
    """Load weights into a ViT for images (x - 1/2) / (1/4). Raises RuntimeError if they don't fit."""
    w = dict(weights)
    if w[FIRST].shape[1] == 3:
        w[BIAS] = w[BIAS] + ((0.5 - MEAN) / DEVIATION * w[FIRST]).sum(dim=(1, 2, 3))
        w[FIRST] = w[FIRST] * (0.25 / DEVIATION)
        w[FIRST] = w[FIRST].sum(dim=1, keepdim=True) if vit.patch_embed.proj.in_channels == 1 else w[FIRST]
    side = math.isqrt(w["pos_embed"].shape[1] - ("cls_token" in w))
    w["pos_embed"] = resized(w["pos_embed"], (side, side), vit.native_grid)
    vit.load_state_dict(w)


def exported(vit: ViT) -> dict[str, Tensor]:
    """A ViT as a plain state dict, which timm's or DINO's code loads with strict=True.

    Colour images must then be normalised by ImageNet's mean and deviation, grey ones as (x - 1/2) / (1/4).
    For R registers, timm needs `reg_tokens=R, no_embed_class=True`; SimPool's code needs its `simpool.beta`.
    Raises ValueError for a pooling that others cannot build from a file.
    """
    pool, R = vit.pool, vit.registers
    if pool and not (isinstance(pool, SimPool) and (pool.num_heads, pool.gamma, R) == (1, 1.25, 0)):
        raise ValueError("--export: the ViT must have CLS, or SimPool with 1 head, gamma 1.25, no registers")
    w = {k.replace("pool.", "simpool."): v.detach().cpu().clone() for k, v in vit.state_dict().items()}
    if w[FIRST].shape[1] == 3:
        w[FIRST] = w[FIRST] / (0.25 / DEVIATION)
        w[BIAS] = w[BIAS] - ((0.5 - MEAN) / DEVIATION * w[FIRST]).sum(dim=(1, 2, 3))
    if vit.registers:  # timm's CLS token has no position of its own then
        w["cls_token"], w["pos_embed"] = w["cls_token"] + w["pos_embed"][:, :1], w["pos_embed"][:, 1:]
    return w
