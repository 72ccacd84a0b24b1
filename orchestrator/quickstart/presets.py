"""Quickstarts by name."""

from orchestrator.config import DIGITS
from orchestrator.quickstart.config import QuickstartConfig


def quickstart_presets() -> dict[str, tuple[str, QuickstartConfig]]:
    """Return the quickstarts by name, each with a line of description."""
    return {"digits": (DIGITS, QuickstartConfig())}
