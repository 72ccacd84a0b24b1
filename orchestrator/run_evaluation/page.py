"""The HTML page of quality.json: a single file with the table, the curves and samples of the same seeds."""

import base64
from pathlib import Path
from typing import Any

from orchestrator.evaluation.page import template
from orchestrator.search.result import number


def quality_page(result: dict[str, Any], pictures: dict[str, bytes]) -> str:
    """Return the page for the content of quality.json and its pictures (PNG)."""
    encoded = {name: base64.b64encode(data).decode() for name, data in pictures.items()}
    return template(Path(__file__).with_suffix(".html")).render(result=result, number=number, pictures=encoded)
