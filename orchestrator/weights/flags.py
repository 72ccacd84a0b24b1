"""The flags of guided-diffusion and improved-diffusion, and the network that they describe.

A `.pt` file of these repositories does not contain its architecture. The flags of the training script define it. An
omitted flag has the default of its repository, and two defaults differ between the repositories (`_DEFAULTS`).
"""

import difflib
import shlex
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import TypeAdapter, ValidationError

from models.diffusion import DiffusionConfig
from models.unet import Architecture, ClassifierConfig, UNetConfig
from models.zoo import MULT_64, MULT_128, MULT_256, MULT_512
from orchestrator.weights.shapes import Kind, Shapes, network_kind, num_classes_of

Code = Literal["guided-diffusion", "improved-diffusion"]
CODES: tuple[Code, ...] = get_args(Code)

# Defaults by flag. The type of the default is the type of the flag.
_SHARED_DEFAULTS: dict[str, Any] = {
    "image_size": 64,
    "large_size": 256,
    "small_size": 64,
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 4,
    "num_heads_upsample": -1,
    "num_head_channels": -1,
    "attention_resolutions": "16,8",
    "channel_mult": "",
    "dropout": 0.0,
    "class_cond": False,
    "use_scale_shift_norm": True,
    "resblock_updown": False,
    "use_new_attention_order": False,
    "learn_sigma": False,
    "sigma_small": False,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "use_kl": False,
    "predict_xstart": False,
    "rescale_timesteps": False,
    "rescale_learned_sigmas": False,
    "classifier_width": 128,
    "classifier_depth": 2,
    "classifier_attention_resolutions": "32,16,8",
    "classifier_use_scale_shift_norm": True,
    "classifier_resblock_updown": True,
    "classifier_pool": "attention",
}
_DEFAULTS: dict[Code, dict[str, Any]] = {
    "guided-diffusion": _SHARED_DEFAULTS,
    "improved-diffusion": _SHARED_DEFAULTS | {"rescale_timesteps": True, "rescale_learned_sigmas": True},
}
_OWN_FLAGS: dict[Code, set[str]] = {
    "guided-diffusion": {"num_head_channels", "channel_mult", "resblock_updown", "use_new_attention_order"}
    | {flag for flag in _SHARED_DEFAULTS if flag.startswith("classifier_")},
    "improved-diffusion": {"sigma_small"},
}
# Flags of training, sampling and memory, which do not change what the network computes.
_IGNORED = {
    "data_dir", "val_data_dir", "schedule_sampler", "lr", "weight_decay", "lr_anneal_steps", "anneal_lr",
    "batch_size", "microbatch", "ema_rate", "log_interval", "eval_interval", "save_interval", "resume_checkpoint",
    "use_fp16", "fp16_scale_growth", "classifier_use_fp16", "use_checkpoint", "noised", "iterations",
    "clip_denoised", "num_samples", "use_ddim", "model_path", "classifier_path", "classifier_scale",
    "base_samples", "timestep_respacing",
}  # fmt: skip
_CHANNEL_MULT: dict[Code, dict[int, tuple[float, ...]]] = {
    "guided-diffusion": {64: MULT_64, 128: MULT_128, 256: MULT_256, 512: MULT_512},
    "improved-diffusion": {32: (1, 2, 2, 2), 64: MULT_64, 256: MULT_256},
}
_UPSAMPLER_MULT: dict[Code, dict[int, tuple[float, ...]]] = {
    "guided-diffusion": {64: MULT_64, 256: MULT_256, 512: MULT_256},
    "improved-diffusion": {64: MULT_64, 256: MULT_256},
}


