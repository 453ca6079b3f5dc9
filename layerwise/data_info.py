"""What a model needs to know of its data. No torch: it also travels in messages."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from layerwise.errors import ConfigError, MalformedMessageError


@dataclass(frozen=True, slots=True, kw_only=True)
class DataInfo:
    """Shapes and kinds of one data source.

    ``input_shapes`` and ``target_shapes`` are of single samples (no batch dimension), one for each tensor; dtypes are
    torch's names, such as ``float32``. ``num_classes`` is known where targets are classes, ``vocabulary`` where inputs
    are tokens. ``digest`` is a hash of some of the samples; "" where a user's own code loads them, or nothing is known.
    """

    num_train: int
    num_validation: int
    input_shapes: tuple[tuple[int, ...], ...]
    input_dtypes: tuple[str, ...]
    target_shapes: tuple[tuple[int, ...], ...]
    target_dtypes: tuple[str, ...]
    num_classes: int | None = None
    vocabulary: int | None = None
    digest: str = ""

    def check(self, planned: DataInfo) -> None:
        """Refuse these data if they are not those that the job was ``planned`` with.

        Raises:
            ConfigError: they differ; the sentence has both values.
        """
        here, there = asdict(self), asdict(planned)
        known = [key for key in here if key != "digest" or (self.digest and planned.digest)]
        differences = [f"{key} {here[key]!r} here and {there[key]!r} there" for key in known if here[key] != there[key]]
        if differences:
            raise ConfigError(
                f"data: this process has other samples than those that the job was planned with: {', '.join(differences)}; "
                f"the same files (and for python-stdlib the same release of Python) must be on every machine"
            )

    def to_json(self) -> str:
        """One line of JSON; `from_json` gives back an equal value."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> DataInfo:
        """The inverse of `to_json`.

        Raises:
            MalformedMessageError: the text says something else.
        """
        try:
            values = json.loads(text)
            for key in ("input_shapes", "target_shapes"):
                values[key] = tuple(tuple(int(size) for size in shape) for shape in values[key])
            for key in ("input_dtypes", "target_dtypes"):
                values[key] = tuple(str(dtype) for dtype in values[key])
            return cls(**values)
        except (ValueError, TypeError, KeyError) as error:
            raise MalformedMessageError(f"not a description of data ({error}): {text[:200]!r}") from error
