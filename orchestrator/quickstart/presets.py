"""Presets of the quickstart."""

from orchestrator.config import DIGITS
from orchestrator.quickstart.config import QuickstartConfig


def quickstart_presets() -> dict[str, tuple[str, QuickstartConfig]]:
    """Return the presets, with their descriptions."""
    return {"digits": (DIGITS, QuickstartConfig())}
