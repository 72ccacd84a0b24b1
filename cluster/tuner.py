"""Rounds of tasks as trials of Ray Tune, which are paused, resumed and stopped between rounds."""

import tempfile
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

from ray import tune
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher
from ray.util import get_node_ip_address

Task = TypeVar("Task")
Numbers = dict[str, float]

MAX_FAILURES = 5  # of the process or the node of a trial; one more ends the rounds


class Round(NamedTuple, Generic[Task]):
    """Tasks that may run at the same time."""

    tasks: list[tuple[str, Task]]  # name of the trial and its task; one task for each trial
    stopped: list[str]  # names of trials to stop


Rounds = Iterator[Round[Task]]


def run_rounds(
    evaluate: Callable[[Task], Numbers], rounds: Rounds[Task], max_concurrent: int, done: Callable[[Task], None]
) -> None:
    """Run the tasks of each round, each as a step of its trial, and request the next round when all have finished.

    evaluate: runs a task and returns the metrics that its trial reports to Tune.
    rounds: runs in this process and holds all state, so that the order in which tasks finish does not matter.
    max_concurrent: number of trials at the same time; 0 = run the tasks in this process, without Ray.
    done: called in this process after each task.

    Between two tasks a trial is paused without a checkpoint, because tasks leave their results on storage. A trial runs
    on the node of this process and reserves no CPU, because a shared pool does the expensive work. If the process of a
    trial dies, its task runs again. Nothing that Tune stores is kept: an interrupted job resumes from its own records.

    Raises:
        RuntimeError: a task raised an error or lost its process too often; the other tasks of its round have finished.
            With `max_concurrent` 0 the error of the task is raised instead, at once.
    """
    if not max_concurrent:
        for found in rounds:
            for _, task in found.tasks:
                evaluate(task)
                done(task)
        return
    scheduler = _RoundScheduler(rounds, max_concurrent, done)
    trial = tune.with_parameters(_Trial, evaluate=evaluate)
    here = {f"node:{get_node_ip_address()}": 0.001}  # this node, without a CPU
    with tempfile.TemporaryDirectory(prefix="admiral-tune-") as folder:
        tuner = tune.Tuner(
            tune.with_resources(trial, here),
            tune_config=tune.TuneConfig(
                search_alg=_Proposals(scheduler), scheduler=scheduler, num_samples=-1, reuse_actors=True
            ),
            run_config=tune.RunConfig(
                storage_path=folder, verbose=0, failure_config=tune.FailureConfig(max_failures=MAX_FAILURES)
            ),
        )
        tuner.fit()
    if scheduler.error is not None:
        raise scheduler.error
    if not scheduler.ended:
        raise KeyboardInterrupt


class _Trial(tune.Trainable):
    """A trial, each step of which runs one task."""

    def setup(self, config: dict[str, Any], evaluate: Callable[[Any], Numbers]) -> None:  # type: ignore[override]
        self._evaluate = evaluate
        self.reset_config(config)

    def step(self) -> dict[str, Any]:
        try:
            return self._evaluate(self._task)
        except Exception as error:  # noqa: BLE001 - `run_rounds` raises it; Tune would restart the trial
            return {"error": f"{type(error).__name__}: {error}"}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        (self._task,) = new_config["task"]  # in a list, because Tune flattens tuples and dicts
        return True


class _RoundScheduler(FIFOScheduler, Generic[Task]):
    """Pauses a trial after its task, resumes it with the next task, and stops it if there is none."""

    def __init__(self, rounds: Rounds[Task], max_concurrent: int, done: Callable[[Task], None]) -> None:
        super().__init__()
        self._rounds, self._max_concurrent, self._done = rounds, max_concurrent, done
        self._waiting: dict[str, Task] = {}  # tasks of this round that have not started, by the trial's name
        self._running: dict[str, Task] = {}  # by Tune's id of the trial
        self._names: dict[str, str] = {}  # of trials, by Tune's id
        self.error: Exception | None = None
        self.ended = False

    def begin(self, trial_id: str) -> Task | None:
        """Return a task for a new trial of Tune; None if there is none at the moment."""
        if not self._names and not self._waiting:
            self._next_round(None)
        name = next((name for name in self._waiting if name not in self._names.values()), None)
        if name is None or len(self._running) >= self._max_concurrent:
            return None
        self._names[trial_id] = name
        self._running[trial_id] = self._waiting.pop(name)
        return self._running[trial_id]

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Return a paused trial that has a task; Tune calls this in every iteration of its loop."""
        if not self._running and not self._waiting and not self.ended:
            self._next_round(tune_controller)
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
            self._done(task)
        tune_controller.pause_trial(trial, should_checkpoint=False)
        return self.NOOP

    def lose(self, trial_id: str) -> None:
        """End the rounds with an error, because a trial lost its process too often."""
        self._running.pop(trial_id, None)
        lost = RuntimeError(f"trial {self._names[trial_id]} lost its process {MAX_FAILURES + 1} times")
        self.error = self.error or lost

    def _next_round(self, tune_controller: Any) -> None:
        """Request rounds until one has a task; stop the trials that the round names."""
        while not self._waiting and not self.ended:
            stopped = set(self._names.values())
            try:
                if self.error is None:
                    found = next(self._rounds)
                    self._waiting, stopped = dict(found.tasks), set(found.stopped)
            except StopIteration:
                self.ended = True
            except Exception as error:  # noqa: BLE001 - `run_rounds` raises it outside of Tune's loop
                self.error = error
            self.ended = self.ended or self.error is not None
            for trial in list(tune_controller.get_live_trials()) if tune_controller else []:
                if self._names.get(trial.trial_id) in stopped:
                    del self._names[trial.trial_id]  # a later task of this name starts a new trial
                    tune_controller.stop_trial(trial)

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Proposals(Searcher):
    """Suggests to Tune the new trials of a round."""

    def __init__(self, scheduler: _RoundScheduler[Any]) -> None:
        super().__init__()
        self._scheduler = scheduler

    def suggest(self, trial_id: str) -> Any:
        task = self._scheduler.begin(trial_id)
        if self._scheduler.ended:
            return self.FINISHED
        return None if task is None else {"task": [task]}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if error:
            self._scheduler.lose(trial_id)

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Write nothing, because Tune's checkpoints are not used."""

    def __getstate__(self) -> dict[str, Any]:
        return {}
