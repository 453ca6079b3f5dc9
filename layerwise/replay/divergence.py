"""Where a replay and the record part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from layerwise.errors import LayerwiseError


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """The first record that the replay does not reach as it was written down.

    ``layer`` in ``life`` was on its way to update ``version``. ``record`` is the number of the record in the log of
    its block and life; ``recorded`` and ``replayed`` say what differs; ``advice`` what to look at.
    """

    layer: int
    life: int
    version: int
    record: int
    attempt: str
    what: str
    recorded: str
    replayed: str
    advice: str

    def __str__(self) -> str:
        about = f" ({self.attempt})" if self.attempt else ""
        return (
            f"layer {self.layer} in life {self.life} differs at its update to version {self.version}: "
            f"{self.what}{about}, record {self.record}: recorded is {self.recorded}, the replay has {self.replayed}; "
            f"{self.advice}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {name: getattr(self, name) for name in self.__slots__}


class DivergedError(LayerwiseError):
    """The replay does not reach what was recorded."""

    def __init__(self, divergence: Divergence) -> None:
        super().__init__(str(divergence))
        self.divergence = divergence
