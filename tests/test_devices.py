"""Runs whose tensors pretend to lie on a GPU: mixing them with the CPU's raises, as on a real one."""

import pytest
import torch
from conftest import SMALL, TINY, trained
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import evaluate

pytestmark = pytest.mark.usefixtures("few_test_images")
MAY_MIX = "to cpu copy_ __set__ __setstate__ _has_compatible_shallow_copy_type".split()
SPAN, LABELS = (" ".join(words) + " --train-images 16 --epochs 1 --device cuda" for words in (TINY, SMALL))
WAYS = [f"{SPAN} --depth 2 --accumulate 2 --drop-path 0.1 --local-crops-number 1 --pool simpool"]
WAYS += [f"{SPAN} --align none", f"{SPAN} --ssl relvit --prior masks"]
WAYS += [f"{LABELS} --backbone vit --findings all --isnet 1 --explain label"]
WAYS += [f"{LABELS} --preset published --masks prior"]
WAYS += [f"{LABELS} --baseline {way}" for way in ("multitask", "gated", "gain", "rrr", "pipeline", "swap")]


class PretendedGPU(TorchFunctionMode):
    """Computes on the CPU, and notes of each memory whether it would be the GPU's; not of derivatives."""

    def __init__(self):
        super().__init__()
        self.noted = {}  # {address: (weak reference, which keeps the address from being used again, on GPU)}

    def on_gpu(self, t: Tensor) -> bool | None:
        return self.noted.get(t.untyped_storage()._cdata, (None, None))[1]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.__name__, dict(kwargs or {})
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        met = [t for t in tensors if t.dim()]
        if name in ("__getitem__", "__setitem__") and self.on_gpu(args[0]):  # the CPU's indices will do
            met = [t for t in (args[0], *args[2:]) if isinstance(t, Tensor) and t.dim()]
        places, met = ({self.on_gpu(t) for t in group} for group in (tensors, met))
        here = True if True in places else None if None in places else False
        if func == Tensor.device.__get__:
            return torch.device("cuda:0" if here else "cpu")
        wanted = kwargs.pop("device", "cpu" if name == "cpu" else None)
        if name == "to":  # a device, a type, both, or a tensor with both
            given = [*args[1:], wanted, *kwargs.values(), args[0].dtype]
            if len(tensors) > 1:
                given = ["cuda" if self.on_gpu(args[1]) else "cpu", args[1].dtype]
            wanted = next((v for v in given if isinstance(v, (str, torch.device))), None)
            args, kwargs = [args[0], next(v for v in given if isinstance(v, torch.dtype))], {}
        if {True, False} <= met and name not in MAY_MIX or here and name in ("numpy", "normal_", "uniform_"):
            raise RuntimeError(f"{name}: tensors of two devices, or a GPU's where there must be none")
        made, there = func(*args, **kwargs), here if wanted is None else "cuda" in str(wanted)
        made = made.clone() if tensors and wanted is not None and there != here else made  # in another memory
        for t in (t for t in tree_leaves(made) if isinstance(t, Tensor) and there is not None):
            self.noted[t.untyped_storage()._cdata] = StorageWeakRef(t.untyped_storage()), there
        return made


@pytest.mark.parametrize("words", [*WAYS, pytest.param(SPAN, marks=pytest.mark.slow), LABELS])
def test_no_objective_and_no_measure_mixes_devices(words, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**12, 0))
    monkeypatch.setattr(torch, "from_numpy", torch.as_tensor)  # which a mode sees
    with PretendedGPU():
        trained(tmp_path, tiny=words.split())
        if words in (SPAN, LABELS):
            evaluate.main([str(tmp_path), "--all", "--html", "--device", "cuda"])
