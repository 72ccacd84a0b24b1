"""A worker's device and its arithmetic. Only this module sets PyTorch's global switches."""

import contextlib
import os
import platform as machine
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

# CUDA and cuBLAS read these variables when they start. A value that the process already has takes precedence.
_ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # needed for deterministic matrix products
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # avoids fragmentation by batches of several shapes
}

# Messages of CUDA, cuBLAS, cuDNN and PyTorch's CPU allocator.
_OUT_OF_MEMORY = re.compile("(?i)out of memory|STATUS_ALLOC_FAILED|unable to find an engine|can't allocate memory")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether the error says that a device or this process has no memory left."""
    return _OUT_OF_MEMORY.search(str(error)) is not None


def choose_device(num_gpus: float) -> torch.device:
    """Return a worker's device: a GPU, or with num_gpus=0 the CPU even if there is a GPU.

    Raises:
        ValueError: num_gpus is positive, but torch can use no GPU.
    """
    if not num_gpus:
        return torch.device("cpu")
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})
    if not torch.cuda.is_available():
        raise ValueError(
            f"num_gpus={num_gpus:g}, but this worker sees no GPU; pass --num-gpus 0 to compute on CPUs, or run "
            "jobs/doctor.py to find out why"
        )
    return torch.device("cuda")


def set_arithmetic(num_threads: int | None = None, deterministic: bool = True, tf32: bool = False) -> None:
    """Set PyTorch's global switches in this process.

    num_threads: CPU threads; None = unchanged. deterministic: the same computation gives the same bits on a GPU, and
    operations that are not deterministic raise RuntimeError; if False, cuDNN benchmarks its algorithms for each shape.
    tf32: allow TF32 in float32 convolutions and matrix products; the V100s of the published results do not have it.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    # In deterministic mode PyTorch fills new tensors with NaN by default, which takes a sixth of a guided step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def prepare_device(num_gpus: float, num_threads: int | None = None, tf32: bool = False) -> torch.device:
    """Return a worker's device after `choose_device`, and on a GPU set PyTorch to deterministic arithmetic.

    num_threads: CPU threads; None = unchanged. tf32: as in `set_arithmetic`; it has no effect on a CPU.

    Raises:
        ValueError: num_gpus is positive, but torch can use no GPU.
    """
    device = choose_device(num_gpus)
    if device.type == "cuda":
        set_arithmetic(num_threads, deterministic=True, tf32=tf32)
    elif num_threads is not None:
        torch.set_num_threads(num_threads)
    return device


@contextlib.contextmanager
def arithmetic(num_threads: int, deterministic: bool, tf32: bool) -> Iterator[None]:
    """Call `set_arithmetic`, and restore the previous settings at the end of the context."""
    previous = (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_tf32,
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )
    set_arithmetic(num_threads, deterministic, tf32)
    try:
        yield
    finally:
        threads, was_deterministic, benchmark, convolution_tf32, matmul_tf32, fill_memory = previous
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(was_deterministic)
        torch.backends.cudnn.benchmark = benchmark
        torch.backends.cudnn.allow_tf32 = convolution_tf32
        torch.backends.cuda.matmul.allow_tf32 = matmul_tf32
        torch.utils.deterministic.fill_uninitialized_memory = fill_memory  # type: ignore[attr-defined]


def platform(device: torch.device) -> dict[str, Any]:
    """Return the device and the software versions. On equal platforms, results are bit-equal."""
    software: dict[str, Any] = {"torch": torch.__version__, "numpy": np.__version__}
    if device.type == "cuda":
        software |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        return {"device": torch.cuda.get_device_name(device), **software}
    kind = f"{machine.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {"device": kind, "threads": torch.get_num_threads(), **software}
