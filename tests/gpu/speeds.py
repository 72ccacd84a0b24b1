"""Speeds of Admiral on a GPU, as shares of its peak and against the plain eager path; memory, checkpoints, features."""

import contextlib
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn import functional as F

from models import unet
from models.costs import Evaluations, sampling_flops, training_flops
from models.inception import InceptionNetwork
from models.unet import AttentionBlock, ResBlock, compile_blocks, halve_weights
from orchestrator.arithmetic import arithmetic
from orchestrator.generation.noise import Draw, draw_noise
from orchestrator.order import Purpose
from orchestrator.training.checkpoint_writer import CheckpointWriter
from orchestrator.training.gradients import memory_of, recomputes
from tests.gpu.bench import Bench, autocast, difference
from tests.reference_metrics import random_weights

GOLDEN = Path(__file__).parents[1] / "golden" / "metrics"
STEPS = 250  # of the chains for which images/s are printed


def device(bench: Bench) -> None:
    """Print the device, its memory bandwidth and its rate of matrix products."""
    message = f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    if not bench.on_gpu:
        bench.say("info", f"{message}, a CPU")
        return
    properties = torch.cuda.get_device_properties(bench.device)
    a = torch.empty(1 << 30, dtype=torch.uint8, device=bench.device).random_()
    b = torch.empty_like(a)
    copied = 2 * a.nbytes / bench.seconds(lambda: b.copy_(a), 10)
    x, y = (torch.randn(8192, 8192, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    product = 2 * 8192**3 / bench.seconds(lambda: x @ y, 10)
    message = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {message}"
    bench.say("info", f"{message}: copies {copied / 1e12:.2f} TB/s, bfloat16 products {product / 1e12:.0f} TFLOP/s")


def sampling(bench: Bench) -> None:
    """Time guided steps with the settings of a sampling worker against the plain eager path of the published code."""
    for size, batches in ((64, (64, 256)), (256, (16,))):
        model, classifier = bench.pair(size)
        flops = sampling_flops(Evaluations(1, 1), model, classifier)
        for batch in (4,) if bench.tiny else batches:
            plain = _plain_sampling_seconds(bench, size, batch)
            ours, setup = _sampling_seconds(bench, size, batch)
            mfu = flops * batch / ours / bench.peak
            message = (
                f"ADM-{size} guided, {batch} images: {batch / ours / STEPS:.2f} images/s at {STEPS} steps, "
                f"MFU {mfu:.0%}, {plain / ours:.2f} times the plain path; the first step took {setup:.0f} s"
            )
            numbers = {"rate": batch / ours / STEPS, "mfu": mfu, "gain": plain / ours, "setup": setup}
            bench.judge((mfu >= 0.35 and plain / ours >= 2) or batch < batches[-1], message, **numbers)


def _sampling_seconds(bench: Bench, size: int, batch: int) -> tuple[float, float]:
    """Return the seconds of a guided step in float16, and of the first one, which compiles."""
    networks = bench.networks(size)
    for network in networks:
        halve_weights(network.module, torch.float16)
        if bench.on_gpu:
            compile_blocks(network.module)
    with arithmetic(torch.get_num_threads(), deterministic=True, tf32=False), autocast(bench.device, "float16"):
        begin, step = time.perf_counter(), bench.guided_step(networks, batch)
        step()
        bench.synchronize()
        return bench.seconds(step), time.perf_counter() - begin


def _plain_sampling_seconds(bench: Bench, size: int, batch: int) -> float:
    networks = bench.networks(size)
    for network in networks:
        network.module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    with _written_out(), autocast(bench.device, "float16"):
        return bench.seconds(bench.guided_step(networks, batch))


@contextlib.contextmanager
def _written_out() -> Iterator[None]:
    """Compute attention as the published code does: two products, and a softmax in float32."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = q.shape[-1] ** -0.25
        return torch.softmax(((q * scale) @ (k * scale).transpose(-1, -2)).float(), dim=-1).to(v.dtype) @ v

    fused = F.scaled_dot_product_attention
    unet.F.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        yield
    finally:
        unet.F.scaled_dot_product_attention = fused


def training(bench: Bench) -> None:
    """Time training steps against the plain eager path, and compare their memory with the count of --dry-run."""
    for size, batch in ((64, 64), (256, 12)):
        model, images = bench.pair(size)[0], 4 if bench.tiny else batch
        plain = _training_seconds(bench, size, images, "float16", plain=True)
        for dtype in ("bfloat16", "float16"):
            ours = _training_seconds(bench, size, images, dtype)
            mfu = training_flops(model) * images / ours / bench.peak
            message = f"{images / ours:.0f} images/s, MFU {mfu:.0%}, {plain / ours:.2f} times the plain path"
            is_fast = mfu >= 0.4 and plain / ours >= 2
            bench.judge(is_fast, f"ADM-{size} {dtype}, {images} images: {message}", mfu=mfu, gain=plain / ours)
        _compare_memory(bench, size, images)


def _training_seconds(bench: Bench, size: int, images: int, dtype: str, plain: bool = False) -> float:
    config = bench.training(bench.pair(size)[0], images, dtype, compile=bench.on_gpu and not plain)
    with _written_out() if plain else contextlib.nullcontext(), bench.trainer(config) as (state, step):
        if plain:
            state.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        batches = bench.microbatches(config)
        return bench.seconds(lambda: step(batches), 5, 3)


def _compare_memory(bench: Bench, size: int, images: int) -> None:
    if not bench.on_gpu:
        return
    config = bench.training(bench.pair(size)[0], images, "bfloat16")
    total = torch.cuda.get_device_properties(bench.device).total_memory
    network = config.model.model_copy(update={"gradient_checkpointing": recomputes(config, 1, total)})
    counted = sum(memory_of(config, network, 1).values())
    with bench.trainer(config) as (_, step):
        peak = bench.memory(lambda: step(bench.microbatches(config)))
    message = f"ADM-{size}, {images} images: holds {peak / 1e9:.1f} GB, {counted / 1e9:.1f} counted"
    bench.hold(0.7 < peak / counted < 1.2, message, held=peak, told=counted)


def compiling(bench: Bench) -> None:
    """Check torch.compile: one graph for each shape of block, no breaks, no recompilation, and the same numbers."""
    networks, batch = bench.networks(64), 4 if bench.tiny else 64
    with autocast(bench.device, "bfloat16"):
        plain = bench.guided_step(networks, batch)()
        torch._dynamo.reset()
        counters.clear()
        blocks = 0
        for network in networks:
            blocks += sum(isinstance(layer, ResBlock | AttentionBlock) for layer in network.module.modules())
            if bench.on_gpu:
                compile_blocks(network.module)
            else:  # a C++ compiler would take too long, and only the graphs are checked
                compile_blocks(network.module, backend="aot_eager")
        step = bench.guided_step(networks, batch)
        output = step()
        graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        step()
        recompiled = counters["stats"]["unique_graphs"] - graphs
    error = difference(output, plain)
    message = f"{graphs} graphs for {blocks} blocks, {breaks} breaks, {recompiled} compiled again, off by {error:.1e}"
    kept = 0 < graphs <= blocks and not breaks and not recompiled and error < 5e-2
    bench.hold(kept, message, graphs=graphs, off=error)


def staging(bench: Bench) -> None:
    """Time how long a step waits while a checkpoint is staged, and check that the staged tensors are equal."""
    config = bench.training(bench.pair(64)[0], 4, "bfloat16")
    with bench.trainer(config) as (state, _), CheckpointWriter("none", config, lambda checkpoint: None) as writer:
        seconds = []
        for _ in range(3):
            begin = time.perf_counter()
            writer._stage(state)
            seconds.append(time.perf_counter() - begin)
        size = sum(tensor.nbytes for tensor in state.tensors().values())
        same = all(torch.equal(writer._staged[name], tensor.cpu()) for name, tensor in state.tensors().items())
    times = ", ".join(f"{duration:.2f}" for duration in seconds)
    message = f"{size / 1e9:.2f} GB in {times} s, {'equal' if same else 'OTHER'} bits"
    bench.hold(same, message, seconds=seconds)


def features(bench: Bench) -> None:
    """Time Inception with random weights, and check that its features are bit-equal from run to run."""
    shapes = json.loads((GOLDEN / "inception_state_dict.json").read_text())["shapes"]
    with np.load(GOLDEN / "inception_random_weights.npz") as arrays:
        weights = random_weights({name: arrays[name] for name in ("seed", "fc_scale")}, shapes)
    network = InceptionNetwork(weights, bench.device)
    pixels = np.random.default_rng(0).integers(0, 256, (2 if bench.tiny else 256, 64, 64, 3), dtype=np.uint8)
    rate = len(pixels) / bench.seconds(lambda: network(pixels))
    same = np.array_equal(network(pixels).pool, network(pixels).pool)
    enough = not bench.on_gpu or rate > 50_000 / 60
    bench.hold(same and enough, f"{rate:,.0f} images/s of 64 pixels, {'equal' if same else 'OTHER'} bits", rate=rate)


def host_noise(bench: Bench) -> None:
    """Time the drawing of noise in one thread of the host, in image-steps/s."""
    for size, count in ((64, 64), (256, 16)):
        key = Draw(tuple(range(count)), (3, size, size), Purpose.STEP, 1)
        rate = count / bench.seconds(partial(draw_noise, 0, key), 3, 1)
        bench.say("info", f"{rate:,.0f} image-steps/s of {size} pixels in one thread", rate=rate)
