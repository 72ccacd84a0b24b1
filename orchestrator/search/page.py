"""The report of a search: one self-contained HTML file with the winner, all settings tried, and the pictures."""

from pathlib import Path
from typing import Any

from orchestrator.evaluation.page import template
from orchestrator.search.objectives import sign_of
from orchestrator.search.result import contradictions, format_estimate, has_several_weights, label
from orchestrator.search.space import Setting

Json = dict[str, Any]


def search_page(result: Json, pictures: dict[str, bytes], command: str) -> str:
    """Return the page for the content of search.json.

    pictures: PNGs by file name.
    command: generates samples with the winner's setting.
    """
    several_weights, objective = has_several_weights(result), result["objective"][0]

    def rank(trial: Json) -> tuple[int, float]:
        estimate = trial["objective"].get(objective, trial["metrics"][objective])
        return -trial["n"], sign_of(objective) * estimate["value"]

    return template(Path(__file__).with_suffix(".html")).render(
        result=result,
        winner=result["winner"],
        trials=sorted(result["trials"], key=rank),
        pictures=pictures,
        label=lambda setting: label(Setting(**setting), several_weights),
        format_estimate=format_estimate,
        warnings=contradictions(result),
        command=command,
    )
