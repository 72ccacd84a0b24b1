"""Parse a job's command line into its config, then run the job."""

import difflib
import json
import os
import re
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import pydantic
import yaml

from jobs.options import Option, help_page, options_of
from orchestrator import storage
from orchestrator.config import JobConfig
from orchestrator.redaction import redact_output

Config = TypeVar("Config", bound=JobConfig)
Presets = Mapping[str, tuple[str, Config]]  # name -> (one line of description, config)


def main(
    description: str | None,
    presets: Presets[Config],
    run: Callable[[Config], object],
    plan: Callable[[Config], tuple[JobConfig, str]],
) -> None:
    """Parse the command line and call `run(config)`; with --dry-run print the config and the text that `plan` returns.

    Exit codes: 0 done, 1 the job failed, 2 the command line or the config is wrong, 130 interrupted. An error is one
    line on stderr. With ADMIRAL_DEBUG=1 it is a traceback.
    """
    redact_output()
    config = parse(description, presets, sys.argv[1:])
    try:
        if config.dry_run:
            resolved, text = plan(config)
            print(resolved.model_dump_json(indent=2))
            print(text)
        else:
            run(config)
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("ADMIRAL_DEBUG"):
            raise
        _fail(1, _as_typed(_message(error), options_of(type(config))) + _option_of(error, config))
    except KeyboardInterrupt:
        _fail(130, "interrupted; the same command resumes the job")


def parse(description: str | None, presets: Presets[Config], argv: list[str]) -> Config:
    """Return the config for `argv`, which is a preset's name or `--preset FILE`, then options that change its fields.

    The name may be left out if there is only one preset. If the config refers to settings that are stored elsewhere
    (`JobConfig.starting_from`), the options change those settings.

    Raises:
        SystemExit: with code 0 after printing help, with code 2 after printing one line about an error.
    """
    about = " ".join((description or "").split())
    name = argv[0] if argv else ""
    if name in ("-h", "--help") and len(presets) > 1:
        print(_presets_page(presets, about))
        raise SystemExit(0)
    if name.split("=", 1)[0] == "--preset":
        argv = [*name.split("=", 1), *argv[1:]][1:]  # the path takes the place of a preset's name
        if not argv:
            _fail(2, "--preset needs a value; accepted: the path or URI of a YAML or JSON file")
        presets = {argv[0]: ("from a file", _read_preset(argv[0], presets))}
    elif len(presets) == 1 and (not name or name.startswith("-")):
        argv = [*presets, *argv]
    elif not name or name.startswith("-"):
        _fail(2, f"the first argument must be a preset ({', '.join(presets)}) or --preset FILE")
    elif name not in presets:
        _fail(2, _unknown("preset", name, presets, f"the presets are {', '.join(presets)}"))
    name, *arguments = argv
    summary, preset = presets[name]
    options = options_of(type(preset))
    if "-h" in arguments or "--help" in arguments:
        print(help_page(f"{_program()} {name} [OPTIONS]", f"{about} Preset {name}: {summary}.", preset))
        raise SystemExit(0)
    changes = _parse_options(arguments, options)
    try:
        config = _apply(changes, preset)
        base = config.starting_from(preset)
        return config if base == preset else _apply(changes, base)
    except (ValueError, OSError) as error:
        _fail(2, _as_typed(_message(error), options))


def _presets_page(presets: Presets[Config], about: str) -> str:
    """Return the page of --help without a preset, which lists the presets."""
    usage = f"usage: {_program()} PRESET [OPTIONS]\n       {_program()} --preset FILE [OPTIONS]"
    lines = [usage, "", about, "", "Presets"]
    for name, (summary, _) in presets.items():
        lines += textwrap.wrap(summary, 120, initial_indent=f"  {name:<22}", subsequent_indent=" " * 24)
    end = "`PRESET --help` lists the options. FILE is YAML or JSON with `preset: PRESET` and the fields to change."
    return "\n".join([*lines, "", end])


