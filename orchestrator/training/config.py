"""What decides a training: one config for the diffusion models, one for the noisy classifier."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, ValidationInfo, field_validator, model_validator
from torch import Tensor

from models.diffusion import DiffusionConfig
from models.ema import gamma_of
from models.samplers import SamplerConfig
from models.unet import ClassifierConfig, UNetConfig, autocast
from orchestrator.config import JobConfig, Operational
from orchestrator.cost import CostConfig
from orchestrator.order import OrderConfig


def passes(every: int, before: int, position: int) -> bool:
    """Whether `position` images, reached after `before` images, is at a mark: the first past a multiple of `every`."""
    return position // every > before // every


class LossScaleConfig(BaseModel, frozen=True, extra="forbid"):
    """The factor that keeps float16 gradients from vanishing, as a power of two; other dtypes go without."""

    initial: float = 20.0  # its logarithm to base 2 at the start
    growth: float = Field(1e-3, ge=0)  # added to the logarithm by a good step
    backoff: float = Field(1.0, gt=0)  # taken from the logarithm by a step whose gradient is not finite
    floor: float = 0.0  # the logarithm never falls below


class TrainingConfig(JobConfig):
    """What training a network takes, whichever it is. Lengths are counted in images, not in steps."""

    remedy: ClassVar[str] = (
        "take the other values from there, choose another --output, or continue one of its checkpoints with the new "
        "values in a run of their own by --branch NEW-OUTPUT"
    )

    # Data and output
    dataset: str  # a prepared dataset's folder
    output: str  # the run's folder
    diffusion: DiffusionConfig
    classes: Literal["model", "dataset"] = "model"  # dataset = model.num_classes becomes what the dataset has
    order: OrderConfig = OrderConfig()
    crop: Literal["center", "random"] = "center"  # ADM's centre crop, or its classifier's random crop
    random_flip: bool = True  # mirror half of the images
    # Length and batches
    total_images: int = Field(gt=0)  # length of the training; a larger one continues a finished training
    extend: Operational[bool] = False  # let a larger total_images stretch lr_schedule linear, too
    seed: int = Field(0, ge=0, lt=2**64)  # order, flips, crops, timesteps, noise and initial weights follow from it
    batch_size: int = Field(256, gt=0)  # images in a step, over all workers
    microbatch_size: Operational[int | None] = Field(None, gt=0)  # largest forward pass of a worker; None = its share
    # Optimizer
    init_from: str | None = None  # start from these weights: a run's folder, a .safetensors or a .pt file of this model
    learning_rate: float = Field(1e-4, gt=0)  # AdamW's learning rate
    weight_decay: float = Field(0.0, ge=0)  # AdamW's weight decay
    warmup_images: int = Field(0, ge=0)  # the learning rate rises linearly over these
    lr_schedule: Literal["constant", "linear"] = "constant"  # after the warm-up; linear = falls to zero at the end
    max_grad_norm: float | None = Field(None, gt=0)  # largest norm of the gradient
    max_nonfinite_steps: Operational[int] = Field(20, ge=0)  # consecutive steps skipped for a non-finite gradient
    loss_scale: LossScaleConfig = LossScaleConfig()
    # Arithmetic
    reduction: Literal["fast", "exact"] = "fast"  # exact = weights equal to the bit on any number of workers; slower
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of convolutions and attention, by autocast
    tf32: bool = False  # let float32 convolutions and products round to TF32 on GPUs that have it; published: no
    recompute: Operational[bool | None] = None  # blocks in the backward pass, slower by a third; None = if needed
    num_threads: Operational[int] = Field(1, gt=0)  # CPU threads of each worker; another number gives other last bits
    compile: Operational[bool] = False  # torch.compile the network: slower to start, faster on long runs
    # Checkpoints and weights
    checkpoint_every: Operational[int] = Field(1_000_000, gt=0)  # images from one checkpoint to the next
    keep_checkpoints: Operational[int] = Field(3, gt=0)  # newest checkpoints that are kept
    keep_every: Operational[int | None] = Field(None, gt=0)  # keep the first past each multiple of this for ever, too
    snapshot_every: Operational[int | None] = Field(None, gt=0)  # images between sets of weights; None = at the end
    restart_from_scratch: Operational[bool] = False  # start at image 0 if no checkpoint can be used
    branch: Operational[str | None] = None  # continue a checkpoint of output in this new run, where fields may differ
    branch_at: Operational[int | None] = None  # images of that checkpoint; None = the newest
    takeover: Operational[bool] = False  # train even if another driver holds the lease on the folder; that one stops
    # Validation and logging
    log_every: Operational[int] = Field(10_000, gt=0)  # images from one line of numbers to the next
    eval_every: Operational[int | None] = Field(None, gt=0)  # evaluate the validation split every N images
    eval_images: Operational[int] = Field(1_000, gt=1)  # images of that split that are evaluated
    profile_steps: Operational[str | None] = None  # as 10:15: trace these steps of this attempt into profile/
    audit_dir: Operational[str | None] = None  # folder for the audit log: what every step consumed, row by row; slow
    # Workers
    num_workers: Operational[int] = Field(1, ge=0)  # training workers; 0 = in this process, without Ray
    num_gpus: Operational[int] = Field(0, ge=0, le=1)  # GPUs for each worker
    max_failures: Operational[int] = Field(3, ge=0)  # attempts in a row that may fail without a new checkpoint
    cost: Operational[CostConfig] = CostConfig()

    @property
    def operational(self) -> frozenset[str]:
        """Return the marked fields, and the length unless the learning rate falls towards it."""
        return super().operational | ({"total_images"} if self.lr_schedule == "constant" else set())

    @property
    def length(self) -> int:
        """Images of the training in whole steps."""
        return -(-self.total_images // self.batch_size) * self.batch_size

    def passes(self, every: int, position: int) -> bool:
        """Whether the step that ended at `position` images is at a mark of `every` images."""
        return passes(every, position - self.batch_size, position)

    def microbatch_rows(self, world_size: int) -> int:
        """Images of a forward pass: a worker's share of a step or less, with reduction=exact a stream's share."""
        if self.reduction == "exact":
            return self.batch_size // self.order.num_streams
        share = self.batch_size // world_size
        return min(self.microbatch_size or share, share)

    def in_dtype(self, network: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`network` with its convolutions and attention computed in the config's dtype."""

        def call(x: Tensor, *args: Any, **inputs: Any) -> Tensor:
            with autocast(x.device, self.dtype):
                return network(x, *args, **inputs)

        return call

    @property
    def profiled(self) -> range:
        """Steps of an attempt that are profiled, counted from 0."""
        begin, _, end = (self.profile_steps or "0:0").partition(":")
        return range(int(begin), int(end))

    @field_validator("profile_steps")
    @classmethod
    def _check_profile_steps(cls, steps: str | None) -> str | None:
        begin, _, end = (steps or "0:1").partition(":")
        if not (begin.isdecimal() and end.isdecimal() and int(begin) < int(end)):
            raise ValueError(f"{steps!r} is not BEGIN:END with BEGIN < END, such as 10:15")
        return steps

    @model_validator(mode="after")
    def _splits_evenly(self) -> "TrainingConfig":
        streams, batch, workers = self.order.num_streams, self.batch_size, max(self.num_workers, 1)
        if streams & (streams - 1):
            raise ValueError(f"order.num_streams={streams} is not a power of two")
        if batch % streams:
            near = f"{max(batch // streams, 1) * streams} or {(batch // streams + 1) * streams}"
            raise ValueError(f"batch_size={batch} is not a multiple of order.num_streams={streams}; use {near}")
        if streams % workers:
            raise ValueError(
                f"num_workers={workers} does not divide order.num_streams={streams}; use a power of two up to {streams}"
            )
        if self.microbatch_size is not None and self.reduction == "exact":
            raise ValueError(
                f"microbatch_size={self.microbatch_size} has no place in reduction=exact, whose microbatches are one "
                f"stream's share, {batch // streams} images; raise order.num_streams to make them smaller"
            )
        return self


