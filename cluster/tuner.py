"""Ray Tune: rounds of jobs, where what a round holds is decided once the one before it is done."""

import tempfile
from collections import deque
from collections.abc import Callable, Generator
from typing import Any, Generic, TypeVar

from ray import tune
from ray.tune.search import Searcher
from ray.util import get_node_ip_address

Result = TypeVar("Result")
Job = TypeVar("Job")
Outcome = TypeVar("Outcome")
Rounds = Generator[list[Job], list[Outcome], Result]

DEATHS = 5  # of the process or the node of one trial, after which the rounds end


def run_rounds(work: Callable[[Job], Outcome], rounds: Rounds[Job, Outcome, Result], max_concurrent: int) -> Result:
    """Run every job that `rounds` yields as a trial of its own; send it the outcomes in the jobs' order.

    `rounds` runs in this process and holds all state; nothing of Tune's is kept. A job runs on this process's node and
    reserves no CPU: it asks a shared pool for what costs. At the barrier between
    two rounds no trial is left, hence nothing that a stopped one could hold.

    With `max_concurrent` 0 the jobs run in this process, without Ray, and an error is raised as it is.

    Raises:
        RuntimeError: a job raised an error, or lost its process too often; the others of its round are done.
    """
    if not max_concurrent:
        return _run_here(work, rounds)
    proposer = _Proposer(rounds, max_concurrent)

    def run(config: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"outcome": [work(config["job"][0])]}  # in a list, since Tune flattens dicts
        except Exception as error:  # noqa: BLE001 - raised again by `run_rounds`; Tune would begin the trial again
            return {"error": f"{type(error).__name__}: {error}"}

    with tempfile.TemporaryDirectory(prefix="admiral-tune-") as folder:
        tuner = tune.Tuner(
            tune.with_resources(run, {f"node:{get_node_ip_address()}": 0.001}),  # no CPU, which others might hold
            tune_config=tune.TuneConfig(search_alg=proposer, num_samples=-1, reuse_actors=True),
            run_config=tune.RunConfig(
                storage_path=folder, verbose=0, failure_config=tune.FailureConfig(max_failures=DEATHS)
            ),
        )
        grid: Any = tuner.fit()
        if proposer.error is not None:
            raise proposer.error
        if grid.errors:
            raise RuntimeError(str(grid.errors[0]).strip().splitlines()[-1])
    if not proposer.results:
        raise KeyboardInterrupt
    return proposer.results[0]


def _run_here(work: Callable[[Job], Outcome], rounds: Rounds[Job, Outcome, Result]) -> Result:
    try:
        jobs = next(rounds)
        while True:
            jobs = rounds.send([work(job) for job in jobs])
    except StopIteration as end:
        return end.value


class _Proposer(Searcher, Generic[Job, Outcome, Result]):
    """What Tune asks for the next trial, and tells of finished ones."""

    def __init__(self, rounds: Rounds[Job, Outcome, Result], max_concurrent: int) -> None:
        super().__init__()
        self._rounds, self._max_concurrent = rounds, max_concurrent
        self._waiting: deque[tuple[int, Job]] = deque()
        self._running: dict[str, int] = {}
        self._outcomes: dict[int, Outcome] | None = None  # of this round, by the job's number
        self._failed = False
        self.results: list[Result] = []
        self.error: Exception | None = None

    def suggest(self, trial_id: str) -> Any:
        if self._failed:
            return None if self._running else self.FINISHED
        if not self._waiting and not self._running:
            try:
                self._next_round()
            except StopIteration as end:
                self.results.append(end.value)
                return self.FINISHED
            except Exception as error:  # noqa: BLE001 - raised again by `run_rounds`, outside of Tune's loop
                self.error = error
                return self.FINISHED
        if not self._waiting or len(self._running) >= self._max_concurrent:
            return None
        number, job = self._waiting.popleft()
        self._running[trial_id] = number
        return {"job": [job]}

    def _next_round(self) -> None:
        """Ask for rounds until one holds a job."""
        while not self._waiting:
            if self._outcomes is None:
                jobs = next(self._rounds)
            else:
                jobs = self._rounds.send([self._outcomes[number] for number in sorted(self._outcomes)])
            self._outcomes = {}
            self._waiting.extend(enumerate(jobs))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        number = self._running.pop(trial_id)
        if result is not None and "error" in result:
            self.error = RuntimeError(result["error"])
        if error or result is None or self.error is not None:
            self._failed = True
            return
        assert self._outcomes is not None
        self._outcomes[number] = result["outcome"][0]

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """A job reports once, when it is done."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """The rounds keep their own records; Tune's pickles are not used."""

    def __getstate__(self) -> dict[str, Any]:
        return {}
