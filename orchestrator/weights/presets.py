"""Conversions by name."""

from orchestrator.weights.config import ConversionConfig


def conversion_presets() -> dict[str, tuple[str, ConversionConfig]]:
    """Weights to convert."""
    digits = ConversionConfig(weights="digits/diffusion", output="digits/diffusion.pt")
    released = ConversionConfig(weights="64x64_diffusion.pt", output="64x64_diffusion.safetensors")
    return {
        "digits": ("the quickstart's diffusion model, for the published code", digits),
        "released": ("a released .pt file, to one that carries its architecture", released),
    }
