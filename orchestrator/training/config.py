"""The configs of trainings: one for the diffusion models, one for the noisy classifier."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, ValidationInfo, field_validator, model_validator
from torch import Tensor

from models.diffusion import DiffusionConfig
from models.ema import gamma_of
from models.samplers import SamplerConfig
from models.unet import ClassifierConfig, UNetConfig, autocast
from orchestrator.config import JobConfig, Operational, read_config
from orchestrator.cost import CostConfig
from orchestrator.order import OrderConfig


def passes_multiple(every: int, before: int, position: int) -> bool:
    """Return whether a multiple of `every` lies in (before, position]."""
    return position // every > before // every


class LossScaleConfig(BaseModel, frozen=True, extra="forbid"):
    """The loss scale for float16, a power of two; other dtypes have none."""

    initial: float = 20.0  # base-2 logarithm of the scale at the start
    growth: float = Field(1e-3, ge=0)  # added to the logarithm after a step with a finite gradient
    backoff: float = Field(1.0, gt=0)  # subtracted from the logarithm after a step with a non-finite gradient
    floor: float = 0.0  # smallest value of the logarithm


class TrainingConfig(JobConfig):
    """What all trainings have in common. Lengths and intervals are in images, not in steps."""

    remedy: ClassVar[str] = (
        "use the values of that config, choose another --output, or continue a checkpoint with the new values in a "
        "new run by --branch NEW-OUTPUT"
    )

    # Data and output
    dataset: str  # folder of a prepared dataset
    output: str  # folder of the run
    diffusion: DiffusionConfig
    classes: Literal["model", "dataset"] = "model"  # number of classes: that of model.num_classes or of the dataset
    order: OrderConfig = OrderConfig()
    crop: Literal["center", "random"] = "center"  # centre crop as for ADM, or random crop as for its classifier
    random_flip: bool = True  # mirror each image with probability 1/2
    # Length and batches
    total_images: int = Field(gt=0)  # length of the training in images; a larger value continues a finished training
    extend: Operational[bool] = False  # allow a larger total_images with lr_schedule=linear
    seed: int = Field(0, ge=0, lt=2**64)  # seed of order, flips, crops, timesteps, noise and initial weights
    batch_size: int = Field(256, gt=0)  # images in an optimizer step, over all workers
    microbatch_size: Operational[int | None] = Field(None, gt=0)  # images in a forward pass; None = the worker's share
    # Optimizer
    init_from: str | None = None  # start from these weights: a run's folder, a .safetensors or a .pt file
    learning_rate: float = Field(1e-4, gt=0)  # learning rate of AdamW
    weight_decay: float = Field(0.0, ge=0)  # weight decay of AdamW
    warmup_images: int = Field(0, ge=0)  # the learning rate rises linearly over this many images
    lr_schedule: Literal["constant", "linear"] = "constant"  # after the warm-up; linear = falls to zero at the end
    max_grad_norm: float | None = Field(None, gt=0)  # clip the gradient to this norm; None = no clipping
    max_nonfinite_steps: Operational[int] = Field(20, ge=0)  # consecutive non-finite gradients that are skipped
    loss_scale: LossScaleConfig = LossScaleConfig()
    # Arithmetic
    reduction: Literal["fast", "exact"] = "fast"  # exact = weights equal to the bit on any number of workers
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # precision of convolutions and attention, by autocast
    tf32: bool = False  # allow TF32 in float32 convolutions and matrix products; the published code does not
    recompute: Operational[bool | None] = None  # recompute activations in the backward pass; None = if needed
    num_threads: Operational[int] = Field(1, gt=0)  # CPU threads of each worker; affects the last bits of weights
    compile: Operational[bool] = False  # torch.compile the network: a slower start, but faster on long runs
    # Checkpoints and weights
    checkpoint_every: Operational[int] = Field(1_000_000, gt=0)  # images between two checkpoints
    keep_checkpoints: Operational[int] = Field(3, gt=0)  # how many of the newest checkpoints are kept
    keep_every: Operational[int | None] = Field(None, gt=0)  # also keep the first checkpoint after every N images
    snapshot_every: Operational[int | None] = Field(None, gt=0)  # images between two snapshots; None = at the end
    restart_from_scratch: Operational[bool] = False  # start at image 0 if there are checkpoints but none can be used
    branch: Operational[str | None] = None  # new run that continues a checkpoint of output with other settings
    branch_at: Operational[int | None] = None  # position of that checkpoint in images; None = the newest
    takeover: Operational[bool] = False  # if another driver trains this run, stop it and continue here
    # Validation and logging
    report: Operational[bool] = False  # only write report.html of a run that is being trained or was killed
    log_every: Operational[int] = Field(10_000, gt=0)  # images between two records of metrics
    eval_every: Operational[int | None] = Field(None, gt=0)  # evaluate the validation split every N images
    eval_images: Operational[int] = Field(1_000, gt=1)  # images of the validation split in each evaluation
    profile_steps: Operational[tuple[int, int] | None] = None  # write a profile of steps [BEGIN, END) to profile/
    audit_dir: Operational[str | None] = None  # folder for the audit log of every sample of every step; slow
    # Workers
    num_workers: Operational[int] = Field(1, ge=0)  # training workers; 0 = in this process, without Ray
    num_gpus: Operational[int] = Field(0, ge=0, le=1)  # GPUs for each worker
    max_failures: Operational[int] = Field(3, ge=0)  # consecutive attempts that may fail without a new checkpoint
    cost: Operational[CostConfig] = CostConfig()

    @property
    def operational(self) -> frozenset[str]:
        """Return the operational fields, which include total_images if the learning rate is constant."""
        return super().operational | ({"total_images"} if self.lr_schedule == "constant" else set())

    def starting_from(self, preset: Self) -> Self:
        """Return `preset`, with --report updated by the values in the config.json of the run."""
        if not self.report:
            return preset
        stored = read_config(self.path(self.output))
        fields = {name: value for name, value in stored.items() if name in type(self).model_fields}
        neutral = {"num_workers": 0, "microbatch_size": None}  # those of the preset may not fit the run's batches
        return type(self).model_validate(preset.model_dump() | fields | neutral)

    @property
    def length(self) -> int:
        """Return the length in images, rounded up to whole steps."""
        return -(-self.total_images // self.batch_size) * self.batch_size

    def is_due(self, every: int, position: int) -> bool:
        """Return whether the step that ended at `position` images reached or passed a multiple of `every` images."""
        return passes_multiple(every, position - self.batch_size, position)

    def microbatch_rows(self, world_size: int) -> int:
        """Return the images in a forward pass: a stream's share if exact, else at most a worker's share of a step."""
        if self.reduction == "exact":
            return self.batch_size // self.order.num_streams
        share = self.batch_size // world_size
        return min(self.microbatch_size or share, share)

    def in_dtype(self, network: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return `network` under autocast to the dtype of the config."""

        def call(x: Tensor, *args: Any, **inputs: Any) -> Tensor:
            with autocast(x.device, self.dtype):
                return network(x, *args, **inputs)

        return call

    @model_validator(mode="after")
    def _check_batches(self) -> "TrainingConfig":
        streams, batch, workers = self.order.num_streams, self.batch_size, max(self.num_workers, 1)
        if streams & (streams - 1):
            raise ValueError(f"order.num_streams={streams} is not a power of two")
        if batch % streams:
            accepted = f"{max(batch // streams, 1) * streams} or {(batch // streams + 1) * streams}"
            raise ValueError(f"batch_size={batch} is not a multiple of order.num_streams={streams}; use {accepted}")
        if streams % workers:
            raise ValueError(
                f"num_workers={workers} does not divide order.num_streams={streams}; use a power of two up to {streams}"
            )
        if self.profile_steps and not 0 <= self.profile_steps[0] < self.profile_steps[1]:
            raise ValueError(f"profile_steps={self.profile_steps} is not BEGIN END with BEGIN < END, such as 10 15")
        if self.microbatch_size is not None and self.reduction == "exact":
            raise ValueError(
                f"microbatch_size={self.microbatch_size} cannot be combined with reduction=exact, where a microbatch "
                f"is one stream's share, {batch // streams} images; raise order.num_streams to make it smaller"
            )
        return self


