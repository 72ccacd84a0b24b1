"""Named starting points of the jobs: presets are data, overrides come from the command line."""

from models.guidance import GuidanceConfig
from models.samplers import SamplerConfig
from orchestrator.conversion import ConversionConfig
from orchestrator.data.preparation import PrepareConfig
from orchestrator.doctor import DoctorConfig
from orchestrator.evaluation.job import EvaluationConfig
from orchestrator.generation.sampling import GenerationConfig
from orchestrator.likelihood import LikelihoodConfig
from orchestrator.quickstart import QuickstartConfig
from orchestrator.search.config import SearchConfig
from orchestrator.search.space import SpaceConfig
from orchestrator.training.averages import AverageConfig
from orchestrator.training.presets import DIGITS


def likelihood_presets() -> dict[str, tuple[str, LikelihoodConfig]]:
    """Likelihoods to estimate."""
    digits = LikelihoodConfig(
        weights="digits/diffusion", dataset="datasets/digits", output="digits/likelihood", num_workers=2
    )
    return {"digits": (DIGITS, digits)}


def generation_presets() -> dict[str, tuple[str, GenerationConfig]]:
    """Samples to generate."""
    digits = GenerationConfig(
        weights="digits/diffusion",
        classifier="digits/classifier",
        output="digits/samples",
        num_samples=1_000,
        sampler=SamplerConfig(name="ddpm", num_steps=25),
        upsampling=SamplerConfig(name="ddpm", num_steps=25),
        guidance=GuidanceConfig(scale=1.0),
        num_workers=2,
    )
    released = GenerationConfig(
        weights="64x64_diffusion.pt",
        classifier="64x64_classifier.pt",
        output="adm64/samples",
        sampler=SamplerConfig(name="ddpm", num_steps=250),
        guidance=GuidanceConfig(scale=1.0),
        labels="uniform",
        dtype="float16",
        num_gpus=1,
    )
    cascade = released.model_copy(
        update={
            "upsampler": "64_256_upsampler.pt",
            "upsampling": SamplerConfig(name="ddpm", num_steps=250),
            "output": "adm64-256/samples",
        }
    )
    return {
        "digits": (DIGITS, digits),
        "released": ("the released ADM-G on ImageNet 64x64, as recommended", released),
        "cascade": ("the same, enlarged to 256x256 by the released upsampler (ADM-G + ADM-U)", cascade),
    }


def evaluation_presets() -> dict[str, tuple[str, EvaluationConfig]]:
    """Samples to measure."""
    digits = EvaluationConfig(
        samples="digits/samples",
        reference="datasets/digits",
        output="digits/evaluation",
        num_workers=2,
    )
    released = EvaluationConfig(
        samples="adm64/samples",
        reference="VIRTUAL_imagenet64_labeled.npz",
        output="adm64/evaluation",
        extractor="inception",
        num_gpus=1,
    )
    photographs = EvaluationConfig(
        samples="samples.npz", reference="reference.npz", output="evaluation", extractor="efficientnet"
    )
    return {
        "digits": (DIGITS, digits),
        "released": ("ImageNet 64x64 against the published reference batch, by FID's Inception network", released),
        "photographs": ("one's own images, by EfficientNet with ImageNet weights, which a package brings", photographs),
    }


def search_presets() -> dict[str, tuple[str, SearchConfig]]:
    """Searches of guidance scale, steps and sampler."""
    digits = SearchConfig(
        weights=("digits/diffusion",),
        classifier="digits/classifier",
        reference="datasets/digits",
        output="digits/search",
        space=SpaceConfig(steps=(5, 10, 20, 40), samplers=("ddpm", "ddim")),
        rungs=(64, 128, 256, 512, 1024),
        num_workers=2,
    )
    released = SearchConfig(
        weights=("256x256_diffusion.pt", "256x256_diffusion_uncond.pt"),
        classifier="256x256_classifier.pt",
        reference="VIRTUAL_imagenet256_labeled.npz",
        output="adm256/search",
        space=SpaceConfig(
            scales=(0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 12.0),
            steps=(10, 15, 25, 50, 100, 250),
            samplers=("ddpm", "ddim", "dpm_solver"),
        ),
        objective=("fid",),
        rungs=(500, 1_000, 2_000, 5_000, 10_000, 50_000),
        trials=40,
        tolerance=0.02,
        labels="uniform",
        extractor="inception",
        dtype="bfloat16",
        num_gpus=1,
    )
    return {"digits": (DIGITS, digits), "released": ("the released ADM-G on ImageNet 256x256", released)}


def dataset_presets() -> dict[str, tuple[str, PrepareConfig]]:
    """Datasets to prepare."""
    digits = PrepareConfig(source="digits", output="datasets/digits", name="digits", validation_fraction=0.2)
    images = PrepareConfig(source="images", output="datasets/images", name="images", validation_fraction=0.05)
    imagenet = PrepareConfig(
        source="ILSVRC2012_img_train.tar",
        output="datasets/imagenet",
        name="imagenet",
        validation_fraction=0.004,  # the 5,000 images at which classifiers look
        num_workers=8,
    )
    cifar10 = PrepareConfig(source="cifar-10-binary.tar.gz", output="datasets/cifar10", name="cifar10")
    return {
        "digits": (DIGITS, digits),
        "images": ("one's own images: a folder for each class, tars, Parquet, or files with a label map", images),
        "imagenet": ("ILSVRC2012 as it comes: a tar of tars, read without unpacking", imagenet),
        "cifar10": ("CIFAR-10's binary archive, with its own train and test images", cifar10),
    }


def conversion_presets() -> dict[str, tuple[str, ConversionConfig]]:
    """Weights to convert."""
    digits = ConversionConfig(source="digits/diffusion", output="digits/diffusion.pt")
    released = ConversionConfig(source="64x64_diffusion.pt", output="64x64_diffusion.safetensors")
    return {
        "digits": ("the quickstart's diffusion model, for the published code", digits),
        "released": ("a released .pt file, to one that carries its architecture", released),
    }


def average_presets() -> dict[str, tuple[str, AverageConfig]]:
    """Averages of weights to make afterwards."""
    return {
        "digits": ("of the training preset `digits`", AverageConfig(run="digits/diffusion")),
        "folder": ("of the training preset `folder`", AverageConfig(run="folder/diffusion")),
    }


def quickstart_presets() -> dict[str, tuple[str, QuickstartConfig]]:
    """Ways through the quickstart."""
    return {"digits": (DIGITS, QuickstartConfig())}


def doctor_presets() -> dict[str, tuple[str, DoctorConfig]]:
    """Ways to look at a cluster."""
    return {"cluster": ("every node, the store, the tracking server and the network", DoctorConfig())}
