"""Named starting points of the jobs: presets are data, overrides come from the command line."""

from models.diffusion import DiffusionConfig
from models.guidance import GuidanceConfig
from models.samplers import SamplerConfig
from models.unet import ClassifierConfig, UNetConfig
from orchestrator.conversion import ConversionConfig
from orchestrator.doctor import DoctorConfig
from orchestrator.evaluation import EvaluationConfig
from orchestrator.likelihood import LikelihoodConfig
from orchestrator.order import OrderConfig
from orchestrator.preparation import PrepareConfig
from orchestrator.quickstart import QuickstartConfig
from orchestrator.sampling import GenerationConfig
from orchestrator.search import SearchConfig
from orchestrator.training_config import AdmConfig, NoisyClassifierConfig

DIGITS = "the quickstart's 1,797 scanned digits, small enough for two cores"

_COSINE = DiffusionConfig(schedule="cosine", loss="simple")
_LINEAR = DiffusionConfig(schedule="linear", loss="simple")


def _digits_diffusion() -> AdmConfig:
    """At the scans' own 8x8 pixels: enough of an ADM to draw digits after two minutes of two cores."""
    return AdmConfig(
        dataset="datasets/digits",
        output="digits/diffusion",
        model=UNetConfig(
            image_size=8,
            in_channels=1,  # scans are grey
            out_channels=2,
            model_channels=32,
            num_res_blocks=1,
            channel_mult=(1, 2),
            attention_resolutions=(4,),
            num_head_channels=16,
            num_classes=10,
        ),
        diffusion=_COSINE,
        flip=False,  # a mirrored digit is none
        images=89_600,
        batch_size=64,
        learning_rate=2e-3,
        warmup_images=3_200,
        anneal=True,
        clip_norm=1.0,
        ema_rates=(0.995,),
        checkpoint_images=32_000,
        log_images=1_600,
        preview_images=32_000,
        preview=SamplerConfig(name="ddpm", num_steps=25),
        num_workers=2,
    )


def _digits_classifier() -> NoisyClassifierConfig:
    return NoisyClassifierConfig(
        dataset="datasets/digits",
        output="digits/classifier",
        model=ClassifierConfig(
            image_size=8,
            in_channels=1,
            model_channels=32,
            num_res_blocks=1,
            channel_mult=(1, 2),
            attention_resolutions=(4,),
            num_head_channels=16,
            num_classes=10,
        ),
        diffusion=_COSINE,
        crop="center",  # the digits fill their scans: a random crop would cut them
        flip=False,
        images=32_000,
        batch_size=64,
        learning_rate=1e-3,
        anneal=True,
        checkpoint_images=16_000,
        log_images=1_600,
        num_workers=2,
    )


def adm_presets() -> dict[str, tuple[str, AdmConfig]]:
    """Diffusion models to train."""
    return {"digits": (DIGITS, _digits_diffusion()), "imagenet64": ("ADM on ImageNet 64x64", _imagenet64())}


def classifier_presets() -> dict[str, tuple[str, NoisyClassifierConfig]]:
    """Noisy classifiers to train."""
    return {"digits": (DIGITS, _digits_classifier())}


def _imagenet64() -> AdmConfig:
    """The released 64x64 model's recipe (ADM table 11): batch 2048, 3e-4, 540K iterations, dropout 0.1."""
    return AdmConfig(
        dataset="datasets/imagenet",
        output="imagenet64/diffusion",
        model=UNetConfig(
            image_size=64,
            model_channels=192,
            num_res_blocks=3,
            channel_mult=(1, 2, 3, 4),
            attention_resolutions=(32, 16, 8),
            num_head_channels=64,
            num_classes=1000,
            dropout=0.1,
            use_new_attention_order=True,
        ),
        diffusion=_COSINE,
        order=OrderConfig(num_streams=64, window=8),
        images=540_000 * 2048,
        batch_size=2048,
        learning_rate=3e-4,
        ema_rates=(0.9999,),
        num_workers=8,
        use_gpu=True,
    )


def upsampler_presets() -> dict[str, tuple[str, AdmConfig]]:
    """Upsamplers to train: second stages of a cascade."""
    digits = _digits_diffusion()
    model = digits.model.model_copy(update={"image_size": 16, "low_res_size": 8, "attention_resolutions": (8,)})
    changes = {
        "output": "digits/upsampler",
        "model": model,
        "images": 38_400,
        "learning_rate": 1e-3,
        "ema_rates": (0.98,),  # a longer average would still hold the fresh weights after so short a training
        "diffusion": _LINEAR,
    }
    return {"digits": ("scanned digits, 8 to 16 pixels", digits.model_copy(update=changes))}


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
    )
    return {"digits": (DIGITS, digits), "released": ("the released ADM-G on ImageNet 64x64, as recommended", released)}


def evaluation_presets() -> dict[str, tuple[str, EvaluationConfig]]:
    """Samples to measure."""
    digits = EvaluationConfig(
        samples="digits/samples",
        reference="datasets/digits",
        output="digits/evaluation",
        num_workers=2,
    )
    return {"digits": (DIGITS, digits)}


def search_presets() -> dict[str, tuple[str, SearchConfig]]:
    """Searches of guidance scale and steps."""
    digits = SearchConfig(
        weights="digits/diffusion",
        classifier="digits/classifier",
        reference="datasets/digits",
        output="digits/search",
        sampler="ddpm",
        num_workers=2,
    )
    return {"digits": (DIGITS, digits)}


def dataset_presets() -> dict[str, tuple[str, PrepareConfig]]:
    """Datasets to prepare."""
    digits = PrepareConfig(source="digits", output="datasets/digits", name="digits", validation_fraction=0.2)
    images = PrepareConfig(source="images", output="datasets/images", name="images")
    imagenet = PrepareConfig(
        source="ILSVRC2012_img_train.tar", output="datasets/imagenet", name="imagenet", num_workers=8
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


def quickstart_presets() -> dict[str, tuple[str, QuickstartConfig]]:
    """Ways through the quickstart."""
    return {"digits": (DIGITS, QuickstartConfig())}


def doctor_presets() -> dict[str, tuple[str, DoctorConfig]]:
    """Ways to look at a cluster."""
    return {"cluster": ("every node, the store, the tracking server and the network", DoctorConfig())}
