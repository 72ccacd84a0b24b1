"""GPU mistakes that are found without a GPU: on meta tensors, no chain and no loss mixes devices or reads a value.

An operation on tensors of two devices raises, and so does every operation that would make the host wait for the GPU.
(Fake CUDA tensors would be closer to a GPU, but autograd aborts on them if PyTorch is built without CUDA.)
"""

import contextlib
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models.diffusion import Diffusion, DiffusionConfig
from models.guidance import GuidanceConfig, GuidanceKind, Guided, guided_denoiser
from models.samplers import SAMPLERS, SamplerConfig, final_x, respacing_for, sample
from tests.gpu.bench import TINY_CLASSIFIER, TINY_UNET

META = torch.device("meta")
ONE_LEVEL: dict[str, Any] = {"image_size": 8, "channel_mult": (1,)}  # with attention
MODEL = TINY_UNET.model_copy(update=ONE_LEVEL | {"null_class": True})
UPSAMPLER = TINY_UNET.model_copy(update=ONE_LEVEL | {"low_res_size": 4})
CLASSIFIER = TINY_CLASSIFIER.model_copy(update=ONE_LEVEL)


@pytest.fixture(autouse=True)
def _no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it refuses this device


def choices(field: str) -> tuple[str, ...]:
    return get_args(DiffusionConfig.model_fields[field].annotation)


def meta_inputs(config: Any) -> dict[str, Tensor]:
    return {name: tensor.to(META) for name, tensor in config.example_inputs(2).items()}


@pytest.mark.parametrize("kind", get_args(GuidanceKind))
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_chain_stays_on_its_device_and_waits_for_nothing(name: str, kind: GuidanceKind) -> None:
    sampler = SamplerConfig(name=name, num_steps=2, s_churn=1.0 if name == "edm" else 0.0)
    guidance = GuidanceConfig(
        kind=kind, scale=float(kind != "none"), weak_weights="weak" if kind == "auto" else None, interval=(0.1, 1.0)
    )
    diffusion = Diffusion(DiffusionConfig(), respacing_for(sampler, 1000))
    with META:
        model, guide = MODEL.build().eval(), (CLASSIFIER if kind == "classifier" else MODEL).build()
    inputs = meta_inputs(MODEL)
    denoise = guided_denoiser(
        Guided(model, inputs["y"], True, null_label=10, guide=guide.eval()), diffusion, name, guidance
    )
    with torch.no_grad():
        x = final_x(sample(sampler, denoise, diffusion, inputs["x"], lambda t: torch.randn_like(inputs["x"])))
    assert x.is_meta and x.shape == inputs["x"].shape and x.dtype == torch.float32


@pytest.mark.parametrize("prediction", choices("prediction"))
@pytest.mark.parametrize("variance", choices("variance"))
@pytest.mark.parametrize("loss", choices("loss"))
def test_losses_stay_on_their_device_and_wait_for_nothing(prediction: Any, variance: Any, loss: Any) -> None:
    diffusion = Diffusion(DiffusionConfig(prediction=prediction, variance=variance, loss=loss))
    x, t = torch.zeros(2, 3, 4, 4, device=META), torch.zeros(2, dtype=torch.int64, device=META)
    weight = torch.zeros(6 if diffusion.config.learns_variance else 3, 3, 1, 1, device=META, requires_grad=True)
    terms = diffusion.losses(lambda x, t: F.conv2d(x, weight), x, t, x)
    terms["loss"].sum().backward()
    assert all(values.is_meta for values in terms.values()) and weight.grad is not None


def test_an_upsampler_stays_on_its_device_and_waits_for_nothing() -> None:
    with META:
        model = UPSAMPLER.build()
    inputs, t = meta_inputs(UPSAMPLER), torch.zeros(2, dtype=torch.int64, device=META)
    condition = {name: inputs[name] for name in ("y", "low_res")}
    terms = Diffusion(DiffusionConfig()).losses(model, inputs["x"], t, inputs["x"], **condition)
    terms["loss"].sum().backward()
    assert terms["loss"].is_meta
