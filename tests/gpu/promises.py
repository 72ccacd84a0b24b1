"""Promises on a GPU: the CPU's numbers, equal bits in every run and for any number of workers, and no waiting."""

import hashlib
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cluster.collectives import Group
from models.diffusion import Diffusion, DiffusionConfig
from models.guidance import GRADIENT_NORM, GuidanceConfig, log_prob_gradient
from models.manifolds import manifolds, precision_recall
from models.samplers import SAMPLERS, SamplerConfig
from models.unet import ClassifierConfig, UNetConfig, halve_weights
from orchestrator.arithmetic import arithmetic
from orchestrator.generation.noise import Draw, draw_noise, noise_ahead
from orchestrator.generation.sampling import sample_batch
from orchestrator.order import Purpose
from orchestrator.training.gradients import exact_gradients
from orchestrator.training.losses import Microbatch, Terms, make_losses
from orchestrator.weights.network import Network
from tests.gpu.bench import TINY_CLASSIFIER, TINY_UNET, Bench, autocast, difference, example, filled

# (dtype, TF32, accepted relative error against float32 on a CPU): three times the error between CPUs
KINDS = (
    ("float32", False, 6e-5),
    ("float32", True, 1.5e-2),
    ("bfloat16", False, 0.15),
    ("float16", False, 3e-2),
)


def correctness(bench: Bench) -> None:
    """Compare losses, gradients and the guidance's gradient with float32 on the CPU, for every kind of network."""
    plain = {"resblock_updown": False, "use_scale_shift_norm": False, "num_head_channels": None, "num_heads": 1}
    variants = {
        "ADM": TINY_UNET,
        "legacy attention": TINY_UNET.model_copy(update={"use_new_attention_order": False}),
        "IDDPM": TINY_UNET.model_copy(update=plain),
        "upsampler": TINY_UNET.model_copy(update={"low_res_size": 8}),
    }
    for dtype, tf32, limit in KINDS:
        with arithmetic(torch.get_num_threads(), deterministic=True, tf32=tf32):
            worst = {name: _loss_errors(bench, config, dtype) for name, config in variants.items()}
            for pool in ("attention", "adaptive", "spatial", "spatial_v2"):
                worst[pool] = _guidance_error(bench, pool, dtype)
        errors = ", ".join(f"{name} {error:.1e}" for name, error in worst.items())
        bench.hold(max(worst.values()) < limit, f"{dtype}{', TF32' if tf32 else ''}: off by {errors}", errors=worst)


def _loss_errors(bench: Bench, config: UNetConfig, dtype: str) -> float:
    diffusion = Diffusion(DiffusionConfig(schedule="cosine"))

    def gradients(device: torch.device, dtype: str) -> Tensor:
        module, inputs = filled(config, 0, device), {name: value.to(device) for name, value in example().items()}
        condition = {"y": inputs["y"]} | ({"low_res": inputs["low_res"]} if config.low_res_size else {})

        def network(*arguments: Any, **conditions: Any) -> Tensor:
            with autocast(device, dtype):
                return module(*arguments, **conditions)

        terms = diffusion.losses(network, inputs["x"], inputs["t"], inputs["noise"], **condition)
        terms["loss"].sum().backward()
        parts = [terms["loss"].detach()] + [p.grad.flatten() for p in module.parameters() if p.grad is not None]
        return torch.cat([part.double().cpu() for part in parts])

    return difference(gradients(bench.device, dtype), gradients(torch.device("cpu"), "float32"))


def _guidance_error(bench: Bench, pool: str, dtype: str) -> float:
    config = TINY_CLASSIFIER.model_copy(update={"pool": pool})

    def gradient(device: torch.device, dtype: str) -> Tensor:
        module, inputs = filled(config, 0, device).requires_grad_(False), example()
        with autocast(device, dtype), torch.no_grad():
            return log_prob_gradient(module, *(inputs[name].to(device) for name in ("x", "t", "y")))

    return difference(gradient(bench.device, dtype), gradient(torch.device("cpu"), "float32"))


def chains(bench: Bench) -> None:
    """Run guided chains of every sampler on both devices in float32: they differ by at most one grey level."""
    configs: tuple[UNetConfig | ClassifierConfig, ...] = (TINY_UNET, TINY_CLASSIFIER)
    for name in SAMPLERS:
        images = []
        for device in ("cpu", bench.device):
            model, guide = (
                Network(filled(config, seed, device).eval().requires_grad_(False), config, DiffusionConfig(),
                        tuple("0123456789"), "")
                for seed, config in enumerate(configs, 1)
            )  # fmt: skip
            sampler, guidance = SamplerConfig(name=name, num_steps=5), GuidanceConfig(scale=1.0)
            with arithmetic(torch.get_num_threads(), deterministic=True, tf32=False):
                images.append(sample_batch(model, sampler, np.arange(4), np.arange(4), 0, guide, guidance))
        differences = np.abs(images[0].astype(int) - images[1])
        message = f"{name}: at most {differences.max()} grey levels, {(differences > 0).mean():.2%} of pixels differ"
        bench.hold(differences.max() <= 1, message)