class AdmConfig(TrainingConfig):
    """The training of a diffusion model."""

    job: ClassVar[str] = "train"

    # Diffusion model
    model: UNetConfig
    label_dropout: float = Field(0.0, ge=0, lt=1)  # fraction of dropped labels; about 0.1 for classifier-free guidance
    timesteps: Literal["uniform", "loss_second_moment"] = "uniform"  # how timesteps are sampled; IDDPM section 3.3
    ema_rates: tuple[float, ...] = Field((0.9999,), min_length=1)  # EMA decay of each average of the weights
    power_emas: tuple[float, ...] = ()  # sigma_rel of each power-function average, for post-hoc EMA; such as 0.05 0.1
    preview_every: Operational[int] = Field(10_000_000, gt=0)  # images between two pictures of samples
    preview: Operational[SamplerConfig] = SamplerConfig(name="ddim", num_steps=25)  # The sampler of previews.

    @field_validator("model", mode="after")
    @classmethod
    def _fit_out_channels(cls, model: UNetConfig, info: ValidationInfo) -> UNetConfig:
        """Set out_channels for grey images if it has the value for RGB images, which is the default."""
        diffusion = info.data.get("diffusion")
        if diffusion is None:  # validation of `diffusion` failed, which pydantic reports
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
                raise ValueError(f"ema_rates={rate} is not in [0, 1)")
        for sigma_rel in self.power_emas:
            gamma_of(sigma_rel)
        if self.power_emas and self.snapshot_every is None:
            raise ValueError(
                f"power_emas={self.power_emas} needs snapshots, which post-hoc EMA combines; "
                f"set snapshot_every, for example to {max(self.total_images // 16, 1)}"
            )
        return self


class NoisyClassifierConfig(TrainingConfig):
    """The training of the noisy classifier: uniform timesteps, no averages and no previews."""

    job: ClassVar[str] = "train classifier"
    label_dropout: ClassVar[float] = 0.0
    timesteps: ClassVar[Literal["uniform"]] = "uniform"
    ema_rates: ClassVar[tuple[float, ...]] = ()
    power_emas: ClassVar[tuple[float, ...]] = ()

    # Classifier
    model: ClassifierConfig
    weight_decay: float = Field(0.05, ge=0)  # weight decay of AdamW
    crop: Literal["center", "random"] = "random"  # centre crop as for ADM, or random crop as for its classifier
    noised: bool = True  # train on noised images, as guidance needs; False = on clean images at timestep 0
    loss_scale: LossScaleConfig = LossScaleConfig(initial=16.0)


Config = AdmConfig | NoisyClassifierConfig


class AverageConfig(JobConfig):
    """Which average to compute."""

    weights: str = Field(min_length=1)  # folder of a run that was trained with power_emas
    sigma_rel: float = Field(0.075, gt=0)  # length of the average: its standard deviation / length of the training
    images: int | None = Field(None, gt=0)  # snapshot at which the average ends, in images; None = the last
    output: str | None = None  # a .safetensors file; None = a file in weights/posthoc/ of the run
