"""Check that Admiral is correct on this GPU, and how fast it is, in ten minutes on one GPU and without Ray:

    make gpu-check                       # exit code 1 if a promise is broken
    make gpu-check ARGS=--tiny           # the same on small networks, on a CPU too

Prints one line for each finding, and writes them to runs/gpu-check.json. It needs torch, numpy, safetensors, fsspec,
pyarrow, Pillow and pydantic. Other packages that the project imports may be missing.
"""

import importlib.util
import json
import sys
import time
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

REPORT = Path("runs/gpu-check.json")
NOT_USED = ("botocore", "botocore.exceptions", "botocore.parsers", "tenacity", "yaml", "psutil")  # imported, not called


def stand_in(name: str) -> None:
    """Create a stub module if `name` is not installed. Each of its attributes is an exception class, for `except`."""
    if name in sys.modules or importlib.util.find_spec(name.split(".")[0]) is not None:
        return
    module = types.ModuleType(name)
    module.__path__ = []
    attributes: dict[str, type] = {}
    module.__getattr__ = lambda attribute: attributes.setdefault(attribute, type(attribute, (Exception,), {}))  # type: ignore[method-assign]
    sys.modules[name] = module
    if "." in name:
        setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], module)


for each in NOT_USED:
    stand_in(each)

import torch  # noqa: E402

from orchestrator.arithmetic import choose_device  # noqa: E402
from tests.gpu import promises, speeds  # noqa: E402
from tests.gpu.bench import Bench  # noqa: E402


@dataclass(frozen=True)
class Check:
    """One check, and the seconds that must be left to begin it."""

    run: Callable[[Bench], None]
    needs: float


CHECKS = {  # the important ones first
    "device": Check(speeds.device, 0),
    "correctness": Check(promises.correctness, 10),
    "chains": Check(promises.chains, 10),
    "powers": Check(promises.powers_of_two, 1),
    "half-weights": Check(promises.half_weights, 5),
    "backward": Check(promises.float32_backward, 5),
    "determinism": Check(promises.determinism, 30),
    "exact": Check(promises.exact, 40),
    "noise": Check(promises.noise, 10),
    "neighbours": Check(promises.neighbours, 60),
    "waits": Check(promises.waits, 40),
    "training": Check(speeds.training, 100),
    "sampling": Check(speeds.sampling, 100),
    "staging": Check(speeds.staging, 20),
    "features": Check(speeds.features, 20),
    "compile": Check(speeds.compiling, 60),
    "host-noise": Check(speeds.host_noise, 5),
}


def run_checks(bench: Bench, names: list[str], budget: float) -> None:
    """Run the named checks, while `budget` seconds last; an error of one does not end the others."""
    begun = time.monotonic()
    for name in names:
        bench.check = name
        if (seconds_left := budget - (time.monotonic() - begun)) < CHECKS[name].needs:
            bench.say("skip", f"{seconds_left:.0f} s are left")
            continue
        try:
            CHECKS[name].run(bench)
        except Exception as error:  # noqa: BLE001 - the next checks still run
            bench.say(
                "BROKEN", f"{type(error).__name__}: {error}".splitlines()[0][:300], traceback=traceback.format_exc()
            )
            if "CUDA error" in str(error):  # nothing after it can be trusted
                return
        if bench.on_gpu:
            torch.cuda.empty_cache()


def main(arguments: list[str]) -> int:
    """Run the checks that the arguments name, or all of them; return the exit code."""
    tiny = "--tiny" in arguments
    names = [name for name in arguments if name != "--tiny"] or list(CHECKS)
    if unknown := set(names) - CHECKS.keys():
        print(f"there is no check {', '.join(sorted(unknown))}; there are {', '.join(CHECKS)}", file=sys.stderr)
        return 2
    if not tiny and not torch.cuda.is_available():
        print("there is no GPU here: pass --tiny to try the checks on a CPU", file=sys.stderr)
        return 2
    bench = Bench(choose_device(float(torch.cuda.is_available())), tiny)
    run_checks(bench, names, budget=570)
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(json.dumps(bench.lines, indent=1, default=str))
    broken = [line for line in bench.lines if line["verdict"] == "BROKEN"]
    print(f"{len(broken)} of {len(bench.lines)} findings are broken promises")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