def powers_of_two(bench: Bench) -> None:
    """Check that the factors that scale the guidance's gradients are exact."""
    k = torch.arange(-100, 101, dtype=torch.int32, device=bench.device)
    computed = torch.ldexp(torch.full((len(k),), GRADIENT_NORM, device=bench.device), k).double().cpu()
    wrong = int((computed != GRADIENT_NORM * 2.0 ** k.double().cpu()).sum())
    bench.hold(not wrong, f"torch.ldexp is off for {wrong} of {len(k)} exponents")


def half_weights(bench: Bench) -> None:
    """Check that weights kept in half precision give the same bits as weights that autocast casts."""
    inputs = {name: value.to(bench.device) for name, value in example().items()}
    for dtype in ("bfloat16", "float16"):
        outputs = []
        for halved in (False, True):
            module = filled(TINY_UNET, 0, bench.device).eval().requires_grad_(False)
            if halved:
                halve_weights(module, getattr(torch, dtype))
            with torch.no_grad(), autocast(bench.device, dtype):
                outputs.append(module(inputs["x"], inputs["t"], inputs["y"]))
        bench.hold(torch.equal(*outputs), f"{dtype}: {'equal' if torch.equal(*outputs) else 'OTHER'} bits")


def float32_backward(bench: Bench) -> None:
    """Check that the classifier's float32 layers stay float32 in the guidance's backward pass inside autocast."""
    products: Counter[str] = Counter()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.overloadpacket.__name__ in ("mm", "bmm", "addmm"):
                products[str(next(argument for argument in args if isinstance(argument, Tensor)).dtype)] += 1
            return function(*args, **(kwargs or {}))

    module, example_inputs = filled(TINY_CLASSIFIER, 0, bench.device).requires_grad_(False), example()
    inputs = [example_inputs[name].to(bench.device) for name in ("x", "t", "y")]
    with Products(), torch.no_grad():
        log_prob_gradient(module, *inputs)
        without_autocast, seen_without_autocast = products["torch.float32"], dict(products)
        products.clear()
        with autocast(bench.device, "bfloat16"):
            log_prob_gradient(module, *inputs)
    # The output layers' products, forward and back, and the time embedding's: the rest is in half precision.
    message = f"products inside autocast {dict(products)}, without {seen_without_autocast}"
    bench.hold(0 < products["torch.float32"] < without_autocast, message, seen=dict(products))


def noise(bench: Bench) -> None:
    """Check that noise drawn ahead reaches the device unchanged while the device is busy."""
    size, count, images = (16, 12, 8) if bench.tiny else (64, 40, 64)
    keys = [Draw(tuple(range(images)), (3, size, size), Purpose.STEP, t) for t in range(count)]
    ballast = torch.randn(64 if bench.tiny else 2048, 64 if bench.tiny else 2048, device=bench.device)
    arrived = []
    with noise_ahead(0, keys, pin=bench.on_gpu) as draw:
        for key in keys:
            for _ in range(20):
                ballast = torch.tanh(ballast @ ballast)
            arrived.append(draw(key).to(bench.device, non_blocking=True).clone())
    bench.synchronize()
    wrong = sum(not torch.equal(tensor.cpu(), draw_noise(0, key)) for tensor, key in zip(arrived, keys, strict=True))
    bench.hold(not wrong, f"{wrong} of {count} tensors arrived changed")


def determinism(bench: Bench) -> None:
    """Check that guided samples are bit-equal from run to run, with the settings of a sampling worker."""
    networks = bench.networks(64)
    unet, classifier = networks
    batch, size = 4 if bench.tiny else 32, unet.architecture.image_size
    x = torch.randn(batch, 3, size, size, device=bench.device)
    y = torch.arange(batch, device=bench.device) % len(unet.classes)
    t = torch.full((batch,), 400.0, device=bench.device)
    for dtype in ("float16", "bfloat16", "float32"):
        gradients, images, failure = set(), set(), ""
        with arithmetic(torch.get_num_threads(), deterministic=True, tf32=False), autocast(bench.device, dtype):
            try:
                for _ in range(2 if bench.tiny else 8):
                    gradient = log_prob_gradient(classifier.module, x, t, y)
                    gradients.add(hashlib.sha256(gradient.cpu().numpy().tobytes()).hexdigest())
                for _ in range(2 if bench.tiny else 3):
                    samples = sample_batch(
                        unet, SamplerConfig(num_steps=3), np.arange(batch), y.cpu().numpy(), 0, classifier,
                        GuidanceConfig(scale=4.0),
                    )  # fmt: skip
                    images.add(hashlib.sha256(samples.tobytes()).hexdigest())
            except RuntimeError as error:
                failure = f"; raised {str(error).splitlines()[0][:150]}"
        message = f"{dtype}: {len(gradients)} different gradients, {len(images)} different batches{failure}"
        bench.hold(not failure and len(gradients) == len(images) == 1, message)


