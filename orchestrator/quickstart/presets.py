"""Quickstarts by name."""

from orchestrator.config import DIGITS
from orchestrator.quickstart.config import QuickstartConfig


def quickstart_presets() -> dict[str, tuple[str, QuickstartConfig]]:
    """Ways through the quickstart."""
    return {"digits": (DIGITS, QuickstartConfig())}
