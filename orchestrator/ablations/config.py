"""The config of ablations: a table of trainings that differ in some fields and are evaluated in the same way."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from orchestrator import storage
from orchestrator.config import JobConfig, Operational
from orchestrator.cost import CostConfig
from orchestrator.evaluation.likelihood import LikelihoodConfig
from orchestrator.evaluation.presets import likelihood_presets
from orchestrator.run_evaluation.config import RunEvaluationConfig
from orchestrator.run_evaluation.presets import run_evaluation_presets
from orchestrator.training.config import AdmConfig
from orchestrator.training.presets import adm_presets

TABLES = Path(__file__).parent / "tables"
SHARED_FIELDS = ("objective", "num_samples", "seed", "labels")  # of the evaluation; no row may change them
Changes = dict[str, Any]  # new values by the dotted names of fields, such as model.num_res_blocks
AnyConfig = TypeVar("AnyConfig", bound=JobConfig)


class Row(BaseModel, frozen=True, extra="forbid"):
    """The fields in which a row differs from the other rows of the table."""

    against: str | None = None  # the row with which it is compared; None = the first row
    training: Changes = {}
    evaluation: Changes = {}
    likelihood: Changes = {}


class Table(BaseModel, frozen=True, extra="forbid"):
    """A table of ablations. By default, rows are compared with the first row."""

    about: str  # one line, such as the table of a paper
    base: str  # a preset of jobs/train_adm.py
    evaluate: str  # a preset of jobs/evaluate_run.py
    likelihood: str | None = None  # a preset of jobs/estimate_likelihood.py; None = bits/dim are not computed
    training: Changes = {}  # changes of the preset `base`, for all rows
    evaluation: Changes = {}  # changes of the preset `evaluate`
    bound: Changes = {}  # changes of the preset `likelihood`
    seeds: tuple[int, ...] = Field((0,), min_length=1)  # training seeds; each row is trained with all of them
    rows: dict[str, Row] = Field(min_length=2)

    @model_validator(mode="after")
    def _check_rows(self) -> "Table":
        names: dict[str, str] = {}  # rows by the name of their folder
        for name, row in self.rows.items():
            if (other := names.setdefault(_folder_name(name, 0), name)) != name:
                raise ValueError(
                    f"rows: {other} and {name} would have the same folder, because only letters, digits, '.' and '-' "
                    "are kept in its name; rename one of them"
                )
            if shared := [field for field in SHARED_FIELDS if field in row.evaluation]:
                raise ValueError(
                    f"rows: {name} has evaluation.{shared[0]}, which must be the same for all rows, because they are "
                    "compared on the same samples; set it in the evaluation of the table"
                )
            if row.against is not None and row.against not in self.rows:
                raise ValueError(
                    f"rows: {name} has against={row.against!r}, which is not a row of the table; the rows are "
                    f"{', '.join(self.rows)}"
                )
        return self

    def compared_with(self) -> dict[str, str | None]:
        """Return for each row the row with which it is compared; None for the first row."""
        first = next(iter(self.rows))
        return {name: None if name == first else row.against or first for name, row in self.rows.items()}


class Replicate(NamedTuple):
    """A row with one training seed."""

    row: str
    seed: int

    def __str__(self) -> str:
        return f"{self.row}, seed {self.seed}"


class AblationsConfig(JobConfig):
    """The table and its hardware."""

    table: str  # a YAML file, or the name of a table that comes with Admiral
    output: str  # folder of the results, with runs/ and evaluations/ in it
    rows: Operational[tuple[str, ...]] = ()  # rows to run besides the first one; none = all
    seeds: Operational[tuple[int, ...]] = ()  # seeds of the trainings; none = those of the table
    dataset: str | None = None  # folder of a prepared dataset; None = that of the preset
    together: Operational[int] = Field(1, gt=0)  # trainings that run at the same time
    num_workers: Operational[int] = Field(1, ge=0)  # workers of each training; 0 = in this process, without Ray
    num_gpus: Operational[int] = Field(0, ge=0, le=1)  # GPUs for each worker
    num_threads: Operational[int] = Field(1, gt=0)  # CPU threads of each worker
    cost: Operational[CostConfig] = CostConfig()

    def read_table(self) -> Table:
        """Return the table with the selected seeds.

        Raises:
            ValueError: the file is not a valid table, or it has no such row.
        """
        shipped = TABLES / f"{self.table}.yaml"
        data = shipped.read_bytes() if shipped.exists() else storage.read_bytes(self.path(self.table))
        try:
            table = Table.model_validate(yaml.safe_load(data))
        except yaml.MarkedYAMLError as error:
            line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
            reason = f"{line}{error.problem or error.context}"
            raise ValueError(f"--table {self.table} is not valid YAML: {reason}") from error
        except ValidationError as error:
            raise ValueError(f"--table {self.table}: {_first_error(error)}") from error
        if unknown := [name for name in self.rows if name not in table.rows]:
            raise ValueError(f"--rows {unknown[0]}: there is no such row; the rows are {', '.join(table.rows)}")
        return table.model_copy(update={"seeds": self.seeds or table.seeds})

    def replicates(self, table: Table) -> list[Replicate]:
        """Return the replicates of the selected rows, and of the rows with which they are compared."""
        selected = {next(iter(table.rows)), *(self.rows or table.rows)}
        selected |= {row.against for name, row in table.rows.items() if name in selected and row.against}
        return [Replicate(row, seed) for row in table.rows if row in selected for seed in table.seeds]

    def training(self, table: Table, row: str, seed: int) -> AdmConfig:
        """Return the config of a row's training; rows with the same training share the run of the first of them."""
        first_alike = next(name for name in table.rows if table.rows[name].training == table.rows[row].training)
        changes: Changes = {"seed": seed, "output": f"{self.output}/runs/{_folder_name(first_alike, seed)}"}
        if self.dataset:
            changes["dataset"] = self.dataset
        changes = table.training | table.rows[row].training | changes
        return self._preset_with("base", table.base, adm_presets(), changes)

    def evaluation(self, table: Table, row: str, seed: int) -> RunEvaluationConfig:
        """Return the config of the evaluation of a row's run; all rows use the same labels and noise."""
        output = f"{self.output}/evaluations/{_folder_name(row, seed)}"
        changes: Changes = {"weights": self.training(table, row, seed).output, "output": output}
        if self.dataset:
            changes["reference"] = self.dataset
        changes = table.evaluation | table.rows[row].evaluation | changes
        return self._preset_with("evaluate", table.evaluate, run_evaluation_presets(), changes)

    def likelihood(self, table: Table, row: str, seed: int) -> LikelihoodConfig | None:
        """Return the config of the estimate of a row's bits/dim, or None if the table does not include it."""
        if table.likelihood is None:
            return None
        output = f"{self.output}/likelihoods/{_folder_name(row, seed)}"
        changes: Changes = {"weights": self.training(table, row, seed).output, "output": output}
        if self.dataset:
            changes["dataset"] = self.dataset
        changes = table.bound | table.rows[row].likelihood | changes
        return self._preset_with("likelihood", table.likelihood, likelihood_presets(), changes)

    def _preset_with(
        self, field: str, name: str, presets: Mapping[str, tuple[str, AnyConfig]], changes: Changes
    ) -> AnyConfig:
        """Return the preset that a field of the table names, with these changes and the hardware of this config."""
        if name not in presets:
            raise ValueError(f"the table has {field}: {name}, which is no preset; the presets are {', '.join(presets)}")
        shared_fields = ("store", "tracking", "cost", "num_workers", "num_gpus", "num_threads")
        hardware = {field: getattr(self, field) for field in shared_fields}
        return with_changes(presets[name][1].model_copy(update=hardware), changes)


