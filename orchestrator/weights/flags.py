"""The flags of guided-diffusion and improved-diffusion, and the network that they describe.

A `.pt` file of these repositories does not contain its architecture. The flags of the training script define it. An
omitted flag has the default of its repository, and two defaults differ between the repositories (`_SCALING_FLAGS`).
"""

import argparse
import difflib
import shlex
from functools import partial
from typing import Any, Literal, NamedTuple, NoReturn, get_args

from pydantic import TypeAdapter, ValidationError

from models.diffusion import DiffusionConfig
from models.unet import Architecture, ClassifierConfig, UNetConfig
from models.zoo import MULT_64, MULT_128, MULT_256, MULT_512
from orchestrator.weights.shapes import Kind, Shapes, network_kind, num_classes_of

Code = Literal["guided-diffusion", "improved-diffusion"]
CODES: tuple[Code, ...] = get_args(Code)

# Defaults by flag. The type of the default is the type of the flag.
_DEFAULTS: dict[str, Any] = {
    "image_size": 64,
    "large_size": 256,
    "small_size": 64,
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 4,
    "num_heads_upsample": -1,
    "num_head_channels": -1,
    "attention_resolutions": (16, 8),
    "channel_mult": (),
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
    "classifier_attention_resolutions": (32, 16, 8),
    "classifier_use_scale_shift_norm": True,
    "classifier_resblock_updown": True,
    "classifier_pool": "attention",
}
# The flags whose defaults differ: False in guided-diffusion, True in improved-diffusion.
_SCALING_FLAGS = ("rescale_timesteps", "rescale_learned_sigmas")
# Flags that only one of the repositories has.
_OWN_FLAGS: dict[Code, set[str]] = {
    "guided-diffusion": {"num_head_channels", "channel_mult", "resblock_updown", "use_new_attention_order"}
    | {flag for flag in _DEFAULTS if flag.startswith("classifier_")},
    "improved-diffusion": {"sigma_small"},
}
# Flags of training, sampling and memory, which do not change what the network computes.
_IGNORED_FLAGS = {
    "data_dir", "val_data_dir", "schedule_sampler", "lr", "weight_decay", "lr_anneal_steps", "anneal_lr",
    "batch_size", "microbatch", "ema_rate", "log_interval", "eval_interval", "save_interval", "resume_checkpoint",
    "use_fp16", "fp16_scale_growth", "classifier_use_fp16", "use_checkpoint", "noised", "iterations",
    "clip_denoised", "num_samples", "use_ddim", "model_path", "classifier_path", "classifier_scale",
    "base_samples", "timestep_respacing",
}  # fmt: skip
# Default channel_mult by image size.
_CHANNEL_MULT: dict[Code, dict[int, tuple[float, ...]]] = {
    "guided-diffusion": {64: MULT_64, 128: MULT_128, 256: MULT_256, 512: MULT_512},
    "improved-diffusion": {32: (1, 2, 2, 2), 64: MULT_64, 256: MULT_256},
}
_UPSAMPLER_MULT: dict[Code, dict[int, tuple[float, ...]]] = {
    "guided-diffusion": {64: MULT_64, 256: MULT_256, 512: MULT_256},
    "improved-diffusion": {64: MULT_64, 256: MULT_256},
}


