"""Weights from elsewhere: DINO, DeiT, timm, DINOv2, SimPool ... become our ViT, and ours go out again.

A state dict is known by its keys, whatever holds it (teacher, student, model, state_dict) and stands before
them (module., backbone. ...). What differs from `vit.py` is worked in, so that the features stay the same:

    LayerScale (timm, DINOv2)      x + gamma f(x)        gamma goes into the last matrix of f
    ImageNet's mean and deviation  (x - m) / s           into the patch embedding, from (x - 1/2) / (1/4);
                                                         assumed of all colour weights
    grey images                    three equal channels  their kernels are summed
    registers, distillation token  tokens without place  `registers`, the token with its position added
    no position for CLS            pos_embed of N        a zero before it
    another size of images         N differs             resized bicubically, as `ViT.positions_for` does

Heads are left out. What has other operations inside (SwiGLU, normalised queries, rotary positions) is
refused, and the key that tells is named. Next to read: `probe.py`.
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
from vit import ViT

HOLDERS = ["teacher", "student", "model", "state_dict", "model_state_dict"]
FIRST, BIAS = "patch_embed.proj.weight", "patch_embed.proj.bias"
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # of attention, by width, in all releases named here
DROPPED = "head head_dist heads fc classifier pre_logits mask_token projector predictor pool".split()
LAYERS = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]  # of a block
MEAN, DEVIATION = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def reason(error: Exception) -> str:
    """Why a file can't be read, in short; what would run code is named."""
    text = " ".join(str(error).split())
    if code := re.search(r"nsupported (?:global: )?GLOBAL (\S+)", text):
        return f"it holds {code[1]}, which might run code"
    if isinstance(error, pickle.UnpicklingError):  # torch's own words are advice to open it nevertheless
        return "it is no file of tensors"
    return f"{type(error).__name__}: {text[:80]}"


def read_weights(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """A ViT's weights under the names of `vit.ViT`, and the names of what was left out.

    Of a whole training the teacher's, as DINO's authors use. Nothing in the file is run. Raises ValueError
    for a file that can't be read or holds no such ViT.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # only who has such files needs it

            found = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # DINO's own settings
                found = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise ValueError(f"{path}: to read it, pip install safetensors") from None
    except Exception as error:  # a damaged or foreign file fails in the unpickler in many ways
        wanted = "is it whole? it must be a dict of tensors"
        raise ValueError(f"{path} can't be read as weights: {wanted} ({reason(error)})") from None
    found = found if isinstance(found, dict) else {}
    if "history" in found:
        raise ValueError(f"{path} belongs to a run of train.py: name its folder, {path.parent}")
    found = next((found[holder] for holder in HOLDERS if isinstance(found.get(holder), dict)), found)
    found = {str(k): v for k, v in found.items()}
    before = [k.removesuffix(FIRST) for k in found if k.endswith(FIRST)]
    if not before:
        raise ValueError(f"{path} holds no ViT that is known here: no name in it ends in {FIRST}")
    weights = {k.removeprefix(before[0]): v for k, v in found.items() if k.startswith(before[0])}
    beside = {k.removeprefix("module.").split(".")[0] for k in found if not k.startswith(before[0])}
    try:
        known, left = translated({k: v.float() for k, v in weights.items() if isinstance(v, Tensor)})
        damaged = [k for k, v in known.items() if not v.isfinite().all()]
    except (KeyError, ValueError, IndexError, AttributeError, TypeError, RuntimeError) as error:
        lacks = f"it lacks {error.args[0]}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"{path} holds no ViT that is known here: {lacks}") from None
    if damaged:
        raise ValueError(f"{path}: {damaged[0]} is not finite; take another checkpoint")
    return known, sorted({*left, *beside})


def translated(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The published names and parts as ours; and what is left out. Raises ValueError, or KeyError."""
    w = {
        k.replace("simpool.", "pool.").replace("register_tokens", "reg_token"): v for k, v in weights.items()
    }
    for constant in (
        "pool.beta",
        "pool.gamma",
        "pool.eps",
    ):  # the norm takes the first out, we set the second
        w.pop(constant, None)
    if "dist_token" in w:
        w["reg_token"] = w.pop("dist_token") + w["pos_embed"][:, 1:2]
        w["pos_embed"] = torch.cat([w["pos_embed"][:, :1], w["pos_embed"][:, 2:]], dim=1)
    if "cls_token" in w and math.isqrt(w["pos_embed"].shape[1]) ** 2 == w["pos_embed"].shape[1]:
        w["pos_embed"] = F.pad(w["pos_embed"], (0, 0, 1, 0))  # a zero for CLS
    known = [FIRST, BIAS, "pos_embed", "norm.weight", "norm.bias"]
    known += [k for k in ("cls_token", "reg_token") if k in w]
    if "pool.wq.weight" in w:
        known += [
            f"pool.{name}" for name in ("norm_patches.weight", "norm_patches.bias", "wq.weight", "wk.weight")
        ]
    for i in range(depth_of(w)):
        for scale, last in (("ls1.gamma", "attn.proj"), ("ls2.gamma", "mlp.fc2")):
            gamma = w.pop(f"blocks.{i}.{scale}", torch.ones(()))
            w[f"blocks.{i}.{last}.weight"] = w[f"blocks.{i}.{last}.weight"] * gamma.reshape(-1, 1)
            w[f"blocks.{i}.{last}.bias"] = w[f"blocks.{i}.{last}.bias"] * gamma
        w.setdefault(f"blocks.{i}.attn.qkv.bias", torch.zeros(len(w[f"blocks.{i}.attn.qkv.weight"])))
        known += [f"blocks.{i}.{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias")]
    left = [k for k in w if k not in known]
    strange = [k for k in left if k.split(".")[0] not in DROPPED]
    missing = [k for k in known if k not in w]
    if strange or missing:
        raise ValueError(f"it {'has' if strange else 'lacks'} {', '.join((strange or missing)[:4])}")
    places = w["pos_embed"].shape[1] - ("cls_token" in w)
    if w[FIRST].dim() != 4 or w["pos_embed"].dim() != 3 or math.isqrt(places) ** 2 != places:
        raise ValueError(f"its patches or its {places} places are no square")
    return {k: w[k] for k in known}, [k.split(".")[0] for k in left]


