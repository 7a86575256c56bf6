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
_REASONS = (
    (r"NoSuchBucket|bucket does not exist", "there is no such bucket; check its name"),
    (
        r"NoCredentials|locate credentials|Failed to get AWS credentials|Partial credentials",
        "no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or type: aws configure",
    ),
    (
        r"Access ?Denied|necessary privileges|Forbidden|InvalidAccessKey|SignatureDoesNot|ExpiredToken|InvalidToken",
        "access is denied; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, and what they allow",
    ),
    (
        r"connect to the endpoint|error sending request|Connection refused|dns error",
        "the server cannot be reached; check AWS_ENDPOINT_URL, AWS_REGION and the network",
    ),
    (
        r"SlowDown|reduce your request rate|503 Service Unavailable|ServiceUnavailable",
        "the server asks for fewer requests (SlowDown); wait a while and type the same command again",
    ),
)


class RemoteError(OSError):
    """Object storage refuses, or cannot be reached; the text is the reason and what to do."""

    def __init__(self, reason: str) -> None:
        super().__init__(errno.EIO, reason)

    def __str__(self) -> str:
        return str(self.strerror)


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