class PublishedFlags(NamedTuple):
    """The flags that the user passed, and the repositories that have all of them."""

    given: dict[str, Any]  # flag -> value, of flags that define the network
    ignored: tuple[str, ...]  # flags of training, sampling and memory
    codes: tuple[Code, ...]

    def describe(self, shapes: Shapes) -> tuple[Architecture, DiffusionConfig]:
        """Return the architecture and the diffusion process of a file with these tensors.

        The tensors determine what the flags do not: whether the network is a diffusion model, an upsampler or a
        classifier, and the number of classes, which is a constant in the repositories.

        Raises:
            ValueError: the flags define no valid network, or the two repositories would give different ones.
        """
        kind, num_classes = network_kind(shapes) or "diffusion model", num_classes_of(shapes) or 1000
        self._check_kind(kind)
        networks, errors = [], []
        for code in self.codes:
            values = _DEFAULTS | dict.fromkeys(_SCALING_FLAGS, code == "improved-diffusion") | self.given
            try:
                build = _classifier if kind == "classifier" else _unet
                networks.append((build(code, values, kind, num_classes), _diffusion(values, kind)))
            except ValueError as error:
                errors.append(error)
        if not networks:
            first = errors[0]
            reason = first.errors()[0]["msg"] if isinstance(first, ValidationError) else str(first)
            raise ValueError(f"--flags: {reason.removeprefix('Value error, ')}") from first
        if len(networks) > 1:
            self._check_scaling()
        return networks[0]

    def _check_kind(self, kind: Kind) -> None:
        """Raise ValueError if the flags set sizes that this kind of network does not have."""
        other_sizes: dict[Kind, tuple[str, ...]] = {
            "upsampler": ("image_size",),
            "diffusion model": ("large_size", "small_size"),
            "classifier": (),
        }
        for flag in self.given.keys() & other_sizes[kind]:
            raise ValueError(
                f"--flags: --{flag} is not a flag for this kind of network; by its first convolution, the file holds "
                f"{'an upsampler' if kind == 'upsampler' else 'no upsampler'}; omit the flag"
            )

    def _check_scaling(self) -> None:
        """Raise ValueError if the result depends on a default in which the repositories differ."""
        values = _DEFAULTS | self.given
        if values["diffusion_steps"] == 1000:  # the flags scale by 1000 / steps and by steps / 1000
            return
        # rescale_learned_sigmas scales a term of the loss that needs learned variances, and use_kl has another loss.
        relevant = _SCALING_FLAGS if values["learn_sigma"] and not values["use_kl"] else _SCALING_FLAGS[:1]
        if missing := [flag for flag in relevant if flag not in self.given]:
            raise ValueError(
                f"--flags fit both {' and '.join(CODES)}, whose defaults of {' and '.join(missing)} are False and "
                f"True; add --flags-from {' or '.join(CODES)}"
            )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"--flags: {message}; pass flags and values, as in '--num_channels 128 --learn_sigma True'")


def parse_flags(text: str, code: Code | None = None) -> PublishedFlags:
    """Parse flags as the published scripts do: `--flag value` or `--flag=value`. The last occurrence of a flag counts.

    If `code` is given, flags of both repositories are accepted, because forks mix them.

    Raises:
        ValueError: a flag is unknown, or has a wrong value or none, or flags of both repositories are mixed.
    """
    parser = _Parser(argument_default=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    for flag in _IGNORED_FLAGS:
        parser.add_argument(f"--{flag}")
    for flag in _DEFAULTS:
        parser.add_argument(f"--{flag}", type=partial(_parse_value, flag))
    try:
        arguments = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"--flags {text!r} cannot be split into flags and values: {error}") from error
    if not arguments:
        raise ValueError("--flags is empty; pass the flags that the model was trained with")
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        name = unknown[0].partition("=")[0]
        known_flags = sorted(_IGNORED_FLAGS | _DEFAULTS.keys())
        similar = difflib.get_close_matches(name.strip("-").replace("-", "_"), known_flags, 1)
        hint = f"did you mean --{similar[0]}?" if similar else f"{' and '.join(CODES)} do not have it; omit it"
        raise ValueError(f"--flags: unknown flag {name}; {hint}")
    given = {flag: value for flag, value in vars(parsed).items() if flag in _DEFAULTS}
    ignored = tuple(flag for flag in vars(parsed) if flag in _IGNORED_FLAGS)
    own_flags = {name: sorted(given.keys() & flags) for name, flags in _OWN_FLAGS.items()}
    codes = tuple(name for name in CODES if not any(own_flags[other] for other in CODES if other != name))
    if code is None and not codes:
        mixed = ", ".join(f"--{flags[0]} is a flag of {name} only" for name, flags in own_flags.items())
        raise ValueError(f"--flags: {mixed}; choose the defaults with --flags-from {' or '.join(CODES)}")
    return PublishedFlags(given, ignored, (code,) if code else codes)


