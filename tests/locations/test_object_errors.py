from __future__ import annotations

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError

from lamplit.locations.object_errors import RemoteError, explained, known_reason, passes, reason_of

LANCE = "LanceError(IO): Generic S3 error: Error performing GET http://127.0.0.1:1/bucket?list-type=2 in 475.013853ms, "


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(f"{LANCE}after 3 retries - HTTP error: error sending request, object_store.rs:1"),
            "cannot be reached",
        ),
        (ValueError(f"{LANCE}- 404 Not Found: <Error><Code>NoSuchBucket</Code></Error>"), "there is no such bucket"),
        (
            OSError(f"{LANCE}- 503 Service Unavailable: <Error><Code>SlowDown</Code></Error>"),
            "fewer requests (SlowDown)",
        ),
        (
            ValueError("LanceError(IO): Failed to get AWS credentials: CredentialsNotLoaded"),
            "no credentials were found",
        ),
        (ValueError("The operation lacked the necessary privileges to complete for path a"), "access is denied"),
        (NoCredentialsError(), "no credentials were found"),
        (EndpointConnectionError(endpoint_url="http://127.0.0.1:1"), "the server cannot be reached"),
        (ClientError({"Error": {"Code": "SlowDown", "Message": "Please wait."}}, "GetObject"), "fewer requests"),
        (PermissionError("Forbidden"), "access is denied"),
    ],
)
def test_reasons(error: Exception, said: str) -> None:
    assert said in reason_of(error)
    with pytest.raises(RemoteError, match=said.replace("(", "\\(").replace(")", "\\)")), explained():
        raise error


def test_what_is_not_known() -> None:
    assert known_reason(OSError("the moon is full")) is None
    assert reason_of(OSError("the moon is full\nand more")) == "the moon is full"


def test_what_passes() -> None:
    assert passes(RemoteError(reason_of(NoCredentialsError())))
    assert not passes(RemoteError(reason_of(PermissionError("Forbidden"))))
    assert not passes(OSError("SlowDown"))


def test_what_is_left_as_it_is() -> None:
    for error in (FileNotFoundError("bucket/a"), FileExistsError("bucket/a"), RemoteError("known"), KeyError("a")):
        with pytest.raises(type(error)) as caught, explained():
            raise error
        assert caught.value is error
