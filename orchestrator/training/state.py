"""The state of a training, and the step that updates it."""

import logging
import math
from collections.abc import Callable, Iterator
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

    eval_images: number of images in an evaluation of the validation split, 0 without validation.

    The host does not wait for the device in a step. The device skips the update of the weights if the gradient is not
    finite. Averages, counts and loss scale depend on this, too; `settle` updates them, at the latest in the next step.
    """

    def __init__(self, config: Config, device: torch.device, eval_images: int = 0) -> None:
        self._config = config
        self._read_norm: Callable[[], float] | None = None  # waits for the norm of a step that is not settled
        torch.manual_seed(int(keyed_rng(Purpose.WEIGHTS, config.seed).integers(2**63)))
        self.model = config.model.build().to(device)
        if device.type == "cuda":  # on CPUs it makes GroupNorm slower
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        for parameter in self.model.parameters():  # so that checkpoints before the first step have these tensors, too
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), device=device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        parameters = dict(self.model.named_parameters())
        self.averages = {
            name: {key: tensor.detach().clone() for key, tensor in parameters.items()} for name in self._decays(1)
        }
        self.timesteps: TimestepSampler = UniformTimesteps(config.diffusion.num_timesteps)
        if config.timesteps == "loss_second_moment":
            self.timesteps = LossSecondMomentTimesteps(config.diffusion.num_timesteps)
        self.best_validation: Tensor | None = None  # losses float64 [images] of the best evaluation
        if eval_images:
            self.best_validation = torch.full((eval_images,), torch.inf, dtype=torch.float64)
        self.best_validation_position = 0
        self.overfits = False  # the validation loss has risen significantly since the best evaluation
        self.position = 0  # images seen
        self.updates = 0  # steps that were not skipped
        self.bad_steps = 0  # steps skipped since the last good one
        self.log2_loss_scale = config.loss_scale.initial if config.dtype == "float16" else 0.0

    @property
    def loss_scale(self) -> float:
        """Return the factor by which the loss and the gradients are multiplied."""
        self.settle()
        return 2.0**self.log2_loss_scale

    def fetch_norm(self, norm: Tensor) -> None:
        """Start to copy the gradient norm of a step, float64 [] on the device, to the host for `settle`."""
        if not norm.is_cuda:
            self._read_norm = norm.item
            return
        host_norm, copied = torch.empty_like(norm, device="cpu", pin_memory=True), torch.cuda.Event()
        host_norm.copy_(norm, non_blocking=True)
        copied.record()

        def wait() -> float:
            copied.synchronize()
            return float(host_norm)

        self._read_norm = wait

    def settle(self) -> None:
        """Wait for the gradient norm of the last step, and update averages, counts and loss scale accordingly.

        Raises:
            ArithmeticError: more than `max_nonfinite_steps` consecutive steps were skipped.
        """
        if self._read_norm is None:
            return
        norm, self._read_norm = self._read_norm(), None
        scaling, is_scaled = self._config.loss_scale, self._config.dtype == "float16"
        if math.isfinite(norm):
            self.updates += 1
            self.bad_steps = 0
            self._update_averages()
            self.log2_loss_scale += scaling.growth if is_scaled else 0.0
            return
        self.bad_steps += 1
        if is_scaled:
            self.log2_loss_scale = max(scaling.floor, self.log2_loss_scale - scaling.backoff)
        if self.bad_steps > self._config.max_nonfinite_steps:
            raise ArithmeticError(
                f"the gradient was not finite in {self.bad_steps} consecutive steps, at "
                f"{self.position - self._config.batch_size:,} images; lower --learning-rate, or check the images there"
            )

    def _update_averages(self) -> None:
        """Update each average e with decay r by the parameters p: e = r e + (1 - r) p, in float32."""
        parameters = [tensor.detach() for tensor in self.model.parameters()]
        decays = self._decays(self.updates)
        for name, average in self.averages.items():
            torch._foreach_lerp_(list(average.values()), parameters, 1 - decays[name])

    def _decays(self, update: int) -> dict[str, float]:
        """Return the decay of each average at an update, counted from 1."""
        powers = {f"power-{s}": power_decay(gamma_of(s), update) for s in self._config.power_emas}
        return {f"ema-{rate}": rate for rate in self._config.ema_rates} | powers

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors of the state by name; they are not copies."""
        self.settle()
        by_name = {f"model.{name}": tensor.detach() for name, tensor in self.model.state_dict().items()}
        for average, tensors in self.averages.items():
            by_name |= {f"{average}.{name}": tensor for name, tensor in tensors.items()}
        for name, parameter in self.model.named_parameters():
            by_name |= {f"optimizer.{key}.{name}": value for key, value in self.optimizer.state[parameter].items()}
        if isinstance(self.timesteps, LossSecondMomentTimesteps):
            by_name["timesteps.history"] = torch.from_numpy(self.timesteps.history)
            by_name["timesteps.counts"] = torch.from_numpy(self.timesteps.counts)
        if self.best_validation is not None:
            by_name[BEST_VALIDATION] = self.best_validation
        return by_name

    def facts(self) -> dict[str, Any]:
        """Return the part of the state that is not tensors, as JSON."""
        self.settle()
        return {name: getattr(self, name) for name in _FACTS}

    def restore(self, run: str, group: Group, at: int | None = None, branching: bool = False) -> bool:
        """Load the newest usable checkpoint of `run`; return False if there is none. Rank 0 reads it for all workers.

        at: load only the checkpoint at this position.
        branching: this is the state of a new run, which may have other averages and another timestep sampler; averages
            that the checkpoint lacks start at its weights.

        Raises:
            UnusableCheckpoints: no checkpoint can be used; some tensors may be overwritten.
            ValueError: the tensors of the checkpoint are not those of this state.
        """
        live, missing = self.tensors(), None
        for part, names in group.broadcast_items(_load_parts(run, live, at, branching)):
            missing = set(live) if missing is None or names is None else missing - set(names)
            group.broadcast([live[name] for name in names or ()])
            self.position = part.position
            for name in _FACTS:
                setattr(self, name, part.facts[name])
        if missing is None:
            return False
        if required := [name for name in missing if not _may_differ(name, branching)]:
            raise ValueError(f"the checkpoint in {run} lacks {min(required)}, which this model has")
        if branching:
            for average in self.averages:
                for name, parameter in self.model.named_parameters():
                    if f"{average}.{name}" in missing:
                        live[f"{average}.{name}"].copy_(parameter.detach())
        return True

    def check_finite(self) -> None:
        """Raise ArithmeticError if a weight, an average or the state of the optimizer is not finite."""
        for name, tensor in self.tensors().items():
            if tensor is not self.best_validation and not tensor.isfinite().all():
                raise ArithmeticError(
                    f"{name} is not finite at {self.position:,} images, so no checkpoint and no weights are written; "
                    "train into another --output with a lower --learning-rate or with --max-grad-norm"
                )


