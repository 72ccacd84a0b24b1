"""Tables of ablations: shared runs, failing rows, results over training seeds, and Admiral's tables."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from orchestrator import storage
from orchestrator.ablations import job
from orchestrator.ablations.config import TABLES, AblationsConfig, with_changes
from orchestrator.ablations.job import plan, run_ablations
from orchestrator.ablations.presets import ablation_presets
from orchestrator.ablations.result import Json, Measured, conclude, table_lines
from orchestrator.data.job import prepare
from orchestrator.training.config import AdmConfig
from orchestrator.training.presets import adm_presets
from tests.benchmarks import findings
from tests.benchmarks.findings import FINDINGS, NOISE, judge
from tests.orchestrator.digits import digits

TABLE: dict[str, Any] = {
    "about": "a table",
    "base": "digits",
    "evaluate": "digits",
    "training": {"total_images": 64, "batch_size": 32, "snapshot_every": 32, "power_emas": [],
                 "model.channel_mult": [1], "model.attention_resolutions": []},
    "evaluation": {"num_samples": 64, "batch_size": 32, "sampler.num_steps": 2, "classifier": None},
    "seeds": [0, 1],
    "rows": {
        "base": {},
        "3 steps": {"evaluation": {"sampler.num_steps": 3}},
        "no AdaGN": {"training": {"model.use_scale_shift_norm": False}},
        "broken": {"training": {"max_nonfinite_steps": 0, "learning_rate": 1e30}},
    },
}  # fmt: skip


def config(folder: str, table: dict[str, Any] = TABLE, **changes: Any) -> AblationsConfig:
    Path(folder, "table.yaml").write_text(yaml.safe_dump(table, sort_keys=False))
    settings = {"store": folder, "table": "table.yaml", "output": "table", "dataset": "digits", "num_workers": 0}
    return AblationsConfig(**settings | changes)


def test_a_table_is_trained_evaluated_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(digits(str(tmp_path)))
    trained: list[str] = []
    train = job.train

    def recording_train(training: AdmConfig) -> str:
        trained.append(training.output)
        return train(training)

    monkeypatch.setattr(job, "train", recording_train)
    result = storage.read_json(run_ablations(config(str(tmp_path))))
    assert len(trained) == 6, "the row of other steps uses the training of the base"
    assert list(result["rows"]) == ["base", "3 steps", "no AdaGN"]
    assert set(result["failed"]) == {"broken, seed 0", "broken, seed 1"} and "finite" in str(result["failed"])
    base, steps, plain = result["rows"].values()
    assert base["parameters"] == steps["parameters"] > plain["parameters"]
    assert [point["images"] for point in base["curve"]] == [32, 64] and not base["differences"]
    difference = steps["differences"]["fd_digits"]
    assert difference["n"] == 2 and "2 training seeds" in difference["note"]
    low, high = difference["interval"]
    assert low < difference["value"] < high
    page = (tmp_path / "table" / "ablations.html").read_text()
    assert all(row in page for row in ("base", "3 steps", "no AdaGN", "broken, seed 0"))
    assert "broken, seed 0" in capsys.readouterr().out

    second_config = config(str(tmp_path), seeds=(0,), rows=("no AdaGN",))
    result = storage.read_json(run_ablations(second_config))
    assert list(result["rows"]) == ["base", "no AdaGN"]
    assert "one training seed" in result["rows"]["no AdaGN"]["differences"]["fd_digits"]["note"]
    assert (tmp_path / "table" / "ablations.png").stat().st_size > 10_000


# ------------------------------------------------------------------------------------------------ the numbers


PAIR: dict[str, str | None] = {"base": None, "other": "base"}


def replicate(row: str, seed: int, mean: float) -> Measured:
    scores = mean + np.random.default_rng(7).standard_normal(200)
    estimate = {"value": mean, "interval": [mean - 0.2, mean + 0.2]}
    point: Json = {"images": 64, "average": "ema", "curve": "ema", "evaluations": 2,
                   "objective": {"fd_digits": estimate}, "metrics": {"recall": {"value": 0.5}}}  # fmt: skip
    quality = {"points": [point], "objective": ["fd_digits"]}
    return Measured(row, seed, quality, point, point["objective"], {"fd_digits": scores}, None, 1.0, 10)


def test_intervals_include_the_spread_over_training_seeds() -> None:
    """In 400 tables with differences around 1 and three seeds, 95% of the intervals cover 1."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        spread = rng.normal(0, 1, (2, 3))
        replicates = [replicate("base", seed, 5 + spread[0, seed]) for seed in range(3)]
        replicates += [replicate("other", seed, 6 + spread[1, seed]) for seed in range(3)]
        low, high = conclude(PAIR, replicates, {})["rows"]["other"]["differences"]["fd_digits"]["interval"]
        covered += low <= 1 <= high
    assert 0.92 <= covered / 400 <= 0.98, covered / 400


def test_one_seed_has_a_note_and_is_paired_by_samples() -> None:
    result = conclude(PAIR, [replicate("base", 0, 5.0), replicate("other", 0, 4.0)], {"x": "lost"})
    difference = result["rows"]["other"]["differences"]["fd_digits"]
    assert difference["value"] == pytest.approx(-1.0) and difference["interval"][1] == pytest.approx(-1.0)
    assert "one training seed" in difference["note"]
    lines = "\n".join(table_lines(result))
    assert "-1 (-1 to -1)" in lines and "x: lost" in lines


