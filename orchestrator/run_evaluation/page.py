"""The page of a run's quality: one self-contained HTML file with the table, the curves and the same seeds."""

import base64
from pathlib import Path
from typing import Any

from orchestrator.evaluation.page import template
from orchestrator.run_evaluation.result import number


def quality_page(result: dict[str, Any], pictures: dict[str, bytes]) -> str:
    """Return the page of quality.json's content and its pictures (PNG)."""
    encoded = {name: base64.b64encode(data).decode() for name, data in pictures.items()}
    return template(Path(__file__).with_suffix(".html")).render(result=result, number=number, pictures=encoded)
