"""Bad luck on the network is tried again, a bounded number of times; an answer is an answer.

What is bad luck: a time-out, a connection that is reset, a server that says 409, 429 or 5xx (ConditionalRequestConflict,
SlowDown, ServiceUnavailable). What is an answer: the file is missing, the name is taken (412), access is denied.
"""

from __future__ import annotations

import errno
import logging
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

ATTEMPTS = 8
FIRST_WAIT_S = 0.1  # doubled after each attempt
LONGEST_WAIT_S = 10.0

_ANSWERS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_ERRNOS = frozenset(
    {errno.EBUSY, errno.EAGAIN, errno.EIO, errno.EPIPE, errno.ECONNRESET, errno.ETIMEDOUT}
    | {getattr(errno, "EREMOTEIO", errno.EIO)}
)
_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
#: base classes by which the libraries below fsspec call a connection that failed; imported nowhere for their sake
_NAMES = frozenset(
    {
        "ClientConnectionError",
        "ClientPayloadError",
        "ConnectionError",
        "HTTPClientError",
        "IncompleteRead",
        "ResponseParserError",
    }
)
_log = logging.getLogger(__name__)


def http_status(error: BaseException) -> int | None:
    """The status of the response that the error, or one that it was made of, speaks of."""
    seen: BaseException | None = error
    while seen is not None:
        response = getattr(seen, "response", None)
        if isinstance(response, dict):
            status: Any = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            status = getattr(seen, "status", None) or getattr(seen, "code", None)
        if isinstance(status, int) and 100 <= status < 600:
            return status
        seen = seen.__cause__
    return None


def is_bad_luck(error: BaseException) -> bool:
    """Whether the same request may well succeed a moment later."""
    if isinstance(error, _ANSWERS):
        return False
    status = http_status(error)
    if status is not None:
        return status in _STATUSES
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    if isinstance(error, OSError) and error.errno in _ERRNOS:
        return True
    return any(base.__name__ in _NAMES for base in type(error).__mro__)


def with_retries(call: Callable[[], T], what: str) -> T:
    """``call()``, again after a growing and random wait where it meets bad luck; the last error is raised."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except Exception as error:
            if attempt == ATTEMPTS or not is_bad_luck(error):
                raise
            wait = min(FIRST_WAIT_S * 2 ** (attempt - 1), LONGEST_WAIT_S) * random.uniform(0.5, 1.0)
            _log.debug("%s: %s; again in %.1f s", what, error, wait)
            time.sleep(wait)
    raise AssertionError("unreachable")