@dataclass(frozen=True)
class PublishedFlags:
    """The flags that the user passed, and the repositories that have all of them."""

    given: dict[str, Any]  # flag -> value
    ignored: tuple[str, ...]  # known flags that do not change the network
    codes: tuple[Code, ...]

    def describe(self, shapes: Shapes) -> tuple[Architecture, DiffusionConfig]:
        """Return the architecture and the diffusion process of a file with these tensors.

        The tensors determine what the flags do not: whether the network is a diffusion model, an upsampler or a
        classifier, and the number of classes, which is a constant in the repositories.

        Raises:
            ValueError: there is no such network, or the two repositories would give different ones.
        """
        kind, num_classes = network_kind(shapes) or "diffusion model", num_classes_of(shapes)
        described: dict[Code, tuple[Architecture, DiffusionConfig]] = {}
        refusals = []
        for code in self.codes:
            try:
                described[code] = self._describe(code, kind, num_classes)
            except ValueError as error:
                refusals.append(error)
        if not described:
            raise refusals[0]
        first, *others = (diffusion for _, diffusion in described.values())
        for other in others:
            if _effective(first) != _effective(other):
                raise ValueError(f"--flags fit both {' and '.join(described)}, and {_differing(described)}")
        return next(iter(described.values()))

    def _describe(self, code: Code, kind: Kind, num_classes: int | None) -> tuple[Architecture, DiffusionConfig]:
        values = _DEFAULTS[code] | self.given
        try:
            if kind == "classifier":
                return _classifier(code, values, num_classes or 1000), _diffusion(values, kind)
            for flag in {"image_size"} if kind == "upsampler" else {"large_size", "small_size"}:
                if flag in self.given:
                    raise ValueError(
                        f"--{flag} is not a flag for this kind of network; by its first convolution, the file "
                        f"holds {'an upsampler' if kind == 'upsampler' else 'no upsampler'}"
                    )
            return _unet(code, values, kind == "upsampler", num_classes or 1000), _diffusion(values, kind)
        except ValidationError as error:
            reason = error.errors()[0]
            raise ValueError(f"--flags: {reason['msg'].removeprefix('Value error, ')}") from error
        except ValueError as error:
            raise ValueError(f"--flags: {error}") from error


def parse_flags(text: str, code: Code | None = None) -> PublishedFlags:
    """Parse flags as the published scripts do: `--flag value` or `--flag=value`, and the last occurrence counts.

    If `code` is given, flags of both repositories are accepted, because forks mix them.

    Raises:
        ValueError: a flag is unknown, or has a wrong value or none, or flags of both repositories are mixed.
    """
    given: dict[str, Any] = {}
    ignored: dict[str, None] = {}  # in order, each once
    for flag, value in _pairs(text):
        if flag in _IGNORED:
            ignored[flag] = None
        elif flag in _SHARED_DEFAULTS:
            given[flag] = _value(flag, value)
        else:
            known = sorted(_IGNORED | _SHARED_DEFAULTS.keys())
            near = difflib.get_close_matches(flag.replace("-", "_"), known, 1)
            hint = f"did you mean --{near[0]}?" if near else f"{' and '.join(CODES)} do not have it"
            raise ValueError(f"--flags: unknown flag --{flag}; {hint}")
    own = {name: sorted(given.keys() & flags) for name, flags in _OWN_FLAGS.items()}
    codes = tuple(name for name in CODES if not any(own[other] for other in CODES if other != name))
    if code is None and not codes:
        mixed = ", ".join(f"--{flags[0]} is a flag of {name} only" for name, flags in own.items())
        raise ValueError(f"--flags: {mixed}; choose the defaults with --flags-from {' or '.join(CODES)}")
    return PublishedFlags(given, tuple(ignored), (code,) if code else codes)