class AdmConfig(TrainingConfig):
    """Training a diffusion model."""

    job: ClassVar[str] = "train"

    # Diffusion model
    model: UNetConfig
    label_dropout: float = Field(0.0, ge=0, lt=1)  # share of labels left out; classifier-free guidance needs 0.1 or so
    timesteps: Literal["uniform", "loss_second_moment"] = "uniform"  # how often each is trained; IDDPM section 3.3
    ema_rates: tuple[float, ...] = Field((0.9999,), min_length=1)  # one average of the weights for each rate
    power_emas: tuple[float, ...] = ()  # lengths (sigma_rel) of power-function averages; (0.05, 0.1) = post-hoc EMA
    preview_every: Operational[int] = Field(10_000_000, gt=0)  # images from one picture of samples to the next
    preview: Operational[SamplerConfig] = SamplerConfig(name="ddim", num_steps=25)  # how those samples are drawn

    @field_validator("model", mode="after")
    @classmethod
    def _fit_out_channels(cls, model: UNetConfig, info: ValidationInfo) -> UNetConfig:
        """Give a network for grey images the grey outputs: the default of `out_channels` is that of RGB."""
        diffusion = info.data.get("diffusion")
        if diffusion is None:  # which has an error of its own
            return model
        outputs = 2 if diffusion.learns_variance else 1
        if model.out_channels == 3 * outputs:
            return model.model_copy(update={"out_channels": outputs * model.in_channels})
        if model.out_channels != outputs * model.in_channels:
            raise ValueError(
                f"--model.out-channels {model.out_channels} does not fit --diffusion.variance {diffusion.variance}; "
                f"accepted: {outputs * model.in_channels}"
            )
        return model

    @model_validator(mode="after")
    def _check_averages(self) -> "AdmConfig":
        for rate in self.ema_rates:
            if not 0 <= rate < 1:
                raise ValueError(f"ema_rates has {rate}; a rate is in [0, 1)")
        for sigma_rel in self.power_emas:
            gamma_of(sigma_rel)
        if self.power_emas and self.snapshot_every is None:
            raise ValueError(
                f"power_emas={self.power_emas} are of use only with snapshots to put together afterwards: "
                f"set snapshot_every, to {max(self.total_images // 16, 1)} or so"
            )
        return self


class NoisyClassifierConfig(TrainingConfig):
    """Training the noisy classifier: without averages and previews, at uniform timesteps."""

    job: ClassVar[str] = "train classifier"
    timesteps: ClassVar[Literal["uniform"]] = "uniform"
    ema_rates: ClassVar[tuple[float, ...]] = ()
    power_emas: ClassVar[tuple[float, ...]] = ()

    # Classifier
    model: ClassifierConfig
    weight_decay: float = Field(0.05, ge=0)  # AdamW's weight decay
    crop: Literal["center", "random"] = "random"  # ADM's centre crop, or its classifier's random crop
    noised: bool = True  # train on noised images, as guidance needs; False: on clean images at timestep 0
    loss_scale: LossScaleConfig = LossScaleConfig(initial=16.0)


Config = AdmConfig | NoisyClassifierConfig


class AverageConfig(JobConfig):
    """Which average to make."""

    weights: str = Field(min_length=1)  # the run folder of a training with power_emas
    sigma_rel: float = Field(0.075, gt=0)  # length of the average: the spread of its weights / length of the training
    images: int | None = Field(None, gt=0)  # when, at one of the run's snapshots; None = at the last
    output: str | None = None  # a .safetensors file; None = in the run's weights/posthoc/