def exact(bench: Bench) -> None:
    """Check that reduction=exact gives bit-equal gradients in a second run and for 1, 2, 4 and 8 workers."""
    streams, rows = 8, 2 if bench.tiny else 4
    model = bench.pair(64)[0].model_copy(update={"dropout": 0.1})
    for dtype in ("bfloat16",) if bench.tiny else ("bfloat16", "float16", "float32"):
        config = bench.training(model, streams * rows, dtype, streams, reduction="exact")
        with bench.trainer(config) as (state, _):
            losses = make_losses(config, state.timesteps)
            batches = [batch.to(bench.device) for batch in bench.microbatches(config)]

            def backward(model: Any, batch: Microbatch, config: Any = config, losses: Any = losses) -> Terms:
                torch.manual_seed(batch.stream)
                terms: Terms = losses(config.in_dtype(model), batch)
                (terms["loss"].sum() / config.batch_size).backward()
                return terms

            def summed(workers: int, state: Any = state, batches: Any = batches, back: Any = backward) -> list[Tensor]:
                """Return the tree's sum as `workers` workers compute it: subtrees are summed, then their sums."""
                parts, share = [], streams // workers
                for rank in range(workers):
                    state.model.zero_grad(set_to_none=True)
                    exact_gradients(state.model, batches[rank * share : (rank + 1) * share], back, Group(0, 1))
                    parts.append([p.grad for p in state.model.parameters()])
                while len(parts) > 1:
                    pairs = zip(parts[::2], parts[1::2], strict=True)
                    parts = [[a + b for a, b in zip(*pair, strict=True)] for pair in pairs]
                return parts[0]

            expected = summed(1)
            differing = {
                label: sum(not torch.equal(a, b) for a, b in zip(expected, summed(workers), strict=True))
                for label, workers in {"again": 1, "2 workers": 2, "4 workers": 4, "8 workers": 8}.items()
            }
        bench.hold(not any(differing.values()), f"{dtype}: of {len(expected)} gradients differ {differing}")


def neighbours(bench: Bench) -> None:
    """Check that metrics of nearest neighbours are bit-equal to the CPU's, and take seconds."""
    rng, dimension = np.random.default_rng(0), 16 if bench.tiny else 2048
    real, generated = (rng.standard_normal((n, dimension), np.float32) for n in (10_000, 50_000))
    subset_size = 200 if bench.tiny else 2_000
    with arithmetic(torch.get_num_threads(), deterministic=True, tf32=False):
        expected = manifolds(real[:subset_size], generated[:subset_size])
        with bench.device:
            same = manifolds(real[:subset_size], generated[:subset_size]) == expected
            begin = time.perf_counter()
            if not bench.tiny:
                precision_recall(real, generated)
            seconds = time.perf_counter() - begin
    message = f"{'equal' if same else 'OTHER'} numbers; precision and recall of 50,000 x 2,048 in {seconds:.0f} s"
    bench.hold(same and seconds < 60, message, seconds=seconds)


def waits(bench: Bench) -> None:
    """Check that the host waits for the GPU in no guided and no training step; on a CPU, that it reads no values."""
    networks, batch = bench.networks(64), 2 if bench.tiny else 64
    with autocast(bench.device, "bfloat16"):
        step = bench.guided_step(networks, batch)
        counts = _waits(bench, step)
    bench.hold(not counts, f"a guided step waits {sum(counts.values())} times: {dict(counts)}")
    config = bench.training(bench.pair(64)[0], 2 * batch, "bfloat16", microbatch_size=batch, max_grad_norm=1.0)
    with bench.trainer(config) as (state, step_of):
        batches = bench.microbatches(config)
        counts = _waits(bench, lambda: step_of(batches))
        state.settle()
    allowed = 0 if bench.on_gpu else 1  # the norm of the step before, which a GPU copies to the host by itself
    message = f"a training step of 2 microbatches waits {sum(counts.values())} times: {dict(counts)}"
    bench.hold(sum(counts.values()) <= allowed, message)


def _waits(bench: Bench, run: Callable[[], Any]) -> Counter[str]:
    """Count how often the second `run` reads a tensor's value, by source line (by operation on a CPU)."""
    run()
    if not bench.on_gpu:
        with _Values() as values:
            run()
        return values.seen
    bench.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Counter(
        f"{Path(entry.filename).name}:{entry.lineno}" for entry in caught if "synchron" in str(entry.message)
    )


class _Values(TorchDispatchMode):
    """Counts the operations that hand a tensor's value to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        self.seen.update([name] if name in ("_local_scalar_dense", "nonzero", "equal") else [])
        return function(*args, **(kwargs or {}))
