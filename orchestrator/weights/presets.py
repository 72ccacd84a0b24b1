"""Conversions by name."""

from orchestrator.config import DIGITS, IMAGES
from orchestrator.weights.config import ConversionConfig


def conversion_presets() -> dict[str, tuple[str, ConversionConfig]]:
    """Weights to convert."""
    digits = ConversionConfig(weights="digits/diffusion", output="digits/diffusion.pt")
    images = ConversionConfig(weights="images/diffusion", output="images/diffusion.pt")
    released = ConversionConfig(weights="64x64_diffusion.pt", output="64x64_diffusion.safetensors")
    return {
        "digits": (f"{DIGITS}: the diffusion model, for the published code", digits),
        "images": (f"{IMAGES}: the diffusion model, for the published code", images),
        "released": ("a released .pt file, to one that carries its architecture", released),
    }
