"""The process, its device and memory, processes that train together (torchrun), and requests to stop."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from threading import Event
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

from dino import over_processes

SMALLER = "raise --accumulate, or lower --batch-size, --img-size or --embed-dim"


def keep_freed_memory() -> None:
    """Let glibc reuse freed memory rather than return it to the system; other C libraries stay as they are.

    Each page that the system hands out anew costs a page fault, and large tensors have thousands of pages. In
    return the process holds its peak of memory until it ends.
    """
    mallopt = None if os.name == "nt" else getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: no block gets its own mapping, which would be returned when it is freed
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def rank() -> int:
    """The number of this process among those that torchrun started; 0 if it is alone."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes train together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def check_device(device: str) -> None:
    """Raise ValueError if a device can't be used; a GPU with a number becomes the process's current one.

    TF32, PyTorch's default for convolutions on GPUs, is off: 10 bits are too few for ISNet's gradient.
    """
    torch.backends.cudnn.allow_tf32 = False
    if device.split(":")[0] not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {device} is unknown: choose auto, cpu, cuda or mps")
    try:
        if device.startswith("cuda:") and torch.cuda.is_available():
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0][:150]
        raise ValueError(f"--device {device} can't be used, try --device cpu ({reason})") from None


def join(device: str, batch_size: int) -> str:
    """Join the processes that torchrun started, if it did; returns this one's device, and opens no other.

    Only the first process prints. Raises ValueError if a batch can't be shared evenly, or the device used.
    Under torchrun each process that can't use its device prints why and ends with status 1.
    """
    if "RANK" not in os.environ:
        check_device(device)
        return device
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if batch_size % processes:
        shared = f"--batch-size {batch_size} can't be shared by {processes} processes"
        raise ValueError(f"{shared}: take a multiple of {processes}")
    if processes > 1 and device not in ("cpu", "cuda"):
        shared = f"--device {device} can't be shared by {processes} processes"
        raise ValueError(f"{shared}: take cuda, a GPU for each, or cpu")
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device
    try:
        check_device(device)
    except ValueError as error:
        fail("train.py", error, 1)  # the others would wait for it
    import_module("torch.distributed.nn")  # imported later, its default arguments keep the group's threads
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")
    return device


class Collapse(RuntimeError):
    """DINO gives all images the same output. Every process raises this; the message names the remedy."""


def fail(script: str, said: Exception | str, status: int) -> NoReturn:
    """Exit with a one-line message from the first process, or from each process that may fail alone."""
    if not rank() or status == 1 and not isinstance(said, Collapse):
        print(f"{script}: {said}", file=sys.stderr)
    sys.exit(status)


def remedy_for(error: Exception, of_memory: str = SMALLER) -> str:
    """One line for an error of torch.compile, or of memory with its remedy. Raises any other error again."""
    said = " ".join(str(error).split())
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"--compile can't be used here ({said[:150]}): leave it out"
    # MPS and the driver raise plain RuntimeErrors, as cuBLAS and cuDNN do.
    lacking = any(words in said.lower() for words in ("allocate", "out of memory", "alloc_failed"))
    if lacking or isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return f"not enough memory: {of_memory}"
    raise error


def average_gradients(model: nn.Module) -> None:
    """Replace gradients by their means over all processes, if there are several, in one message."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    nn.utils.vector_to_parameters(over_processes(nn.utils.parameters_to_vector(gradients)), gradients)


class _Sum(Function):
    """The sum of a tensor over all processes; the derivative of such a sum is the sum of the derivatives."""

    @staticmethod
    def forward(ctx, own: Tensor) -> Tensor:
        dist.all_reduce(own := own.clone(memory_format=torch.contiguous_format))
        return own

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient)


def share_model(model: nn.Module) -> None:
    """Give each process, if there are several, the first one's weights, and each BatchNorm all their images.

    SyncBatchNorm does this too, but on GPUs only, and LRP has no rule for it. Here each process normalises
    the images of all and keeps its own, so more processes do not make a BatchNorm faster or smaller.
    """
    if world_size() == 1:
        return
    for tensor in model.state_dict().values():
        dist.broadcast(tensor, src=0)

    def all_images(module: nn.Module, images: tuple[Tensor]) -> Tensor | None:
        if module.training:
            parts = [torch.zeros_like(images[0])] * dist.get_world_size()
            parts[rank()] = images[0]
            with torch._C.DisableTorchFunction():  # LRP need not see the images of others
                parts = list(_Sum.apply(torch.cat(parts)).chunk(len(parts)))
            parts[rank()] = images[0]
            return torch.cat(parts)

    def own_images(module: nn.Module, images: tuple[Tensor], output: Tensor) -> Tensor | None:
        return output.chunk(dist.get_world_size())[rank()] if module.training else None

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(all_images)
            module.register_forward_hook(own_images)


def from_first(values: Any) -> Any:
    """The first process's values, in every process."""
    box = [values]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


@contextmanager
def stop_requests() -> Iterator[Event]:
    """An event that Ctrl-C or SIGTERM sets, so that a step ends first; a second Ctrl-C stops at once."""
    asked = Event()

    def ask(number: int, frame: Any) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
