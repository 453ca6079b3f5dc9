"""Every error that layerwise raises on purpose.

LayerwiseError                 one sentence: what happened, what was received, what to do
├── ConfigError                the user's file, flag or environment can't be meant; nothing was started
├── RejectedError              the other side refused; the same call will be refused again
│   ├── MalformedMessageError  a frame or message that can't be read
│   ├── WrongLifeError         from an older life of a layer
│   ├── NotOwnerError          this shard does not own that layer
│   ├── NotFoundError          no such job, node, cut or file
│   └── NotAllowedError        listening, importing or acting beyond what was allowed
├── RetryableError             may succeed later, or elsewhere
│   ├── UnreachableError       nobody answers at that address
│   ├── DeadlineError          no answer within the time limit
│   ├── BusyError              a bound is reached
│   ├── OutOfMemoryError       this process has no memory left for its work
│   └── UnreadableError        a file is there, and the disk or the network does not give it
├── JobFailedError             the job can't go on
├── NotFiniteError             an update's gradient is no number; the update was not made
├── CorruptError               a file or log does not say what it must
│   └── CorruptCutError        a cut's file; the cut before it can be used
└── AuditError                 a promise that the event log contradicts
"""

from __future__ import annotations

from os import PathLike, fspath


class LayerwiseError(Exception):
    """Base of all errors that a user may see; ``str(error)`` is the sentence shown."""


class ConfigError(LayerwiseError):
    """The job file, a flag or the environment asks for something impossible."""


class RejectedError(LayerwiseError):
    """Refused; repeating the same call is pointless."""


class MalformedMessageError(RejectedError):
    """A frame, message or tensor header does not follow the wire format."""


class WrongLifeError(RejectedError):
    """The message belongs to an older life of the layer; nothing was changed."""


class NotOwnerError(RejectedError):
    """The layer is not in this shard's block."""


class NotFoundError(RejectedError):
    """The job, node, cut or file named does not exist."""


class NotAllowedError(RejectedError):
    """The action needs a permission that was not given."""


class RetryableError(LayerwiseError):
    """Failed for now; the same call may succeed later."""


class UnreachableError(RetryableError):
    """Nobody answers at the address."""


class DeadlineError(RetryableError):
    """No answer within the time limit."""


class BusyError(RetryableError):
    """A bounded resource is full."""


class OutOfMemoryError(RetryableError):
    """Memory ran out; a process that meets this ends, and another one takes over."""


class UnreadableError(RetryableError):
    """A file is there and can't be read: a network, permissions; what is in it may be sound."""


class JobFailedError(LayerwiseError):
    """The job ended without reaching its last cut."""


class NotFiniteError(LayerwiseError):
    """The gradient of an update has a value that is not finite; the layer stays at the version before."""


class CorruptError(LayerwiseError):
    """A file's content contradicts its own checksum, header or manifest."""


class CorruptCutError(CorruptError):
    """A file of the cut of ``version`` is missing or damaged: the one at ``path``."""

    def __init__(self, message: str, *, version: int, path: str | PathLike[str]) -> None:
        super().__init__(message)
        self.version = version
        self.path = fspath(path)


class AuditError(LayerwiseError):
    """The event log contradicts a promise."""


def sentence(error: Exception) -> str:
    """What to tell the user of ``error``, in one line: our own errors say it all, of others the kind belongs to it."""
    text = " ".join(str(error).split())
    if isinstance(error, LayerwiseError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
