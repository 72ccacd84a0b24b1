"""Run rounds of tasks as trials of Ray Tune, which are paused, resumed and stopped between the rounds."""

import tempfile
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

from ray import tune
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher
from ray.util import get_node_ip_address

Task = TypeVar("Task")
Metrics = dict[str, float]

MAX_DEATHS = 5  # of the process or node of one trial; after one more, the rounds end with an error


class Round(NamedTuple, Generic[Task]):
    """Tasks that may run at the same time, such as the evaluations of all trials at a rung."""

    tasks: list[tuple[str, Task]]  # (name of the trial, task), at most one task for each trial
    stopped: list[str]  # names of trials that get no more tasks


Rounds = Iterator[Round[Task]]


def run_rounds(
    evaluate: Callable[[Task], Metrics], rounds: Rounds[Task], max_concurrent: int, on_done: Callable[[Task], None]
) -> None:
    """Run the tasks of each round as steps of their trials, and take the next round when all tasks are done.

    Each trial is a trial of Ray Tune, and reports the metrics that `evaluate` returns. Between two tasks it is paused
    without a checkpoint, because the results of a task are on storage. A trial runs on this node and reserves no CPU,
    because a shared pool does the expensive work. If its process dies, its task is repeated. `on_done` is called in
    this process after each task.

    `rounds` runs in this process and holds all state; Tune's state is not kept. Therefore the order in which tasks end
    does not matter, and an interrupted search resumes from its own records.

    With `max_concurrent=0` the tasks run in this process without Ray, and errors are raised unchanged.

    Raises:
        RuntimeError: a task raised an error, or its process died too often; the other tasks of the round are done.
    """
    if not max_concurrent:
        for current in rounds:
            for _, task in current.tasks:
                evaluate(task)
                on_done(task)
        return
    scheduler = _RoundScheduler(rounds, max_concurrent, on_done)
    trial = tune.with_parameters(_Trial, evaluate=evaluate)
    this_node = {f"node:{get_node_ip_address()}": 0.001}  # no CPU, because other jobs may hold all of them
    with tempfile.TemporaryDirectory(prefix="admiral-tune-") as folder:
        tuner = tune.Tuner(
            tune.with_resources(trial, this_node),
            tune_config=tune.TuneConfig(
                search_alg=_NewTrials(scheduler), scheduler=scheduler, num_samples=-1, reuse_actors=True
            ),
            run_config=tune.RunConfig(
                storage_path=folder, verbose=0, failure_config=tune.FailureConfig(max_failures=MAX_DEATHS)
            ),
        )
        tuner.fit()
    if scheduler.error is not None:
        raise scheduler.error
    if not scheduler.ended:  # Tune handles Ctrl-C by returning early
        raise KeyboardInterrupt


class _Trial(tune.Trainable):
    """A trial, each step of which runs one task."""

    def setup(self, config: dict[str, Any], evaluate: Callable[[Any], Metrics]) -> None:  # type: ignore[override]
        self._evaluate = evaluate
        self.reset_config(config)

    def step(self) -> dict[str, Any]:
        try:
            return self._evaluate(self._task)
        except Exception as error:  # noqa: BLE001 - `run_rounds` raises it, and Tune would retry it
            return {"error": f"{type(error).__name__}: {error}"}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        (self._task,) = new_config["task"]  # in a list, because Tune flattens tuples and dicts
        return True


class _RoundScheduler(FIFOScheduler, Generic[Task]):
    """A scheduler that pauses a trial after its task, resumes it with the next one, and stops it at the end."""

    def __init__(self, rounds: Rounds[Task], max_concurrent: int, on_done: Callable[[Task], None]) -> None:
        super().__init__()
        self._rounds, self._max_concurrent, self._on_done = rounds, max_concurrent, on_done
        self._waiting: dict[str, Task] = {}  # tasks of this round that have not begun, by the trial's name
        self._running: dict[str, Task] = {}  # tasks that run, by Tune's id of the trial
        self._names: dict[str, str] = {}  # names of the trials, by Tune's id
        self.error: Exception | None = None
        self.ended = False

    def begin_trial(self, trial_id: str) -> Task | None:
        """Return the first task of a new trial with this id of Tune, or None if no new trial can begin now."""
        if not self._names and not self._waiting:
            self._begin_round(None)
        name = next((name for name in self._waiting if name not in self._names.values()), None)
        if name is None or len(self._running) >= self._max_concurrent:
            return None
        self._names[trial_id] = name
        self._running[trial_id] = self._waiting.pop(name)
        return self._running[trial_id]

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Return a paused trial that has a task. Tune calls this in every iteration."""
        if not self._running and not self._waiting and not self.ended:
            self._begin_round(tune_controller)
        if len(self._running) >= self._max_concurrent:
            return None
        for trial in tune_controller.get_live_trials():
            if trial.status == trial.PAUSED and self._names.get(trial.trial_id) in self._waiting:
                self._running[trial.trial_id] = task = self._waiting.pop(self._names[trial.trial_id])
                trial.set_config({"task": [task]})
                return trial
        return None

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        task = self._running.pop(trial.trial_id)
        if "error" in result:
            self.error = RuntimeError(result["error"])
        else:
            self._on_done(task)
        tune_controller.pause_trial(trial, should_checkpoint=False)
        return self.NOOP

    def record_deaths(self, trial_id: str) -> None:
        """Set the error that ends the rounds, because the process of a trial has died too often."""
        self._running.pop(trial_id, None)
        if self.error is None:
            self.error = RuntimeError(f"the process of trial {self._names[trial_id]} died {MAX_DEATHS + 1} times")

    def _begin_round(self, tune_controller: Any) -> None:
        """Take rounds until one has a task, and stop the trials that get no more tasks. After an error, stop all."""
        while not self._waiting and not self.ended:
            stopped = set(self._names.values())
            try:
                if self.error is None:
                    current = next(self._rounds)
                    self._waiting, stopped = dict(current.tasks), set(current.stopped)
            except StopIteration:
                self.ended = True
            except Exception as error:  # noqa: BLE001 - raised by `run_rounds`, outside Tune's loop
                self.error = error
            self.ended = self.ended or self.error is not None
            trials = list(tune_controller.get_live_trials()) if tune_controller else []
            for trial in trials:
                if self._names.get(trial.trial_id) in stopped:
                    del self._names[trial.trial_id]  # a later task of this name starts a new trial
                    tune_controller.stop_trial(trial)

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _NewTrials(Searcher):
    """A search algorithm that only passes the scheduler's new trials to Tune."""

    def __init__(self, scheduler: _RoundScheduler[Any]) -> None:
        super().__init__()
        self._scheduler = scheduler

    def suggest(self, trial_id: str) -> Any:
        task = self._scheduler.begin_trial(trial_id)
        if self._scheduler.ended:
            return self.FINISHED
        return None if task is None else {"task": [task]}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if error:
            self._scheduler.record_deaths(trial_id)

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Do nothing: the rounds keep their own records, and Tune's pickles are not used."""

    def __getstate__(self) -> dict[str, Any]:
        return {}