def depth_of(weights: dict[str, Tensor]) -> int:
    """How many blocks there are."""
    return 1 + max(int(k.split(".")[1]) for k in weights if k.startswith("blocks."))


def sizes(weights: dict[str, Tensor]) -> dict[str, int | str]:
    """The settings of train.py that build a ViT for such weights; num_heads None for a width of nobody's."""
    D, _, patch_size, _ = weights[FIRST].shape
    pool = "cls" if "cls_token" in weights else "simpool" if "pool.wq.weight" in weights else "gap"
    side = math.isqrt(weights["pos_embed"].shape[1] - (pool == "cls"))
    return {
        "backbone": "vit",
        "img_size": side * patch_size,
        "patch_size": patch_size,
        "embed_dim": D,
        "depth": depth_of(weights),
        "num_heads": HEADS.get(D),
        "pool": pool,
        "pool_heads": 1,
        "simpool_gamma": 1.25,
        "registers": weights["reg_token"].shape[1] if "reg_token" in weights else 0,
    }


def fit(weights: dict[str, Tensor], vit: ViT) -> None:
    """Load weights from `read_weights` into a ViT of their sizes, for images (x - 1/2) / (1/4) of any size.

    Raises ValueError if they don't fit.
    """
    w, ours = dict(weights), vit.state_dict()
    kernel = w[FIRST]  # (D, C, p, p)
    if kernel.shape[1] == 3:
        inner = ((0.5 - MEAN) / DEVIATION)[:, None, None] * kernel
        w[BIAS] = w[BIAS] + inner.sum(dim=(1, 2, 3))
        kernel = kernel * (0.25 / DEVIATION)[:, None, None]
    if kernel.shape[1] == 3 and ours[FIRST].shape[1] == 1:
        kernel = kernel.sum(dim=1, keepdim=True)
    w[FIRST] = kernel
    first = int("cls_token" in w)
    patches = w["pos_embed"][:, first:]
    side = math.isqrt(patches.shape[1])
    if (side, side) != vit.native_grid:
        patches = patches.transpose(1, 2).unflatten(2, (side, side))
        patches = F.interpolate(patches, size=vit.native_grid, mode="bicubic").flatten(2).transpose(1, 2)
        w["pos_embed"] = torch.cat([w["pos_embed"][:, :first], patches], dim=1)
    theirs = {**sizes(weights), "channels": weights[FIRST].shape[1]}
    own = {name: getattr(vit, name) for name in ("patch_size", "embed_dim", "depth", "registers")}
    # a grey ViT takes colour weights, summed
    own["channels"] = 3 if theirs["channels"] == 3 and ours[FIRST].shape[1] == 1 else ours[FIRST].shape[1]
    differ = [f"{name} {theirs[name]}, not {value}" for name, value in own.items() if theirs[name] != value]
    try:
        vit.load_state_dict(w)
    except RuntimeError:
        raise ValueError(
            f"the weights don't fit: they have {'; '.join(differ) or 'another layout'}"
        ) from None


def exported(vit: ViT) -> dict[str, Tensor]:
    """A ViT as a plain state dict, which timm or DINO's code load with strict=True.

    With registers as timm's `VisionTransformer(reg_tokens=R, no_embed_class=True)` has them; SimPool's code
    wants its constant `simpool.beta` besides. Of colour images it expects ImageNet's mean and deviation then,
    of grey ones (x - 1/2) / (1/4). Raises ValueError for another pooling than CLS or SimPool, for a SimPool
    whose heads or gamma a file can't tell, or with registers.
    """
    if not (vit.pool is None or isinstance(vit.pool, SimPool) and not vit.registers):
        raise ValueError("--export writes ViTs with a CLS token, or with SimPool and no registers")
    if isinstance(vit.pool, SimPool) and (vit.pool.num_heads, vit.pool.gamma) != (1, 1.25):
        how = f"{vit.pool.num_heads} heads and gamma {vit.pool.gamma}"
        raise ValueError(f"--export: SimPool with {how} can't be told from one head and gamma 1.25 in a file")
    w = {k.replace("pool.", "simpool."): v.detach().cpu().clone() for k, v in vit.state_dict().items()}
    if w[FIRST].shape[1] == 3:
        w[FIRST] = w[FIRST] / (0.25 / DEVIATION)[:, None, None]
        inner = ((0.5 - MEAN) / DEVIATION)[:, None, None] * w[FIRST]
        w[BIAS] = w[BIAS] - inner.sum(dim=(1, 2, 3))
    if vit.registers:  # the CLS token has no position of its own there
        w["cls_token"], w["pos_embed"] = w["cls_token"] + w["pos_embed"][:, :1], w["pos_embed"][:, 1:]
    return w