def _parse_options(arguments: list[str], options: Mapping[str, Option]) -> dict[str, Any]:
    """Return the values that command-line arguments give to the options, as a nested dict like the config."""
    flags = {flag: option for option in options.values() for flag in option.flags}
    tree: dict[str, Any] = {}
    while arguments:
        typed, equals, value = arguments[0].partition("=")
        flag = typed.replace("_", "-")
        if not flag.startswith("--"):
            _fail(2, f"{typed} is not an option or the value of an option; --help lists all options")
        if flag not in flags:
            _fail(2, _unknown("option", typed, [*flags, "--help"], "--help lists all options"))
        option = flags[flag]
        is_negation = flag != option.flag
        if is_negation and equals:
            _fail(2, f"{typed} takes no value; pass {typed}, or {option.flag} {value}")
        if equals:
            values, consumed = [value], 1
        else:
            values = [] if is_negation else _values_of(option, arguments[1:], flags)
            consumed = 1 + len(values)
        arguments = arguments[consumed:]
        if option.is_bool and not values:
            values = ["false" if is_negation else "true"]
        if not option.item and (not values or not (values[0] or option.is_text)):
            _fail(2, f"{typed} needs a value; accepted: {option.accepted}")
        *sections, field = option.name.split(".")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[field] = option.value(values)
    return tree


def _values_of(option: Option, arguments: list[str], flags: Collection[str]) -> list[str]:
    """Return the values of an option: at most one argument, or all before the next option if it takes several values.

    A text may begin with dashes if it is not the name of an option.
    """
    values = []
    for argument in arguments if option.item else arguments[:1]:
        is_flag = argument.partition("=")[0].replace("_", "-") in flags
        if argument.startswith("--") and (is_flag or not option.is_text):
            break
        values.append(argument)
    return values


def _unknown(kind: str, name: str, names: Collection[str], advice: str) -> str:
    """Return the error about a name that is not in `names`. It suggests a similar name, or else ends with `advice`."""
    requested = name.replace("_", "-") if kind == "option" else name.replace("-", "_")
    nested = [n for n in names if n.endswith(f".{requested.removeprefix('--')}") or n.startswith(f"{requested}.")]
    suggestions = [*nested, *difflib.get_close_matches(requested, names, 1)]
    return f"unknown {kind} {name}; " + (f"did you mean {suggestions[0]}?" if suggestions else advice)


# ------------------------------------------------------------------------------------------------ preset files


def _read_preset(location: str, presets: Presets[Config]) -> Config:
    """Return the preset that a YAML or JSON file names in its field `preset`, changed by the file's other fields."""
    try:
        data = storage.read_bytes(storage.resolve(location))
        try:
            tree = json.loads(data)  # it may be indented by tabs, which YAML does not accept
        except ValueError:
            tree = yaml.safe_load(data)
        if not isinstance(tree, dict):
            raise ValueError("the file is not a mapping of fields to values")
        if "preset" not in tree and len(presets) > 1:
            raise ValueError(f"the field preset is missing; set it to one of {', '.join(presets)}")
        base = str(tree.pop("preset", next(iter(presets))))
        if base not in presets:
            raise ValueError(_unknown("preset", base, presets, f"the presets are {', '.join(presets)}"))
        return _apply(tree, presets[base][1])
    except FileNotFoundError:
        _fail(2, f"--preset {location} does not exist")
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark, error.problem or error.context
        position = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        _fail(2, f"{location}: {position}{problem}; the file must be YAML or JSON")
    except (ValueError, OSError, yaml.YAMLError) as error:
        _fail(2, f"{location}: {_message(error)}")


