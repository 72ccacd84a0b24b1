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
SHORTEST_VALUE = 8  # characters; shorter values, such as "admin", occur in ordinary text
# Names of variables with secrets. Names that end in _FILE do not match, because their values are paths.
_NAMES = re.compile(
    r"(TOKEN|PASSWORD|PASSWD|SECRET|CREDENTIALS?|(ACCESS|API|PRIVATE|SECRET)_?KEY(_ID)?)$|^AWS_BEARER_TOKEN_"
)
_SECRET_NAMES = r"(?:password|passwd|pwd|token|secret|signature|credential|(?:api|access|secret)[_-]?key(?:[_-]?id)?)"
# The user and password of a URI. A password may have slashes, as keys of AWS have, but a port and an ARN are none.
LOGIN = r"(?:[^/\s'\"<>]*|(?!arn:)[^/:\s'\"<>]+:(?!\d+/)[^@\s'\"<>]*)"
_PATTERNS = (
    re.compile(rf"(://){LOGIN}(?=@)"),
    re.compile(rf"(?i)({_SECRET_NAMES}['\"]?=['\"]?)[^\s&'\",;<>]+"),  # a query, --option=value, VARIABLE=value
    re.compile(rf"(?i)(--[\w.-]{{0,40}}{_SECRET_NAMES}\s+)[^\s-]\S*"),  # --option value
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


def redact_tree(tree: Any, by_environment: bool = True) -> Any:
    """Return a JSON value with all strings redacted by `redact`, or by `redact_patterns` if not `by_environment`."""
    if isinstance(tree, dict):
        return {name: redact_tree(value, by_environment) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [redact_tree(value, by_environment) for value in tree]
    if isinstance(tree, str):
        return redact(tree) if by_environment else redact_patterns(tree)
    return tree


def command() -> str:
    """Return the command line of this process, quoted for a shell and redacted."""
    return redact(shlex.join(["python", *sys.argv]))


def redact_output() -> None:
    """Redact everything that this process prints or logs from now on, including tracebacks and warnings."""
    for stream in (sys.stdout, sys.stderr):
        if not getattr(stream.write, "redacts", False):
            stream.write = _redacting_write(stream.write)  # type: ignore[method-assign]
    _redact_logs()


def _redacting_write(write: Callable[[str], int]) -> Callable[[str], int]:
    """Return a function that redacts a text before it calls `write`. Its attribute `redacts` is True."""

    def redacting_write(text: str) -> int:
        write(redact(text))
        return len(text)

    redacting_write.redacts = True  # type: ignore[attr-defined]
    return redacting_write


def _redact_logs() -> None:
    """Redact log records when they are created, because a handler may send them elsewhere than to a stream."""
    create_record = logging.getLogRecordFactory()
    if getattr(create_record, "redacts", False):
        return

    def create_redacted(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = create_record(*args, **kwargs)
        with contextlib.suppress(TypeError, ValueError):  # arguments that do not fit, which logging reports itself
            record.msg, record.args = redact(record.getMessage()), None
        return record

    create_redacted.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(create_redacted)


def _secret_values() -> Iterator[str]:
    """Yield the secret values of the environment, also percent-encoded, decoded and escaped as in JSON."""
    for name, value in os.environ.items():
        secrets = [value] if _NAMES.search(name) else []
        if uri := re.match(r"[\w+.-]+://([^/\s]*)@", value):
            user, _, password = uri[1].partition(":")
            secrets += [f"{user}:{password}", password or user]
        for secret in secrets:
            for form in {secret, unquote(secret), quote(secret, safe=""), json.dumps(secret)[1:-1]}:
                if len(form) >= SHORTEST_VALUE:
                    yield form
