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
    is_operational: bool = False  # may change at every restart in the same folder

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
        repeated = next((kind for kind in _alternatives(self.kind) if get_origin(kind) is tuple), None)
        return None if repeated is None else repeated if get_args(repeated)[-1] is not ... else get_args(repeated)[0]

    @property
    def accepted(self) -> str:
        """Return a description of the accepted values."""
        kinds = _alternatives(self.kind)
        description = _words(next(kind for kind in kinds if kind is not type(None)), self.bounds)
        return f"{description}, or none" if type(None) in kinds else description

    def value(self, words: list[str]) -> Any:
        """Return the words of a command line in the structure that pydantic expects for this field."""
        if type(None) in _alternatives(self.kind) and [word.lower() for word in words] == ["none"]:
            return None
        if self.item is None:
            return words[0]
        size = len(get_args(self.item)) if get_origin(self.item) is tuple and self.item != self.kind else 1
        return words if size == 1 else [words[at : at + size] for at in range(0, len(words), size)]

    def shown(self, value: Any) -> str:
        """Return a value as the user types it."""
        if isinstance(value, (tuple, list)):
            return " ".join(map(self.shown, value))
        return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def options_of(
    config: type[pydantic.BaseModel], prefix: str = "", group: str = "", marked: bool = False
) -> dict[str, Option]:
    """Return the options of a config and of its nested configs by dotted name."""
    options: dict[str, Option] = {}
    texts = _texts(config)
    for name, field in config.model_fields.items():
        text, heading = texts[name]
        is_operational = marked or MARK in field.metadata
        if is_config(kind := field.annotation):
            about = text or (kind.__doc__ or "").split("\n")[0]
            heading = f"{f'--{prefix}{name}'.replace('_', '-')}.*: {about}"
            options |= options_of(kind, f"{prefix}{name}.", heading, is_operational)
        else:
            bounds = tuple(field.metadata)
            options[prefix + name] = Option(prefix + name, kind, bounds, text, group or heading, is_operational)
    return options


def is_config(kind: Any) -> TypeGuard[type[pydantic.BaseModel]]:
    """Return whether a field of this type is a nested config."""
    return inspect.isclass(kind) and issubclass(kind, pydantic.BaseModel)


def help_page(usage: str, about: str, config: pydantic.BaseModel) -> str:
    """Return the help page: all options in groups, each with its value in the config, its text and what it accepts."""
    width = min(shutil.get_terminal_size((120, 24)).columns, 120)
    groups: dict[str, list[str]] = {}
    for option in options_of(type(config)).values():
        value = attrgetter(option.name)(config)
        lines = [f"  {', '.join(option.flags)} {option.shown(value)}".rstrip()]
        accepted = "" if option.kind is str else f" Accepted: {option.accepted}."
        mark = f" [{MARK}]" if option.is_operational else ""
        text = f"{option.text.rstrip('.')}.{accepted}{mark}"
        lines += textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False)
        groups.setdefault(option.group, []).extend(lines)
    head = textwrap.fill(about, width)
    pages = ["\n".join([heading, *lines]) for heading, lines in groups.items()]
    values = f"Every option is shown with its value in this preset. [{MARK}] options may change when a job is resumed."
    return "\n\n".join([f"usage: {usage}", head, values, *pages])


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """Return the types of a union, or a tuple of any other type alone."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _words(kind: Any, bounds: tuple[Any, ...]) -> str:
    """Return a description of the values that a type with bounds accepts."""
    if get_origin(kind) is Literal:
        *most, last = map(str, get_args(kind))
        return f"{', '.join(most)} or {last}" if most else last
    if get_origin(kind) is tuple:
        *items, last = get_args(kind)
        if last is not ...:
            return " and ".join(_words(item, ()) for item in (*items, last))
        least = _bound(bounds, "min_length") or 0
        most_ = _bound(bounds, "max_length")
        count = f"{least} to {most_} values" if most_ else "one or more values" if least else "any number of values"
        return f"{count}, each {_words(items[0], ())}"
    name = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[kind]
    return " ".join([name, *filter(None, [" and ".join(_limits(bounds))])])


LIMITS = {"gt": "greater than", "ge": "of at least", "lt": "less than", "le": "of at most"}


def _limits(bounds: tuple[Any, ...]) -> Iterator[str]:
    for name, words in LIMITS.items():
        if (limit := _bound(bounds, name)) is not None:
            yield f"{words} {'2**64' if limit == 2**64 else limit}"


def _bound(bounds: tuple[Any, ...], name: str) -> Any:
    """Return the limit of this name, such as gt or min_length, or None."""
    return next((limit for bound in bounds if (limit := getattr(bound, name, None)) is not None), None)


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
                    above = lines[node.lineno - 2].strip()
                    heading = above.removeprefix("# ") if above.startswith("# ") else heading
                    behind = [
                        line.split("  # ")[1] for line in lines[node.lineno - 1 : node.end_lineno] if "  # " in line
                    ]
                    text = re.sub(r"\bNone\b", "none", " ".join(behind))
                    texts[node.target.id] = (text, heading or texts.get(node.target.id, ("", "Options"))[1])
    return texts
