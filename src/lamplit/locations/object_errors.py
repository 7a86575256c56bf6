"""What is wrong with object storage, in a sentence: the packages that reach it have errors of their own for it."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lamplit.errors import first_line

# What these packages raise that is no OSError.
_FOREIGN_ERRORS = {
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "aiohttp": ("ClientError",),
    "google.auth.exceptions": ("GoogleAuthError",),
    "azure.core.exceptions": ("AzureError",),
}
_NO_CREDENTIALS = (
    r"NoCredentials|locate credentials|Failed to get AWS credentials|Partial credentials|ExpiredToken",
    "no credentials were found, or they have expired; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or type: aws "
    "configure",
)
_NO_SERVER = (
    r"connect to the endpoint|error sending request|Connection refused|dns error|Connection was closed",
    "the server cannot be reached; check AWS_ENDPOINT_URL, AWS_REGION and the network",
)
_SLOW = (
    r"SlowDown|reduce your request rate|Service ?Unavailable",
    "the server asks for fewer requests (SlowDown); wait a while and type the same command again",
)
_REASONS = (
    (r"NoSuchBucket|bucket does not exist", "there is no such bucket; check its name"),
    _NO_CREDENTIALS,
    (
        r"Access ?Denied|necessary privileges|Forbidden|InvalidAccessKeyId|SignatureDoesNotMatch|InvalidToken",
        "access is denied; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, and what they allow",
    ),
    _NO_SERVER,
    _SLOW,
)


class RemoteError(OSError):
    """Object storage refuses, or cannot be reached; the text is the reason and what to do.

    Attributes:
        passes: whether what was asked for may be had another time, so that it is not to be given up for good.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(errno.EIO, reason)
        self.passes = will_pass(reason)

    def __str__(self) -> str:
        return str(self.strerror)


def will_pass(text: str) -> bool:
    """Tell whether a text has a reason that is not about one object: all others would fail as it did."""
    return any(reason in text for _, reason in (_NO_CREDENTIALS, _NO_SERVER, _SLOW))


def passes(error: BaseException) -> bool:
    """Tell whether an error is a `RemoteError` that passes."""
    return isinstance(error, RemoteError) and error.passes


def known_reason(error: Exception) -> str | None:
    """Say in a sentence why object storage did not do what was asked, and what to do; None if that is not known."""
    said = f"{type(error).__name__}: {error}"
    return next((reason for pattern, reason in _REASONS if re.search(pattern, said)), None)


def reason_of(error: Exception) -> str:
    """Say in a sentence why object storage did not do what was asked, and what to do."""
    return known_reason(error) or first_line(error)


@contextmanager
def explained() -> Iterator[None]:
    """Make an OSError with a reason of whatever the packages of fsspec raise."""
    try:
        yield
    except _raised() as error:
        no_bucket = "bucket does not exist" in str(error)  # which is a FileNotFoundError, too
        if isinstance(error, RemoteError | FileExistsError) or (isinstance(error, FileNotFoundError) and not no_bucket):
            raise
        raise RemoteError(reason_of(error)) from error


def _raised() -> tuple[type[Exception], ...]:
    found = [(sys.modules[module], names) for module, names in _FOREIGN_ERRORS.items() if module in sys.modules]
    return (OSError, ValueError, *(getattr(module, name) for module, names in found for name in names))
