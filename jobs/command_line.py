"""Parse a job's command line into its config, then run the job."""

import contextlib
import difflib
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeGuard, TypeVar

import pydantic
import tyro
import yaml

from orchestrator import storage
from orchestrator.config import JobConfig
from orchestrator.redaction import redact_output

Config = TypeVar("Config", bound=JobConfig)
Presets = Mapping[str, tuple[str, Config]]  # name -> (one line of description, config)

# Old field name -> new field name. An entry counts where the config lacks the old field and has the new one.
RENAMED = {
    "images": "total_images",
    "checkpoint_images": "checkpoint_every",
    "snapshot_images": "snapshot_every",
    "log_images": "log_every",
    "preview_images": "preview_every",
    "keep_every_images": "keep_every",
    "validation_images": "eval_every",
    "validation_samples": "eval_images",
    "anneal": "lr_schedule",
    "clip_norm": "max_grad_norm",
    "max_bad_steps": "max_nonfinite_steps",
    "flip": "random_flip",
    "use_gpu": "num_gpus",
    "threads": "num_threads",
    "order.seed": "seed",
    "order.window": "order.shuffle_row_groups",
    "record": "audit_dir",
    "price": "cost",
    "price.utilization": "cost.mfu",
    "price.card": "cost.gpu",
    "like": "recipe",
    "copies": "num_memorization_samples",
    "space.steps": "space.num_steps",
    "source": "weights",
    "run": "weights",
    "classifier_images": "classifier_total_images",
    "steps": "num_steps",
    "folder": "images",  # a preset, as is the next
    "photographs": "images",
}


def main(
    description: str | None,
    presets: Presets[Config],
    run: Callable[[Config], object],
    plan: Callable[[Config], tuple[JobConfig, str]],
) -> None:
    """Parse the command line, then `run(config)`; with --dry-run print the two that `plan(config)` returns instead.

    Exit codes: 0 done, 1 the job failed, 2 the command line or the config is wrong, 130 interrupted. Errors are one
    line on stderr; with ADMIRAL_DEBUG=1 the traceback comes instead.
    """
    redact_output()
    config = parse(description, presets, sys.argv[1:])
    try:
        if config.dry_run:
            resolved, described = plan(config)
            print(resolved.model_dump_json(indent=2))
            print(described)
        else:
            run(config)
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("ADMIRAL_DEBUG"):
            raise
        _fail(1, " ".join(str(error).split()))
    except KeyboardInterrupt:
        _fail(130, "interrupted; the same command goes on from here")


def parse(description: str | None, presets: Presets[Config], argv: list[str]) -> Config:
    """Return the config for `argv`: a preset's name or `--preset FILE` first, then overrides of its fields.

    If there is only one preset, its name may be left out.

    If the config refers to other settings (`JobConfig.starting_from`), the overrides apply to those.

    Raises:
        SystemExit: with code 0 after help is printed, with code 2 after one line about what is wrong.
    """
    if argv and argv[0].split("=", 1)[0] == "--preset":
        flag, *rest = argv[0].split("=", 1) + argv[1:]
        if not rest:
            _fail(2, f"{flag} needs a path or URI")
        argv, presets = rest, {rest[0]: ("from a file", _read_preset(rest[0], presets))}
    elif len(presets) == 1 and (not argv or argv[0].startswith("-")):
        argv = [*presets, *argv]
    _check_words(argv, presets)
    config = _parse(description, presets, argv)
    about, preset = presets[argv[0]]
    try:
        start = config.starting_from(preset)
    except (ValueError, OSError) as error:
        _fail(2, " ".join(str(error).split()))
    return config if start == preset else _parse(description, {argv[0]: (about, start)}, argv)


def _check_words(argv: list[str], presets: Presets[Config]) -> None:
    """Exit with code 2 unless `argv` begins with a preset's name and has only options of the preset's config."""
    name = argv[0] if argv else ""
    if name in ("-h", "--help") or name.startswith("--tyro"):
        return
    if not name or name.startswith("-"):
        _fail(2, f"the first argument must be a preset ({', '.join(presets)}) or --preset FILE")
    if name not in presets:
        _fail(2, _unknown("preset", name, presets, f"the presets are {', '.join(presets)}"))
    options = option_names(type(presets[name][1]))
    for word in argv[1:]:
        option = word.split("=", 1)[0]
        if option.startswith("--") and option[2:].replace("-", "_") not in options:
            _fail(2, _unknown("option", option, options, "--help lists all options"))


def option_names(config: type[pydantic.BaseModel]) -> list[str]:
    """Return the options of a job with this config, such as `order.num_streams` and `space.no_continuous`."""
    fields = {name: kind for name, kind in _fields(config).items() if not _is_config(kind)}
    negative = [_negated(name) for name, kind in fields.items() if kind is bool]
    return [*fields, *negative, "help", "tyro_print_completion", "tyro_write_completion"]


