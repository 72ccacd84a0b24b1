"""Test that PyTorch's switches are set and restored."""

import os
import subprocess
import sys

import pytest
import torch

from orchestrator.arithmetic import arithmetic, choose_device, platform


def _switches() -> tuple[object, ...]:
    return (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_tf32,
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_switches_are_set_inside_and_restored(deterministic: bool, tf32: bool) -> None:
    before = _switches()
    with arithmetic(2, deterministic, tf32):
        assert _switches() == (2, deterministic, False, not deterministic, tf32, tf32, False)
    assert _switches() == before
    with pytest.raises(KeyError), arithmetic(2, deterministic, tf32):
        raise KeyError
    assert _switches() == before


def test_no_gpus_means_the_cpu_and_a_missing_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device(0) == torch.device("cpu"), "although the machine has a GPU"
    assert choose_device(0.5) == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"num_gpus=1.*--num-gpus 0"):
        choose_device(1)


def test_cuda_variables_are_set_unless_the_user_has_set_them() -> None:
    """The variables are set in a new process, like that of a worker."""
    code = (
        "import os, torch; torch.cuda.is_available = lambda: True\n"
        "from orchestrator.arithmetic import choose_device; choose_device(1)\n"
        "print(os.environ['CUBLAS_WORKSPACE_CONFIG'], os.environ['PYTORCH_CUDA_ALLOC_CONF'])"
    )
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    environment.pop("PYTORCH_CUDA_ALLOC_CONF", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == [":16:8", "expandable_segments:True"]


def test_the_platform_contains_the_torch_version_and_the_number_of_threads() -> None:
    description = platform(torch.device("cpu"))
    assert description["torch"] == torch.__version__ and description["threads"] == torch.get_num_threads()
