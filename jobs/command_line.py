"""argv -> config -> one call: what all jobs share."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import pydantic
import tyro
import yaml

from orchestrator import storage
from orchestrator.config import JobConfig

Config = TypeVar("Config", bound=JobConfig)
Presets = Mapping[str, tuple[str, Config]]  # name -> (one line of description, config)


def main(
    description: str | None,
    presets: Presets[Config],
    run: Callable[[Config], object],
    plan: Callable[[Config], str],
) -> None:
    """Parse the command line, then `run(config)`; with --dry-run print the config and `plan(config)` instead.

    Exit codes: 0 done, 1 the job failed, 2 the command line or the config is wrong, 130 interrupted. Errors are one
    line on stderr; with ADMIRAL_DEBUG=1 the traceback comes instead.
    """
    config = parse(description, presets, sys.argv[1:])
    try:
        if config.dry_run:
            described = plan(config)
            print(config.model_dump_json(indent=2))
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
    """The config that `argv` asks for: a preset's name or `--preset FILE` first, then overrides of its fields.

    Where there is one preset only, its name may be left out.

    Where the config refers to other settings (`JobConfig.starting_from`), the overrides apply to those.

    Raises:
        SystemExit: 0 after printing help, 2 after one line about what is wrong.
    """
    if argv and argv[0].split("=", 1)[0] == "--preset":
        flag, *rest = argv[0].split("=", 1) + argv[1:]
        if not rest:
            _fail(2, f"{flag} wants a path or URI")
        argv, presets = rest, {rest[0]: ("from a file", _read_preset(rest[0], presets))}
    elif len(presets) == 1 and (not argv or argv[0].startswith("-")):
        argv = [*presets, *argv]
    config = _parse(description, presets, argv)
    if not argv or argv[0] not in presets:
        return config
    about, preset = presets[argv[0]]
    try:
        start = config.starting_from(preset)
    except (ValueError, OSError) as error:
        _fail(2, " ".join(str(error).split()))
    return config if start == preset else _parse(description, {argv[0]: (about, start)}, argv)


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
    """A preset of one's own: YAML or JSON with the fields that differ from the preset that its `preset` names."""
    try:
        tree = yaml.safe_load(storage.read_bytes(storage.resolve(location)))
        if not isinstance(tree, dict):
            raise ValueError("it is no mapping of fields to values")
        base = tree.pop("preset", None if len(presets) > 1 else next(iter(presets)))
        if base not in presets:
            raise ValueError(f"preset: {base} is none of {', '.join(presets)}, one of which it must start from")
        config = presets[base][1]
        return type(config).model_validate(_merged(config.model_dump(), tree))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        _fail(2, f"{location}: {'.'.join(map(str, first['loc']))}: {first['msg'].removeprefix('Value error, ')}")
    except (ValueError, OSError, yaml.YAMLError) as error:
        _fail(2, f"{location}: {' '.join(str(error).split())}")


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with the leaves of `changes` in their places."""
    both = {name: _merged(base[name], value) if isinstance(value, dict) and isinstance(base.get(name), dict) else value
            for name, value in changes.items()}  # fmt: skip
    return {**base, **both}


def _one_line(box: str) -> str:
    """The message out of the box that the parser drew around it."""
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
