"""Named configs for converting weights."""

from orchestrator.config import DIGITS, IMAGES, IMAGES_CPU
from orchestrator.weights.config import ConversionConfig


def conversion_presets() -> dict[str, tuple[str, ConversionConfig]]:
    """Return (description, config) of every conversion by name."""
    digits = ConversionConfig(weights="digits/diffusion", output="digits/diffusion.pt")
    images = ConversionConfig(weights="images/diffusion", output="images/diffusion.pt")
    images_cpu = ConversionConfig(weights="images_cpu/diffusion", output="images_cpu/diffusion.pt")
    released = ConversionConfig(weights="64x64_diffusion.pt", output="64x64_diffusion.safetensors")
    return {
        "digits": (f"{DIGITS}: the diffusion model, for the published code", digits),
        "images": (f"{IMAGES}: the diffusion model, for the published code", images),
        "images_cpu": (f"{IMAGES_CPU}: the diffusion model, for the published code", images_cpu),
        "released": ("a released .pt file, converted to a file that contains its architecture", released),
    }