def _apply(changes: dict[str, Any], config: Config) -> Config:
    """Return a validated copy of the config with the values of `changes`, a nested dict.

    Raises:
        ValueError: a field does not exist or a value is not accepted; the message has the dotted name of the field.
    """
    try:
        return type(config).model_validate(_merge(config.model_dump(), changes))
    except pydantic.ValidationError as error:
        raise ValueError(_explain(error, options_of(type(config)))) from error


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a nested dict with the values of `changes`, whose names may be dotted, in place of those of `base`."""
    merged = dict(base)
    for dotted, changed in changes.items():
        name, dot, rest = dotted.partition(".") if isinstance(dotted, str) else (dotted, "", "")
        value = {rest: changed} if dot else changed
        is_nested = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merge(merged[name], value) if is_nested else value
    return merged


# ------------------------------------------------------------------------------------------------ messages


def _explain(error: pydantic.ValidationError, options: Mapping[str, Option]) -> str:
    """Return one line about the first error: the dotted name of the field, its value, and what is accepted."""
    first = error.errors()[0]
    if first["type"] in ("extra_forbidden", "invalid_key"):
        fields = [*options, *dict.fromkeys(name.rpartition(".")[0] for name in options if "." in name)]
        unknown, value = [str(part) for part in first["loc"]], first["input"]
        while isinstance(value, dict) and value:
            key, value = next(iter(value.items()))
            unknown.append(str(key))
        return _unknown("field", ".".join(unknown), fields, "PRESET --help lists all fields")
    path = [part for part in first["loc"] if isinstance(part, str)]  # without positions in lists
    name = ".".join(path)
    if first["type"] != "value_error":  # a check of a type or of bounds, for which pydantic's message is too technical
        shown = options[name].format(first["input"]) if name in options else "a value"
        accepted = options[name].accepted if name in options else f"the fields {name}.*"
        choices = first.get("ctx", {}).get("expected", "").split("'")[1::2]
        similar = difflib.get_close_matches(shown, choices, 1)
        advice = f"; did you mean {similar[0]}?" if similar else ""
        return f"{name}={shown} is not accepted; accepted: {accepted}{advice}"
    # A validator of a nested config names its fields without the name of the config.
    message = first["msg"].removeprefix("Value error, ")
    nested = ".".join(path[:-1] if name in options else path)

    def dotted(match: re.Match[str]) -> str:
        return f"{nested}.{match[0]}" if f"{nested}.{match[0]}" in options else match[0]

    message = re.sub(r"(?<![\w.-])[a-z]\w*(?==)", dotted, message)
    return message if not name or re.search(r"\w=|--", message) else f"{name}: {message}"


def _as_typed(message: str, options: Mapping[str, Option]) -> str:
    """Return a message with the options as the user types them: `num_workers=3` becomes `--num-workers 3`."""

    def typed(match: re.Match[str]) -> str:
        if match["name"] not in options:
            return match[0]
        value = match["value"]
        if value[0] in "(['\"":  # a tuple, a list or a quoted text
            value = re.sub(r"[(),'\"\[\]]", " ", value)
        value = {"None": "none", "True": "true", "False": "false"}.get(value, " ".join(value.split()))
        return f"{options[match['name']].flag} {value}"

    value = r"""'[^']*'|"[^"]*"|\([^)]*\)|\[[^\]]*\]|[^\s;,()]*[^\s;,:.()]"""
    return re.sub(rf"(?<![\w.\-/?&])(?P<name>[a-z][\w.]*)=(?P<value>{value})", typed, message)


def _option_of(error: Exception, config: JobConfig) -> str:
    """Return the option whose value is the path in an error about a file, as ` (--dataset datasets/digits)`, or ""."""
    message = str(error)
    if not isinstance(error, OSError) or "--" in message:
        return ""
    paths = {name: value for name, value in config if isinstance(value, str) and f"/{value}" in message}
    if not paths:
        return ""
    longest = max(paths, key=lambda name: len(paths[name]))
    return f" (--{longest.replace('_', '-')} {paths[longest]})"


def _message(error: Exception) -> str:
    """Return the message of an error as one line, without errno and without quotes around paths."""
    if isinstance(error, OSError) and error.strerror:
        parts = [error.strerror, *map(str, filter(None, (error.filename, error.filename2)))]
        return ": ".join(parts)
    return " ".join(str(error).split())


def _program() -> str:
    return Path(sys.argv[0]).name


def _fail(code: int, message: str) -> NoReturn:
    print(f"{_program()}: error: {message}", file=sys.stderr)
    raise SystemExit(code)