def _pairs(text: str) -> list[tuple[str, str]]:
    """Split the string into pairs of a flag without its dashes and a value."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"--flags {text!r}: {error}") from error
    pairs = []
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"--flags: {word!r} is not a flag; pass only flags and values, as in '--num_channels 128'")
        flag, equals, value = word[2:].partition("=")
        if not equals:
            if not words or words[0].startswith("--"):
                raise ValueError(f"--flags: --{flag} needs a value, as in '--num_channels 128 --learn_sigma True'")
            value = words.pop(0)
        pairs.append((flag, value))
    if not pairs:
        raise ValueError("--flags is empty; pass the flags that the model was trained with")
    return pairs


def _value(flag: str, text: str) -> Any:
    kind = type(_SHARED_DEFAULTS[flag])
    try:
        if flag == "channel_mult":
            _numbers(text, float)
        elif flag.endswith("attention_resolutions"):
            _numbers(text, int)
        return TypeAdapter(kind).validate_python(text)
    except ValueError as error:
        kinds = {bool: "True or False", int: "an integer", float: "a number", str: "numbers separated by commas"}
        raise ValueError(f"--flags: --{flag} {text}: expected {kinds[kind]}") from error


def _numbers(text: str, kind: type) -> tuple[Any, ...]:
    return tuple(kind(number) for number in text.split(",")) if text else ()


def _unet(code: Code, values: dict[str, Any], upsampler: bool, num_classes: int) -> UNetConfig:
    size = values["large_size"] if upsampler else values["image_size"]
    mult = _multipliers(code, size, values["channel_mult"], _UPSAMPLER_MULT if upsampler else _CHANNEL_MULT)
    return UNetConfig(
        image_size=size,
        low_res_size=values["small_size"] if upsampler else None,
        model_channels=values["num_channels"],
        out_channels=6 if values["learn_sigma"] else 3,
        num_res_blocks=values["num_res_blocks"],
        channel_mult=mult,
        attention_resolutions=_attended(size, mult, values["attention_resolutions"]),
        num_heads=values["num_heads"],
        num_heads_upsample=_optional(values["num_heads_upsample"]),
        num_head_channels=_optional(values["num_head_channels"]),
        dropout=values["dropout"],
        use_scale_shift_norm=values["use_scale_shift_norm"],
        resblock_updown=values["resblock_updown"],
        use_new_attention_order=values["use_new_attention_order"],
        num_classes=num_classes if values["class_cond"] else None,
    )


def _classifier(code: Code, values: dict[str, Any], num_classes: int) -> ClassifierConfig:
    if code != "guided-diffusion":
        raise ValueError(f"the file holds a classifier, since it has no output_blocks, and {code} has no classifier")
    size = values["image_size"]
    mult = _multipliers(code, size, "", _CHANNEL_MULT)
    return ClassifierConfig(
        image_size=size,
        model_channels=values["classifier_width"],
        num_res_blocks=values["classifier_depth"],
        channel_mult=mult,
        attention_resolutions=_attended(size, mult, values["classifier_attention_resolutions"]),
        num_head_channels=64,  # a constant in guided-diffusion
        use_scale_shift_norm=values["classifier_use_scale_shift_norm"],
        resblock_updown=values["classifier_resblock_updown"],
        pool=values["classifier_pool"],
        num_classes=num_classes,
    )


def _diffusion(values: dict[str, Any], kind: Kind) -> DiffusionConfig:
    if values["noise_schedule"] not in ("linear", "cosine"):
        raise ValueError(f"--noise_schedule {values['noise_schedule']}: expected linear or cosine")
    fields = {
        "schedule": values["noise_schedule"],
        "num_timesteps": values["diffusion_steps"],
        "rescale_timesteps": values["rescale_timesteps"],
    }
    if kind != "classifier":  # for which prediction, variance and loss have no meaning
        # the upsampler scripts of improved-diffusion accept sigma_small, but ignore it
        fixed = "fixed_small" if values["sigma_small"] and kind != "upsampler" else "fixed_large"
        rescaled = "rescaled_simple" if values["rescale_learned_sigmas"] else "simple"
        fields |= {
            "prediction": "x_start" if values["predict_xstart"] else "eps",
            "variance": "learned_range" if values["learn_sigma"] else fixed,
            "loss": "rescaled_kl" if values["use_kl"] else rescaled,
        }
    return DiffusionConfig.model_validate(fields)


def _optional(number: int) -> int | None:
    return None if number == -1 else number


def _multipliers(
    code: Code, size: int, text: str, defaults: dict[Code, dict[int, tuple[float, ...]]]
) -> tuple[float, ...]:
    if text:
        return _numbers(text, float)
    if size not in defaults[code]:
        sizes = ", ".join(map(str, defaults[code]))
        raise ValueError(
            f"{code} has no default channel_mult for image_size {size}, only for {sizes}; pass --channel_mult"
        )
    return defaults[code][size]


def _attended(size: int, mult: tuple[float, ...], text: str) -> tuple[int, ...]:
    """Return the sizes with attention; like the published code, ignore sizes that no feature map has."""
    factors = [size // resolution for resolution in _numbers(text, int) if resolution > 0]
    return tuple(dict.fromkeys(size // factor for factor in factors if factor in {1 << i for i in range(len(mult))}))


def _effective(diffusion: DiffusionConfig) -> DiffusionConfig:
    """Return the diffusion with fields reset that have no effect: scales of 1, and those of unused losses."""
    unscaled = diffusion.num_timesteps == 1000
    changes: dict[str, Any] = {"rescale_timesteps": False} if unscaled else {}
    if diffusion.loss == "rescaled_simple" and (unscaled or not diffusion.learns_variance):
        changes["loss"] = "simple"
    return diffusion.model_copy(update=changes)


def _differing(described: dict[Code, tuple[Architecture, DiffusionConfig]]) -> str:
    """Return how the defaults of the repositories differ for these flags, and what to add to the command."""
    fields = {"rescale_timesteps": "rescale_timesteps", "loss": "rescale_learned_sigmas"}
    found = [flag for field, flag in fields.items() if len({getattr(d, field) for _, d in described.values()}) > 1]
    defaults = "; ".join(f"{code} {' and '.join(f'{f} {_DEFAULTS[code][f]}' for f in found)}" for code in described)
    return f"their defaults differ ({defaults}). Add --flags-from {' or '.join(described)}"