def learning_rate(config: TrainingConfig, position: int) -> float:
    """Return the learning rate of the step at `position` images: warm-up, then constant or linear to zero."""
    warmup = min(1.0, (position + config.batch_size) / config.warmup_images) if config.warmup_images else 1.0
    decay = 1 - position / config.length if config.lr_schedule == "linear" else 1.0
    return config.learning_rate * warmup * decay


def take_step(config: TrainingConfig, state: TrainingState) -> Tensor:
    """Update the weights by the gradients in `.grad`; return the norm of the gradient, float64 [] on the device.

    If the norm is not finite, the weights stay and only the position advances. All workers do the same, because their
    gradients are equal. Raises what `TrainingState.settle` does for the previous step.
    """
    state.settle()
    gradients = [parameter.grad for parameter in state.model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients).double() / state.loss_scale
    if config.max_grad_norm or state.loss_scale != 1.0:
        clipping = (config.max_grad_norm or torch.inf) / (norm + 1e-6)
        torch._foreach_mul_(gradients, (clipping.clamp(max=1.0) / state.loss_scale).float())
    for param_group in state.optimizer.param_groups:
        param_group["lr"] = learning_rate(config, state.position)
    state.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]  # the fused kernel then skips the update
    state.optimizer.step()
    state.position += config.batch_size
    state.fetch_norm(norm)
    return norm


def _load_parts(
    run: str, live: dict[str, Tensor], at: int | None, branching: bool
) -> Iterator[tuple[checkpoints.Checkpoint, list[str] | None]]:
    """Copy the newest usable checkpoint to the tensors `live`; yield each of its parts, with the names of its tensors.

    The names are None where a checkpoint begins. An empty list is a file with none of the tensors of `live`. The parts
    that are yielded hold no tensors, because all workers receive them.
    """
    for part in checkpoints.read_newest(run, at):
        names = list[str]()
        for name, tensor in part.tensors.items():
            if name in live and live[name].shape == tensor.shape:
                live[name].copy_(tensor)
                names.append(name)
            elif not _may_differ(name, branching):
                raise ValueError(
                    f"the checkpoint in {run} has {name} {tuple(tensor.shape)}, which does not fit this model"
                )
        yield checkpoints.Checkpoint(part.position, {}, part.facts), names if part.tensors else None


def _may_differ(name: str, branching: bool) -> bool:
    """Return whether a tensor may be only in a checkpoint or only in the state that is loaded from it."""
    return name == BEST_VALIDATION or (branching and not name.startswith(("model.", "optimizer.", "power-")))