def test_a_row_without_a_counterpart_has_no_differences() -> None:
    result = conclude(PAIR, [replicate("other", 0, 4.0)], {"base, seed 0": "out of memory"})
    assert result["rows"]["other"]["differences"] == {}
    result = conclude(PAIR, [replicate("other", 0, 4.0), replicate("base", 1, 5.0)], {})
    assert result["rows"]["other"]["differences"] == {"fd_digits": None}
    assert "4" in "\n".join(table_lines(result))
    with pytest.raises(RuntimeError, match="out of memory"):
        conclude(PAIR, [], {"base, seed 0": "out of memory"})


def test_rows_are_compared_with_the_row_that_they_name() -> None:
    against = {"base": None, "other": "base", "third": "other"}
    result = conclude(
        against, [replicate(row, 0, mean) for row, mean in zip(against, (5.0, 4.0, 1.0), strict=True)], {}
    )
    differences = [result["rows"][row]["differences"]["fd_digits"]["value"] for row in ("other", "third")]
    assert differences == pytest.approx([-1.0, -3.0])


# ------------------------------------------------------------------------------------------------ tables


@pytest.mark.parametrize("name", [path.stem for path in sorted(TABLES.glob("*.yaml"))])
def test_every_row_of_every_included_table_is_a_config(name: str) -> None:
    preset = ablation_presets()[name][1]
    table = preset.read_table()
    trainings = {row: preset.training(table, row, table.seeds[0]) for row in table.rows}
    for row in table.rows:
        preset.evaluation(table, row, table.seeds[0])
        preset.likelihood(table, row, table.seeds[0])
    folders = {training.output: training for training in trainings.values()}
    configs = {training.model_dump_json(exclude={"output"}) for training in trainings.values()}
    assert len(folders) == len(configs), "two folders have the same training"
    if name.endswith("_small"):  # counting the memory of the large ones takes long, and the documents' test does it
        assert f"{len(folders) * len(table.seeds)} trainings" in plan(preset)[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"model.widths": 3}}, "model.widths"),
        ({"training": {"batch_size": "many"}}, "batch_size"),
        ({"base": "nothing"}, "nothing"),
        ({"rows": {"base": {}}}, "rows"),
        ({"rows": {"base": {}, "other": {"against": "nobody"}}}, "nobody"),
        ({"rows": {"depth +1": {}, "depth -1": {"training": {"seed": 1}}}}, "depth \\+1 and depth -1.* same folder"),
        ({"rows": {"base": {}, "few": {"evaluation": {"num_samples": 64}}}}, "few has evaluation.num_samples"),
        ({"colour": "red"}, "unknown field colour$"),
        ({"training": {"learning_rat": 1}}, "did you mean learning_rate"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(config(str(tmp_path), {**TABLE, **changes}))


def test_an_unknown_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--rows nothing"):
        plan(config(str(tmp_path), rows=("nothing",)))


def test_a_selection_of_rows_does_not_move_a_shared_training(tmp_path: Path) -> None:
    rows = {
        "base": {},
        "one": {"training": {"seed": 1}},
        "two": {"training": {"seed": 1}, "evaluation": {"batch_size": 9}},
    }
    folders = set()
    for selection in ((), ("two",)):
        selecting = config(str(tmp_path), {**TABLE, "rows": rows}, rows=selection)
        table = selecting.read_table()
        assert ("one", 0) not in selecting.replicates(table) or not selection
        folders.add(selecting.training(table, "two", 0).output)
    assert folders == {"table/runs/one-seed0"}


def test_fields_are_changed_by_their_dotted_names() -> None:
    preset = adm_presets()["digits"][1]
    result = with_changes(preset, {"model.model_channels": 64, "total_images": 640})
    assert (result.model.model_channels, result.total_images) == (64, 640)
    assert result.model_dump(exclude={"model", "total_images"}) == preset.model_dump(exclude={"model", "total_images"})


def test_every_finding_names_a_row_and_a_metric_of_its_table() -> None:
    presets = ablation_presets()
    for finding in FINDINGS:
        table = presets[finding.table][1].read_table()
        against = table.compared_with()[finding.row]
        assert finding.row in table.rows and against, finding
        same_training = table.rows[finding.row].training == table.rows[against].training
        assert same_training or len(table.seeds) > 1, f"one seed cannot compare two trainings: {finding}"
        objectives = presets[finding.table][1].evaluation(table, finding.row, 0).objective
        assert finding.metric in (*objectives, *(["bits_per_dim", NOISE] if table.likelihood else [])), finding


def test_the_noise_of_gradients_is_measured(small_world: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stored network is loaded without gradients, on which the measurement once failed after 45 minutes."""
    monkeypatch.setattr(findings, "BATCHES", 3)
    assert np.isfinite(findings.change_of_noise(f"{small_world}/digits/diffusion", f"{small_world}/datasets/digits", 0))


def test_a_finding_is_judged_by_its_interval() -> None:
    finding = FINDINGS[0]
    for ends, verdict in (((0.1, 0.3), "agrees"), ((-0.3, -0.1), "disagrees"), ((-0.1, 0.3), "cannot be told")):
        difference = {"value": sum(ends) / 2, "interval": ends, "n": 2}
        assert judge(finding, {"rows": {finding.row: {"differences": {finding.metric: difference}}}})[1] == verdict
    assert judge(finding, {"rows": {}}) == ("not measured", "cannot be told")
