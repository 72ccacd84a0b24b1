"""Redaction of secrets in everything that leaves this process: log lines, errors, reports, and data for MLflow."""

import contextlib
import json
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote, unquote

MASK = "***"
SHORTEST_VALUE = 8  # characters; shorter values, such as "admin", are parts of ordinary words
# Names of variables with secrets. Names that end in _FILE are not among them, because their values are paths.
_NAMES = re.compile(
    r"(TOKEN|PASSWORD|PASSWD|SECRET|CREDENTIALS?|(ACCESS|API|PRIVATE|SECRET)_?KEY(_ID)?)$|^AWS_BEARER_TOKEN_"
)
_WORDS = r"(?:password|passwd|pwd|token|secret|signature|credential|(?:api|access|secret)[_-]?key(?:[_-]?id)?)"
_PATTERNS = (
    re.compile(r"(://)[^/\s'\"<>]*(?=@)"),  # the user and password of a URI
    re.compile(rf"(?i)({_WORDS}['\"]?=['\"]?)[^\s&'\",;<>]+"),  # a query, --option=value, VARIABLE=value
    re.compile(rf"(?i)(--[\w.-]{{0,40}}{_WORDS}\s+)[^\s-]\S*"),  # --option value
    re.compile(r"(?i)(\b(?:bearer|basic)\s+)[\w.+/=~-]{8,}"),  # the header Authorization
)


def redact(text: str) -> str:
    """Return `text` without secret values of the environment and without secrets in URIs and options."""
    for value in sorted(_secret_values(), key=len, reverse=True):
        text = text.replace(value, MASK)
    return redact_patterns(text)


def redact_patterns(text: str) -> str:
    """Return `text` without secrets in URIs and options.

    The result does not depend on the environment, so it can be compared with the result of another process.
    """
    for pattern in _PATTERNS:
        text = pattern.sub(rf"\g<1>{MASK}", text)
    return text


def redact_tree(tree: Any, whole: bool = True) -> Any:
    """Return a JSON value with all strings redacted by `redact`, or if not `whole` by `redact_patterns`."""
    if isinstance(tree, dict):
        return {name: redact_tree(value, whole) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [redact_tree(value, whole) for value in tree]
    return (redact if whole else redact_patterns)(tree) if isinstance(tree, str) else tree


def command() -> str:
    """Return the command line of this process for a shell, redacted."""
    return redact(shlex.join(["python", *sys.argv]))


def redact_output() -> None:
    """Redact everything that this process prints or logs from now on, including tracebacks and warnings."""
    for stream in (sys.stdout, sys.stderr):
        if not getattr(stream.write, "redacts", False):
            stream.write = _redacted(stream.write)  # type: ignore[method-assign]
    _redact_logs()


def _redacted(write: Callable[[str], int]) -> Callable[[str], int]:
    def redacted(text: str) -> int:
        write(redact(text))
        return len(text)

    redacted.redacts = True  # type: ignore[attr-defined]
    return redacted


def _redact_logs() -> None:
    """Redact log records when they are created, because a handler may send them to other places than a stream."""
    make = logging.getLogRecordFactory()
    if getattr(make, "redacts", False):
        return

    def redacted(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        with contextlib.suppress(TypeError, ValueError):  # arguments that do not fit, which logging reports itself
            record.msg, record.args = redact(record.getMessage()), None
        return record

    redacted.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(redacted)


def _secret_values() -> Iterator[str]:
    """Yield the secret values of the environment in every form in which they may be written."""
    for name, value in os.environ.items():
        secrets = [value] if _NAMES.search(name) else []
        if address := re.match(r"[\w+.-]+://([^/\s]*)@", value):
            user, _, password = address[1].partition(":")
            secrets += [f"{user}:{password}", password or user]
        for secret in secrets:
            for form in {secret, unquote(secret), quote(secret, safe=""), json.dumps(secret)[1:-1]}:
                if len(form) >= SHORTEST_VALUE:
                    yield form