def _folder_name(row: str, seed: int) -> str:
    """Return the folder name of a row with one training seed."""
    return f"{''.join(c if c.isalnum() or c in '.-' else '-' for c in row)}-seed{seed}"


def with_changes(config: AnyConfig, changes: Changes) -> AnyConfig:
    """Return the config with changed fields, which are given by their dotted names.

    Raises:
        ValueError: there is no such field, or its value is not accepted.
    """
    fields = config.model_dump()
    for name, value in changes.items():
        *path, last = name.split(".")
        parent = fields
        for part in path:
            parent = parent.get(part, {})
        if last not in parent:
            nearest = difflib.get_close_matches(last, parent, 1)
            advice = "--help of the job lists all fields"
            if nearest:
                advice = f"did you mean {'.'.join([*path, *nearest])}?"
            raise ValueError(f"the table has an unknown field {name}; {advice}")
        parent[last] = value
    try:
        return type(config).model_validate(fields)
    except ValidationError as error:
        raise ValueError(f"the table: {_first_error(error)}") from error


def _first_error(error: ValidationError) -> str:
    """Return the first error with the dotted name of its field."""
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"])) or "its values"
    if first["type"] == "extra_forbidden":
        return f"unknown field {name}"
    return f"{name}: {first['msg'].removeprefix('Value error, ')}"