def _fields(config: type[pydantic.BaseModel], prefix: str = "") -> dict[str, Any]:
    """Return the type of every field by its dotted name, for nested configs and for their fields."""
    fields: dict[str, Any] = {}
    for name, field in config.model_fields.items():
        fields[prefix + name] = field.annotation
        if _is_config(field.annotation):
            fields |= _fields(field.annotation, f"{prefix}{name}.")
    return fields


def _is_config(kind: Any) -> TypeGuard[type[pydantic.BaseModel]]:
    return inspect.isclass(kind) and issubclass(kind, pydantic.BaseModel)


def _negated(name: str) -> str:
    return re.sub(r"\w+$", r"no_\g<0>", name)


def _unknown(kind: str, name: str, names: Collection[str], otherwise: str) -> str:
    """Return the error about a name that is not in `names`: it suggests a similar name, or says `otherwise`."""
    wanted = name.removeprefix("--").replace("-", "_")
    new = RENAMED.get(re.sub(r"(^|\.)no_(?=\w+$)", r"\1", wanted), "")
    guesses = [RENAMED.get(wanted, ""), _negated(new), new]
    guesses += [known for known in names if known.endswith(f".{wanted}") or known.startswith(f"{new or wanted}.")]
    guesses += difflib.get_close_matches(wanted, names, 1)
    near = next((guess for guess in guesses if guess in names), None)
    if near and kind == "option":
        near = f"--{near.replace('_', '-')}"
    return f"unknown {kind} {name}; " + (f"did you mean {near}?" if near else otherwise)


def _parse(description: str | None, presets: Presets[Config], argv: list[str]) -> Config:
    summary = f"{(description or '').strip()}\n\n--preset FILE, a path or URI, takes the place of a preset's name."
    captured = io.StringIO()
    os.environ.setdefault("COLUMNS", "120")
    try:
        with contextlib.redirect_stderr(captured):
            if argv and argv[0] in presets:
                about, preset = presets[argv[0]]
                return tyro.cli(
                    type(preset),
                    default=preset,
                    args=argv[1:],
                    prog=f"{Path(sys.argv[0]).name} {argv[0]}",
                    description=f"{summary}\n\nPreset {argv[0]}: {about}",
                )
            return tyro.extras.overridable_config_cli(
                dict(presets), args=argv, prog=Path(sys.argv[0]).name, description=summary
            )
    except SystemExit as end:
        if not end.code:
            raise
        _fail(2, _one_line(captured.getvalue()))


def _read_preset(location: str, presets: Presets[Config]) -> Config:
    """Read a preset from a YAML or JSON file, which has the fields that differ from the preset that `preset` names."""
    try:
        tree = yaml.safe_load(storage.read_bytes(storage.resolve(location)))
        if not isinstance(tree, dict):
            raise ValueError("the file must be a mapping of fields to values")
        if "preset" not in tree and len(presets) > 1:
            raise ValueError(f"the field preset is missing; set it to one of {', '.join(presets)}")
        base = str(tree.pop("preset", next(iter(presets))))
        if base not in presets:
            raise ValueError(_unknown("preset", base, presets, f"the presets are {', '.join(presets)}"))
        config = presets[base][1]
        fields = _fields(type(config))
        if unknown := [name for name in _leaves(tree) if name not in fields]:
            raise ValueError(_unknown("field", unknown[0], fields, f"{base} --help lists all fields"))
        return type(config).model_validate(_merged(config.model_dump(), tree))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        _fail(2, f"{location}: {'.'.join(map(str, first['loc']))}: {first['msg'].removeprefix('Value error, ')}")
    except FileNotFoundError:
        _fail(2, f"--preset {location} does not exist")
    except (ValueError, OSError, yaml.YAMLError) as error:
        _fail(2, f"{location}: {' '.join(str(error).split())}")


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of the values in a nested dict."""
    for name, value in tree.items():
        yield from _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [f"{prefix}{name}"]


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with the values of `changes` in place of its own."""
    both = {name: _merged(base[name], value) if isinstance(value, dict) and isinstance(base.get(name), dict) else value
            for name, value in changes.items()}  # fmt: skip
    return {**base, **both}


def _one_line(box: str) -> str:
    """Extract the message from the box that tyro draws around it."""
    lines = [line.strip(" │╭╮╰╯─") for line in box.splitlines()]
    text = " ".join(line for line in lines[1:] if line)  # the first is the box's title
    text = re.sub(r"For further information visit \S+|\[type=.*?input_type=\w+\]", "", text)
    text = re.sub(r"Error parsing (?!--)\S+ 1 validation error for \w+|Value error, ", "", text)
    text = re.sub(r"in \S+ \S+ --help|For full helptext.*|Argument helptext:", "", text)
    text = re.sub(r"-{9,}", "", text)  # borders, where the terminal has no better ones
    return " ".join(text.split())


def _fail(code: int, message: str) -> NoReturn:
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(code)
