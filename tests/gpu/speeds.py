"""How fast a GPU runs Admiral: shares of its peak, beside the plain eager path; memory, checkpoints, features."""

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
STEPS = 250  # of the chains whose images a second are stated


def device(bench: Bench) -> None:
    """What this is, and its two ceilings."""
    words = f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    if not bench.on_gpu:
        bench.say("info", f"{words}, a CPU")
        return
    properties = torch.cuda.get_device_properties(bench.device)
    a = torch.empty(1 << 30, dtype=torch.uint8, device=bench.device).random_()
    b = torch.empty_like(a)
    copied = 2 * a.nbytes / bench.seconds(lambda: b.copy_(a), 10)
    x, y = (torch.randn(8192, 8192, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    product = 2 * 8192**3 / bench.seconds(lambda: x @ y, 10)
    words = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {words}"
    bench.say("info", f"{words}: copies {copied / 1e12:.2f} TB/s, bfloat16 products {product / 1e12:.0f} TFLOP/s")


def sampling(bench: Bench) -> None:
    """Guided steps as a sampling worker makes them, beside the plain eager path of the published code."""
    for size, batches in ((64, (64, 256)), (256, (16,))):
        model, classifier = bench.pair(size)
        flops = sampling_flops(Evaluations(1, 1), model, classifier)
        for batch in (4,) if bench.tiny else batches:
            plain = _plain_sampling_seconds(bench, size, batch)
            ours, setup = _sampling_seconds(bench, size, batch)
            mfu = flops * batch / ours / bench.peak
            words = (
                f"ADM-{size} guided, {batch} images: {batch / ours / STEPS:.2f} images/s at {STEPS} steps, "
                f"MFU {mfu:.0%}, {plain / ours:.2f} times the plain path; the first step took {setup:.0f} s"
            )
            numbers = {"rate": batch / ours / STEPS, "mfu": mfu, "gain": plain / ours, "setup": setup}
            bench.judge((mfu >= 0.35 and plain / ours >= 2) or batch < batches[-1], words, **numbers)


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
    """Attention as the published code writes it: products and a softmax in float32."""

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
    """Steps with optimizer and average, beside the plain eager path; memory against what --dry-run counts."""
    for size, batch in ((64, 64), (256, 12)):
        model, images = bench.pair(size)[0], 4 if bench.tiny else batch
        plain = _training_seconds(bench, size, images, "float16", plain=True)
        for dtype in ("bfloat16", "float16"):
            ours = _training_seconds(bench, size, images, dtype)
            mfu = training_flops(model) * images / ours / bench.peak
            words = f"{images / ours:.0f} images/s, MFU {mfu:.0%}, {plain / ours:.2f} times the plain path"
            kept = mfu >= 0.4 and plain / ours >= 2
            bench.judge(kept, f"ADM-{size} {dtype}, {images} images: {words}", mfu=mfu, gain=plain / ours)
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
    told = sum(memory_of(config, network, 1).values())
    with bench.trainer(config) as (_, step):
        held = bench.memory(lambda: step(bench.microbatches(config)))
    words = f"ADM-{size}, {images} images: holds {held / 1e9:.1f} GB, {told / 1e9:.1f} counted"
    bench.hold(0.7 < held / told < 1.2, words, held=held, told=told)


def compiling(bench: Bench) -> None:
    """torch.compile: one graph for each shape of block, no breaks, none compiled again, the same numbers."""
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
            else:  # no time for a C++ compiler: the graphs are what counts here
                compile_blocks(network.module, backend="aot_eager")
        step = bench.guided_step(networks, batch)
        made = step()
        graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        step()
        again = counters["stats"]["unique_graphs"] - graphs
    off = difference(made, plain)
    words = f"{graphs} graphs for {blocks} blocks, {breaks} breaks, {again} compiled again, off by {off:.1e}"
    bench.hold(0 < graphs <= blocks and not breaks and not again and off < 5e-2, words, graphs=graphs, off=off)


def staging(bench: Bench) -> None:
    """How long a checkpoint keeps the step waiting; what is staged is what was there."""
    config = bench.training(bench.pair(64)[0], 4, "bfloat16")
    with bench.trainer(config) as (state, _), CheckpointWriter("none", config, lambda checkpoint: None) as writer:
        seconds = []
        for _ in range(3):
            begin = time.perf_counter()
            writer._stage(state)
            seconds.append(time.perf_counter() - begin)
        size = sum(tensor.nbytes for tensor in state.tensors().values())
        same = all(torch.equal(writer._staged[name], tensor.cpu()) for name, tensor in state.tensors().items())
    words = (
        f"{size / 1e9:.2f} GB in {', '.join(f'{each:.2f}' for each in seconds)} s, {'equal' if same else 'OTHER'} bits"
    )
    bench.hold(same, words, seconds=seconds)


def features(bench: Bench) -> None:
    """Inception with random weights: images a second, equal from run to run."""
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
    """How fast one thread of the host draws noise, in steps of images."""
    for size, count in ((64, 64), (256, 16)):
        key = Draw(tuple(range(count)), (3, size, size), Purpose.STEP, 1)
        rate = count / bench.seconds(partial(draw_noise, 0, key), 3, 1)
        bench.say("info", f"{rate:,.0f} image-steps/s of {size} pixels in one thread", rate=rate)
