"""The options of a job: names, help texts and accepted values, which are read from the class of its config."""

import ast
import inspect
import re
import shutil
import textwrap
import types
from collections.abc import Iterator, Mapping
from functools import cache
from operator import attrgetter
from typing import Any, Literal, NamedTuple, TypeGuard, Union, get_args, get_origin

import pydantic

from orchestrator.config import MARK


class Option(NamedTuple):
    """A field of a config or of a nested config."""

    name: str  # dotted, such as order.num_streams
    kind: Any  # the type
    bounds: tuple[Any, ...]  # what pydantic checks beside the type
    text: str  # the help text: the comment behind the field
    group: str  # the heading in --help: the comment line above this field or above an earlier one
    is_operational: bool = False  # whether it may change when a job is resumed

    @property
    def flag(self) -> str:
        """Return the option as the user types it."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def flags(self) -> tuple[str, ...]:
        """Return the option and, for a boolean, its negation."""
        negation = re.sub(r"(--|\.)(?=[\w-]+$)", r"\1no-", self.flag)
        return (self.flag, negation) if self.is_bool else (self.flag,)

    @property
    def is_bool(self) -> bool:
        """Return whether the option is a boolean, which needs no value."""
        return bool in _alternatives(self.kind)

    @property
    def is_text(self) -> bool:
        """Return whether a value may be any text."""
        return str in _alternatives(self.kind) or self.item is str

    @property
    def item(self) -> Any:
        """Return the type of each value if the option takes several values, else None."""
        kind = next((kind for kind in _alternatives(self.kind) if get_origin(kind) is tuple), None)
        if kind is None:
            return None
        items = get_args(kind)
        return items[0] if items[-1] is ... else kind

    @property
    def accepted(self) -> str:
        """Return a description of the accepted values."""
        kinds = _alternatives(self.kind)
        description = _describe(next(kind for kind in kinds if kind is not type(None)), self.bounds)
        return f"{description}, or none" if type(None) in kinds else description

    def value(self, arguments: list[str]) -> Any:
        """Return command-line arguments in the structure that pydantic expects for this field."""
        if type(None) in _alternatives(self.kind) and [argument.lower() for argument in arguments] == ["none"]:
            return None
        if self.item is None:
            return arguments[0]
        is_nested = get_origin(self.item) is tuple and self.item != self.kind  # such as tuple[tuple[int, int], ...]
        size = len(get_args(self.item)) if is_nested else 1
        return arguments if size == 1 else [arguments[i : i + size] for i in range(0, len(arguments), size)]

    def format(self, value: Any) -> str:
        """Return a value as the user types it."""
        if isinstance(value, (tuple, list)):
            return " ".join(map(self.format, value))
        return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def options_of(
    config: type[pydantic.BaseModel], prefix: str = "", group: str = "", is_operational: bool = False
) -> dict[str, Option]:
    """Return the options of a config and of its nested configs by dotted name.

    prefix, group, is_operational: for a nested config, its dotted name with a dot at the end, its heading in --help,
    and whether all of its fields are operational.
    """
    options: dict[str, Option] = {}
    texts = _texts(config)
    for name, field in config.model_fields.items():
        text, heading = texts[name]
        operational = is_operational or MARK in field.metadata
        if is_config(kind := field.annotation):
            summary = text or (kind.__doc__ or "").split("\n")[0]
            heading = f"{f'--{prefix}{name}'.replace('_', '-')}.*: {summary}"
            options |= options_of(kind, f"{prefix}{name}.", heading, operational)
        else:
            bounds = tuple(field.metadata)
            options[prefix + name] = Option(prefix + name, kind, bounds, text, group or heading, operational)
    return options


def is_config(kind: Any) -> TypeGuard[type[pydantic.BaseModel]]:
    """Return whether a field of this type is a nested config."""
    return inspect.isclass(kind) and issubclass(kind, pydantic.BaseModel)


def help_page(usage: str, about: str, config: pydantic.BaseModel) -> str:
    """Return the page of --help for a preset.

    It lists all options in groups, each with its value in the config, its help text and its accepted values.
    """
    width = min(shutil.get_terminal_size((120, 24)).columns, 120)
    groups: dict[str, list[str]] = {}
    for option in options_of(type(config)).values():
        value = attrgetter(option.name)(config)
        lines = [f"  {', '.join(option.flags)} {option.format(value)}".rstrip()]
        accepted = "" if option.kind is str else f" Accepted: {option.accepted}."
        mark = f" [{MARK}]" if option.is_operational else ""
        text = f"{option.text.rstrip('.')}.{accepted}{mark}"
        lines += textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False)
        groups.setdefault(option.group, []).extend(lines)
    sections = ["\n".join([heading, *lines]) for heading, lines in groups.items()]
    note = f"Every option is shown with its value in this preset. [{MARK}] options may change when a job is resumed."
    return "\n\n".join([f"usage: {usage}", textwrap.fill(about, width), note, *sections])


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """Return the types of a union, or a tuple of any other type alone."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _describe(kind: Any, bounds: tuple[Any, ...] = ()) -> str:
    """Return a description of the values that a type with bounds accepts."""
    if get_origin(kind) is Literal:
        *others, last = map(str, get_args(kind))
        return f"{', '.join(others)} or {last}" if others else last
    if get_origin(kind) is tuple:
        *items, last = get_args(kind)
        if last is not ...:
            assert items == [last], f"{kind} is not described yet"
            return f"two {_describe(last).removeprefix('a ')}s"  # such as "two whole numbers"
        minimum, maximum = _bound(bounds, "min_length"), _bound(bounds, "max_length")
        if maximum:
            count = f"{minimum or 0} to {maximum} values"
        else:
            count = "one or more values" if minimum else "any number of values"
        return f"{count}, each {_describe(items[0])}"
    name = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
    limits = " and ".join(_limits(bounds))
    return f"{name} {limits}" if limits else name


LIMITS = {"gt": "greater than", "ge": "of at least", "lt": "less than", "le": "of at most"}  # by pydantic's names


def _limits(bounds: tuple[Any, ...]) -> Iterator[str]:
    for name, phrase in LIMITS.items():
        if (limit := _bound(bounds, name)) is not None:
            yield f"{phrase} {'2**64' if limit == 2**64 else limit}"


def _bound(bounds: tuple[Any, ...], name: str) -> Any:
    """Return the limit of this name, such as gt or min_length, or None."""
    for bound in bounds:
        limit = getattr(bound, name, None)
        if limit is not None:
            return limit
    return None


@cache
def _texts(config: type[pydantic.BaseModel]) -> Mapping[str, tuple[str, str]]:
    """Return (help text, group) of each field, read from the source code of the config and of its base classes.

    The comment behind a field is its help text. A comment on a line of its own is the heading of the fields below it.
    """
    texts: dict[str, tuple[str, str]] = {}
    for base in reversed(config.__mro__):
        if is_config(base) and base is not pydantic.BaseModel:
            lines = textwrap.dedent(inspect.getsource(base)).splitlines()
            heading = ""
            for node in ast.parse("\n".join(lines)).body[0].body:  # type: ignore[attr-defined]
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    line_above = lines[node.lineno - 2].strip()
                    if line_above.startswith("# "):
                        heading = line_above.removeprefix("# ")
                    field_lines = lines[node.lineno - 1 : node.end_lineno]
                    comments = [line.split("  # ")[1] for line in field_lines if "  # " in line]
                    text = re.sub(r"\b(None|True|False)\b", lambda match: match[0].lower(), " ".join(comments))
                    texts[node.target.id] = (text, heading or texts.get(node.target.id, ("", "Options"))[1])
    return texts
