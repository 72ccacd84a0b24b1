"""Ray Tune: many trials of one function."""

import tempfile
from collections.abc import Callable
from typing import Any

from ray import tune

Report = Callable[[dict[str, Any]], None]


def run_trials(
    trial: Callable[[dict[str, Any], Report], None],
    settings: list[dict[str, Any]],
    max_concurrent: int,
    on_report: Callable[[dict[str, Any], dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Run `trial(setting, report)` for every setting; answer what each trial reported last, in the settings' order.

    A trial that fails is answered as {"error": reason}; the others go on. `on_report(setting, metrics)` is called
    in this process at each report.
    """

    def run(config: dict[str, Any]) -> None:
        trial(config["setting"], lambda metrics: tune.report({"metrics": metrics}))

    with tempfile.TemporaryDirectory(prefix="admiral-tune-") as folder:
        tuner = tune.Tuner(
            # A trial only asks the shared pool for work, so it takes next to nothing for itself.
            tune.with_resources(run, {"CPU": 0.01}),
            param_space={"setting": tune.grid_search(settings)},
            tune_config=tune.TuneConfig(max_concurrent_trials=max_concurrent),
            run_config=tune.RunConfig(storage_path=folder, verbose=0, callbacks=[_Listener(on_report)]),
        )
        grid: Any = tuner.fit()
        outcomes = {
            _key(result.config["setting"]): result.metrics["metrics"]
            if result.error is None and result.metrics
            else {"error": str(result.error).strip().splitlines()[-1]}
            for result in grid
            if result.config
        }
    return [outcomes.get(_key(setting), {"error": "the trial did not start"}) for setting in settings]


class _Listener(tune.Callback):
    """Tells of each report. Tune saves its callbacks as it goes on; this one has nothing to save."""

    def __init__(self, on_report: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
        self._on_report = on_report

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **_: Any) -> None:
        self._on_report(trial.config["setting"], result["metrics"])

    def __getstate__(self) -> dict[str, Any]:
        return {}


def _key(setting: dict[str, Any]) -> str:
    return repr(sorted(setting.items()))
