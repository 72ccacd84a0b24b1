"""Everything that training changes, and the one step that changes it."""

import logging
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cluster.collectives import Group
from models.diffusion import LossSecondMomentTimesteps, TimestepSampler, UniformTimesteps
from models.ema import gamma_of, power_decay
from orchestrator.order import Purpose, keyed_rng
from orchestrator.training import checkpoints
from orchestrator.training.config import Config, TrainingConfig

BEST_VALIDATION = "validation.best"  # depends on --eval-every and --eval-images, which may change at any restart
_FACTS = ("updates", "bad_steps", "log2_loss_scale", "best_validation_position", "overfits")

log = logging.getLogger(__name__)


class TrainingState:
    """Weights, their averages, the optimizer, the loss scale, the timestep sampler's history, and the position.

    `eval_images` is how many images of the validation split are looked at, 0 if none.

    The host does not wait for a step: the device decides whether the weights change, and what else depends on that
    (averages, counts, loss scale) follows with `settle`, at the latest in the next step.
    """

    def __init__(self, config: Config, device: torch.device, eval_images: int = 0) -> None:
        self._config = config
        self._last_norm: Callable[[], float] | None = None  # of a step that is not settled
        torch.manual_seed(int(keyed_rng(Purpose.WEIGHTS, config.seed).integers(2**63)))
        self.model = config.model.build().to(device)
        if device.type == "cuda":  # on CPUs it makes GroupNorm slower
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        for parameter in self.model.parameters():  # what the first step would make, so that all states look alike
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), device=device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        self._decays: dict[str, Callable[[int], float]] = {}  # EMA decay of each average at an update
        self._decays |= {f"ema-{rate}": partial(_constant, rate) for rate in config.ema_rates}
        self._decays |= {f"power-{s}": partial(power_decay, gamma_of(s)) for s in config.power_emas}
        self.averages = {name: _copy_of(self.model) for name in self._decays}
        self.timesteps = _timestep_sampler(config)
        self.best_validation: Tensor | None = None  # losses float64 [images] at the best look at the validation split
        if eval_images:
            self.best_validation = torch.full((eval_images,), torch.inf, dtype=torch.float64)
        self.best_validation_position = 0
        self.overfits = False  # since the best look the loss has surely risen
        self.position = 0  # images seen
        self.updates = 0  # steps that were not skipped
        self.bad_steps = 0  # steps skipped since the last good one
        self.log2_loss_scale = config.loss_scale.initial if config.dtype == "float16" else 0.0

    @property
    def loss_scale(self) -> float:
        """The factor on losses, hence on gradients."""
        self.settle()
        return 2.0**self.log2_loss_scale

    def note_step(self, norm: Tensor) -> None:
        """Keep the norm of a step's gradient, float64 [] on the device, until the step is settled."""
        self._last_norm = _to_host(norm)

    def settle(self) -> None:
        """Take in what the last step's norm decides, once it is on the host; weights are as that step left them.

        Raises:
            ArithmeticError: more than `max_nonfinite_steps` steps in a row were skipped.
        """
        if self._last_norm is None:
            return
        norm, self._last_norm = self._last_norm(), None
        scaling, half = self._config.loss_scale, self._config.dtype == "float16"
        if math.isfinite(norm):
            self.updates, self.bad_steps = self.updates + 1, 0
            self._update_averages()
            self.log2_loss_scale += scaling.growth if half else 0.0
            return
        self.bad_steps += 1
        if half:
            self.log2_loss_scale = max(scaling.floor, self.log2_loss_scale - scaling.backoff)
        if self.bad_steps > self._config.max_nonfinite_steps:
            raise ArithmeticError(
                f"the gradient was not finite in {self.bad_steps} steps in a row, at "
                f"{self.position - self._config.batch_size:,} images: lower learning_rate, or look at the last images"
            )

    def _update_averages(self) -> None:
        """e = r e + (1 - r) p for every average's decay r, in float32."""
        parameters = [tensor.detach() for tensor in self.model.parameters()]
        for name, average in self.averages.items():
            torch._foreach_lerp_(list(average.values()), parameters, 1 - self._decays[name](self.updates))

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name: the live tensors, not copies."""
        self.settle()
        found = {f"model.{name}": tensor.detach() for name, tensor in self.model.state_dict().items()}
        for average, tensors in self.averages.items():
            found |= {f"{average}.{name}": tensor for name, tensor in tensors.items()}
        for name, parameter in self.model.named_parameters():
            found |= {f"optimizer.{key}.{name}": value for key, value in self.optimizer.state[parameter].items()}
        if isinstance(self.timesteps, LossSecondMomentTimesteps):
            found["timesteps.history"] = torch.from_numpy(self.timesteps.history)
            found["timesteps.counts"] = torch.from_numpy(self.timesteps.counts)
        if self.best_validation is not None:
            found[BEST_VALIDATION] = self.best_validation
        return found

    def facts(self) -> dict[str, Any]:
        """The rest of it, small enough for JSON."""
        self.settle()
        return {name: getattr(self, name) for name in _FACTS}

    def restore(self, run: str, group: Group, at: int | None = None, branching: bool = False) -> bool:
        """Take over the newest usable checkpoint of `run`, if there is one: rank 0 reads it, file by file, for all.

        at: only the checkpoint at this position. branching: this state is of a new run, whose averages and timestep
        sampler may be others: what the checkpoint lacks of them starts anew, the averages at its weights.

        Raises:
            UnusableCheckpoints: there are some, and none can be used; some tensors may be overwritten.
            ValueError: it holds other tensors than this state.
        """
        live, missing = self.tensors(), None
        for part, names in group.from_first(_loaded(run, live, at, branching)):
            missing = set(live) if missing is None or not names else missing - set(names)
            group.copy_from_first([live[name] for name in names])
            self.position = part.position
            for name in _FACTS:
                setattr(self, name, part.facts[name])
        if lacking := [name for name in missing or () if not _may_differ(name, branching)]:
            raise ValueError(f"the checkpoint in {run} lacks {min(lacking)}, which this model has")
        for average in self.averages if branching else ():
            for name, parameter in self.model.named_parameters():
                if missing and f"{average}.{name}" in missing:
                    live[f"{average}.{name}"].copy_(parameter.detach())
        return missing is not None

    def check_finite(self) -> None:
        """Check that this state may be committed.

        Raises:
            ArithmeticError: a weight, an average or the optimizer holds NaN or infinity.
        """
        for name, tensor in self.tensors().items():
            if tensor is not self.best_validation and not tensor.isfinite().all():
                raise ArithmeticError(
                    f"{name} is not finite at {self.position:,} images, so no checkpoint or weights are written of it: "
                    "lower learning_rate or set max_grad_norm, in another output"
                )


def learning_rate(config: TrainingConfig, position: int) -> float:
    """The learning rate of the step that starts at `position` images: warm-up, then constant or linear to zero."""
    warm = min(1.0, (position + config.batch_size) / config.warmup_images) if config.warmup_images else 1.0
    left = 1 - position / config.length if config.lr_schedule == "linear" else 1.0
    return config.learning_rate * warm * left


def take_step(config: TrainingConfig, state: TrainingState) -> Tensor:
    """One update of the weights by the gradients in place; return their norm, float64 [] on the device.

    Where the norm is not finite the step is skipped and the position goes on: gradients are reduced already, so all
    workers do the same. Raises as `TrainingState.settle` does, for the step before.
    """
    state.settle()
    gradients = [parameter.grad for parameter in state.model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients).double() / state.loss_scale
    if config.max_grad_norm or state.loss_scale != 1.0:
        clipping = (config.max_grad_norm or torch.inf) / (norm + 1e-6)
        torch._foreach_mul_(gradients, (clipping.clamp(max=1.0) / state.loss_scale).float())
    for options in state.optimizer.param_groups:
        options["lr"] = learning_rate(config, state.position)
    state.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]  # the fused kernel skips then
    state.optimizer.step()
    state.position += config.batch_size
    state.note_step(norm)
    return norm


def _to_host(value: Tensor) -> Callable[[], float]:
    """Copy a number to the host behind what the device does; return a function that waits for it."""
    if not value.is_cuda:
        return value.item
    host, copied = torch.empty_like(value, device="cpu", pin_memory=True), torch.cuda.Event()
    host.copy_(value, non_blocking=True)
    copied.record()

    def wait() -> float:
        copied.synchronize()
        return float(host)

    return wait


def _timestep_sampler(config: Config) -> TimestepSampler:
    count = config.diffusion.num_timesteps
    if config.timesteps == "loss_second_moment":
        return LossSecondMomentTimesteps(count)
    return UniformTimesteps(count)


def _constant(rate: float, update: int) -> float:
    return rate


def _copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def _loaded(
    run: str, live: dict[str, Tensor], at: int | None, branching: bool
) -> Iterator[tuple[checkpoints.Checkpoint, list[str]]]:
    """Read the newest usable checkpoint into the tensors `live`; yield of each part the names of its tensors."""
    for part in checkpoints.read_newest(run, at):
        names = []
        for name, tensor in part.tensors.items():
            if name in live and live[name].shape == tensor.shape:
                live[name].copy_(tensor)
                names.append(name)
            elif not _may_differ(name, branching):
                raise ValueError(f"the checkpoint in {run} has {name} {tuple(tensor.shape)}: not this model's")
        yield checkpoints.Checkpoint(part.position, {}, part.facts), names


def _may_differ(name: str, branching: bool) -> bool:
    """Whether a tensor may be in a checkpoint and not in the state that takes it over, or the other way round."""
    return name == BEST_VALIDATION or (branching and not name.startswith(("model.", "optimizer.", "power-")))