def _parse_value(flag: str, text: str) -> Any:
    """Return the value of a flag, which has the type of its default."""
    value_type = type(_DEFAULTS[flag])
    try:
        if value_type is tuple:
            number_type = float if flag == "channel_mult" else int
            return tuple(number_type(part) for part in text.split(",")) if text else ()
        return TypeAdapter(value_type).validate_python(text)
    except ValueError as error:
        accepted = {bool: "True or False", int: "an integer", float: "a number", tuple: "numbers separated by commas"}
        raise argparse.ArgumentTypeError(f"{text}: expected {accepted[value_type]}") from error


def _unet(code: Code, values: dict[str, Any], kind: Kind, num_classes: int) -> UNetConfig:
    is_upsampler = kind == "upsampler"
    size = values["large_size"] if is_upsampler else values["image_size"]
    defaults = _UPSAMPLER_MULT if is_upsampler else _CHANNEL_MULT
    mult = values["channel_mult"] or _default_channel_mult(defaults[code], code, size)
    return UNetConfig(
        image_size=size,
        low_res_size=values["small_size"] if is_upsampler else None,
        model_channels=values["num_channels"],
        out_channels=6 if values["learn_sigma"] else 3,
        num_res_blocks=values["num_res_blocks"],
        channel_mult=mult,
        attention_resolutions=_attention_sizes(size, mult, values["attention_resolutions"]),
        num_heads=values["num_heads"],
        num_heads_upsample=_none_if_unset(values["num_heads_upsample"]),
        num_head_channels=_none_if_unset(values["num_head_channels"]),
        dropout=values["dropout"],
        use_scale_shift_norm=values["use_scale_shift_norm"],
        resblock_updown=values["resblock_updown"],
        use_new_attention_order=values["use_new_attention_order"],
        num_classes=num_classes if values["class_cond"] else None,
    )


def _classifier(code: Code, values: dict[str, Any], kind: Kind, num_classes: int) -> ClassifierConfig:
    if code != "guided-diffusion":
        raise ValueError(f"the file holds a {kind}, because it has no output_blocks, but {code} has no {kind}")
    size = values["image_size"]
    mult = _default_channel_mult(_CHANNEL_MULT[code], code, size)
    return ClassifierConfig(
        image_size=size,
        model_channels=values["classifier_width"],
        num_res_blocks=values["classifier_depth"],
        channel_mult=mult,
        attention_resolutions=_attention_sizes(size, mult, values["classifier_attention_resolutions"]),
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
    if kind != "classifier":  # a classifier has no prediction, variance or loss of a diffusion model
        # The upsampler scripts of improved-diffusion accept sigma_small, but ignore it.
        fixed_variance = "fixed_small" if values["sigma_small"] and kind != "upsampler" else "fixed_large"
        simple_loss = "rescaled_simple" if values["rescale_learned_sigmas"] else "simple"
        fields |= {
            "prediction": "x_start" if values["predict_xstart"] else "eps",
            "variance": "learned_range" if values["learn_sigma"] else fixed_variance,
            "loss": "rescaled_kl" if values["use_kl"] else simple_loss,
        }
    return DiffusionConfig.model_validate(fields)


def _none_if_unset(number: int) -> int | None:
    """Return None for -1, by which the published code marks an unset flag."""
    return None if number == -1 else number


def _default_channel_mult(defaults: dict[int, tuple[float, ...]], code: Code, size: int) -> tuple[float, ...]:
    """Return the default of an image size; raise ValueError if there is none."""
    if size not in defaults:
        sizes = ", ".join(map(str, defaults))
        raise ValueError(
            f"{code} has no default channel_mult for image_size {size}, only for {sizes}; pass --channel_mult"
        )
    return defaults[size]


def _attention_sizes(size: int, mult: tuple[float, ...], resolutions: tuple[int, ...]) -> tuple[int, ...]:
    """Return the feature map sizes with attention; like the published code, ignore sizes that no feature map has."""
    downsampling_factors = {1 << level for level in range(len(mult))}
    factors = [size // resolution for resolution in resolutions if resolution > 0]
    return tuple(dict.fromkeys(size // factor for factor in factors if factor in downsampling_factors))
