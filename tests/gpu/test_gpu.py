"""Every check of `make gpu-check` with small networks, on a CPU and, if there is one, on a GPU."""

import pytest
import torch

from tests.gpu.bench import Bench
from tests.gpu.check import CHECKS, run_checks


@pytest.mark.parametrize("name", CHECKS)
def test_small_networks_pass_on_a_cpu(name: str) -> None:
    _assert_no_broken_promise(Bench(torch.device("cpu"), tiny=True), name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("name", CHECKS)
def test_small_networks_pass_on_a_gpu(name: str) -> None:
    _assert_no_broken_promise(Bench(torch.device("cuda"), tiny=True), name)


def _assert_no_broken_promise(bench: Bench, name: str) -> None:
    run_checks(bench, [name], budget=1e9)
    assert bench.lines and not [line for line in bench.lines if line["verdict"] == "BROKEN"]


def test_a_broken_promise_and_an_error_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(bench: Bench) -> None:
        raise RuntimeError("does not work")

    bench = Bench(torch.device("cpu"), tiny=True)
    monkeypatch.setitem(CHECKS, "powers", CHECKS["powers"].__class__(failing, 0))
    run_checks(bench, ["powers"], budget=1e9)
    bench.hold(False, "differs")
    assert [line["verdict"] for line in bench.lines] == ["BROKEN", "BROKEN"]
