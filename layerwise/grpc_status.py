"""Our errors as gRPC status codes, and back: one table for both directions."""

from __future__ import annotations

import grpc

from layerwise.errors import (
    AuditError,
    BusyError,
    ConfigError,
    CorruptError,
    DeadlineError,
    JobFailedError,
    LayerwiseError,
    MalformedMessageError,
    NotAllowedError,
    NotFoundError,
    NotOwnerError,
    RejectedError,
    RetryableError,
    UnreachableError,
    UnreadableError,
    WrongLifeError,
)

# The first class of an error's ancestry that is listed gives its code; a code comes back as the first class listed
# with it.
STATUS_OF_ERROR: dict[type[LayerwiseError], grpc.StatusCode] = {
    ConfigError: grpc.StatusCode.INVALID_ARGUMENT,
    MalformedMessageError: grpc.StatusCode.OUT_OF_RANGE,
    NotFoundError: grpc.StatusCode.NOT_FOUND,
    NotAllowedError: grpc.StatusCode.PERMISSION_DENIED,
    RejectedError: grpc.StatusCode.FAILED_PRECONDITION,
    WrongLifeError: grpc.StatusCode.FAILED_PRECONDITION,
    NotOwnerError: grpc.StatusCode.FAILED_PRECONDITION,
    UnreadableError: grpc.StatusCode.FAILED_PRECONDITION,
    UnreachableError: grpc.StatusCode.UNAVAILABLE,
    DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
    BusyError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    RetryableError: grpc.StatusCode.UNAVAILABLE,
    JobFailedError: grpc.StatusCode.ABORTED,
    CorruptError: grpc.StatusCode.DATA_LOSS,
    AuditError: grpc.StatusCode.DATA_LOSS,
}


def status_of(error: LayerwiseError) -> grpc.StatusCode:
    """The code under which ``error`` travels; its sentence is the status's details."""
    for ancestor in type(error).__mro__:
        if ancestor in STATUS_OF_ERROR:
            return STATUS_OF_ERROR[ancestor]
    return grpc.StatusCode.UNKNOWN


def error_of(code: grpc.StatusCode, details: str) -> LayerwiseError:
    """The error that a status stands for."""
    for kind, listed in STATUS_OF_ERROR.items():
        if listed is code:
            return kind(details)
    return LayerwiseError(f"the call failed with {code.name}: {details}")
