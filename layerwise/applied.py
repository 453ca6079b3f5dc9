"""Which microbatches a layer has taken in: a watermark, the few above it, and the dropped ones among them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class AppliedSet:
    """A set of microbatch indices that stays small while they arrive nearly in order.

    Everything below ``watermark`` is in it; ``above`` holds the rest. ``dropped`` lists the members that are
    tombstones: they fill a place in an update but brought no gradient. Its layer's lock guards changes; ``in`` may be
    asked without it, and never misses a member while the watermark passes it.
    """

    watermark: int = 0
    above: set[int] = field(default_factory=set)
    dropped: set[int] = field(default_factory=set)

    def __contains__(self, index: int) -> bool:
        # In this order: a member leaves ``above`` only after the watermark has passed it.
        return index in self.above or index < self.watermark

    def __len__(self) -> int:
        return self.watermark + len(self.above)

    def add(self, index: int, *, dropped: bool = False) -> bool:
        """Add ``index``; False (and no change) when it is there already."""
        if index < 0:
            raise ValueError(f"microbatch index must not be negative, got {index}")
        if index in self:
            return False
        self.above.add(index)
        if dropped:
            self.dropped.add(index)
        while (passed := self.watermark) in self.above:
            self.watermark = passed + 1
            self.above.remove(passed)
        return True

    def missing(self, stop: int) -> list[int]:
        """Indices below ``stop`` that are not in the set, in order."""
        return [index for index in range(self.watermark, stop) if index not in self.above]

    def copy(self) -> AppliedSet:
        """An independent copy."""
        return AppliedSet(self.watermark, set(self.above), set(self.dropped))

    def to_json(self) -> dict[str, object]:
        """Plain values for a cut's metadata."""
        return {"watermark": self.watermark, "above": sorted(self.above), "dropped": sorted(self.dropped)}

    @classmethod
    def parse(cls, text: str, *, stop: int) -> AppliedSet:
        """The set that a JSON text from another process describes.

        ``ValueError`` when it describes none, or one with an index of ``stop`` or more: what follows from a set may
        take time and memory in proportion to its largest index.
        """
        try:
            result = cls.from_json(json.loads(text))
        except RecursionError:
            raise ValueError(f"not an applied set: {text[:200]}") from None
        if max(result.above, default=result.watermark - 1) >= stop:
            raise ValueError(f"not an applied set of {stop} microbatches: {text[:200]}")
        return result

    @classmethod
    def from_json(cls, value: dict[str, object]) -> AppliedSet:
        """The inverse of `to_json`; ``ValueError`` when the values do not describe such a set."""
        if not isinstance(value, dict):
            raise ValueError(f"not an applied set: {str(value)[:200]}")
        watermark, above, dropped = value.get("watermark"), value.get("above"), value.get("dropped", [])
        if type(watermark) is not int or not isinstance(above, list) or not isinstance(dropped, list):
            raise ValueError(f"not an applied set: {str(value)[:200]}")
        if watermark < 0 or any(type(index) is not int or index < 0 for index in (*above, *dropped)):
            raise ValueError(f"not an applied set: {str(value)[:200]}")
        # The watermark itself is never above it: equal sets have equal values.
        result = cls(watermark, set(above), set(dropped))
        if any(index <= watermark for index in result.above) or len(result.above) != len(above):
            raise ValueError(f"not an applied set: {str(value)[:200]}")
        if any(index not in result for index in result.dropped):
            raise ValueError(f"dropped microbatches that are not in the set: {str(value)[:200]}")
        return result

    @classmethod
    def intersection(cls, sets: Iterable[AppliedSet]) -> AppliedSet:
        """What all of ``sets`` hold (dropped where any of them dropped it)."""
        every = list(sets)
        if not every:
            return cls()
        result = cls(watermark=min(one.watermark for one in every))
        top = max(max(one.above, default=one.watermark - 1) for one in every) + 1
        for index in range(result.watermark, top):
            if all(index in one for one in every):
                result.add(index)
        result.dropped = {index for one in every for index in one.dropped if index in result}
        return result
