"""Test that the Grafana dashboard loads, and that its queries name series that the code publishes."""

import ast
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = json.loads((ROOT / "cluster" / "deploy" / "grafana.json").read_text())


def strings_of_the_code() -> set[str]:
    """Return every string of the code, the names of numbers among them; those of validation begin with val_."""
    paths = [path for name in ("cluster", "orchestrator") for path in (ROOT / name).rglob("*.py")]
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text()))]
    strings = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return strings | {f"val_{word}" for word in strings}


def test_every_query_names_a_series_that_exists() -> None:
    queries = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    strings = strings_of_the_code()
    for query in queries:
        match = re.fullmatch(r'ray_admiral_([a-z_]+)\{job=~"\$job"\}', query)
        assert match and match[1] in strings, query
    assert len(queries) == len(set(queries)) > 15


def test_panels_do_not_overlap_and_use_the_chosen_prometheus() -> None:
    positions = [tuple(panel["gridPos"][side] for side in "xywh") for panel in DASHBOARD["panels"]]
    assert len(positions) == len(set(positions)) and all(x % w == 0 and x + w <= 24 for x, _, w, _ in positions)
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]+)", json.dumps(DASHBOARD["panels"])))
    assert used == variables == {"datasource", "job"}
