"""From a line of the event log back to the record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from layerwise.applied import AppliedSet
from layerwise.events import (
    AbortEvent,
    AccumulateEvent,
    BackwardEvent,
    CutEvent,
    DropEvent,
    Event,
    ForwardEvent,
    PassEvent,
    Record,
    RestoreEvent,
    UpdateEvent,
    WalkEvent,
    WeightMode,
)
from layerwise.ids import Attempt, Microbatch

_EVENTS: dict[str, type[Event]] = {
    kind.event: kind
    for kind in (
        RestoreEvent,
        ForwardEvent,
        AccumulateEvent,
        UpdateEvent,
        DropEvent,
        AbortEvent,
        CutEvent,
        PassEvent,
        BackwardEvent,
        WalkEvent,
    )
}
_KEYS: dict[str, frozenset[str]] = {
    name: frozenset(one.name for one in fields(kind))
    | {"sequence", "event"}
    | ({"microbatch"} if "attempt" in {one.name for one in fields(kind)} else set())
    for name, kind in _EVENTS.items()
}
_OTHER_TYPES: dict[str, tuple[type, ...]] = {
    "event": (str,),
    "digest": (str,),
    "reason": (str,),
    "mode": (str,),
    "buffers": (bool, dict),
    "applied": (dict,),
    "microbatch": (list,),
    "learning_rate": (float, int, type(None)),
    "detached": (bool,),
    "owners": (list,),
    "reads": (list,),
}
_OPTIONAL = {"owners"}
_OPTIONAL_IN_DROP = {"number", "base"}


def record_from_json(value: Any) -> Record:
    """The inverse of ``to_json`` for parsed JSON; ``ValueError`` says what is wrong with it."""
    if not isinstance(value, Mapping) or not isinstance(value.get("event"), str):
        raise ValueError("not a record: an object with an event is expected")
    name: str = value["event"]
    kind = _EVENTS.get(name)
    if kind is None:
        raise ValueError(f"no event is called {name!r}")
    if value.keys() | _OPTIONAL & _KEYS[name] != _KEYS[name]:
        raise ValueError(
            f"a record of event {name!r} has other fields: {sorted(value.keys() ^ _KEYS[name])} are missing or too many"
        )
    for key, one in value.items():
        allowed = _OTHER_TYPES.get(key, (int,))
        if type(one) not in allowed and not (one is None and name == "drop" and key in _OPTIONAL_IN_DROP):
            raise ValueError(f"{key} of event {name!r} can't be {one!r}")
    arguments: dict[str, Any] = {
        key: one for key, one in value.items() if key not in ("sequence", "event", "microbatch")
    }
    if "microbatch" in value:
        arguments["attempt"] = Attempt(_microbatch(value["microbatch"]), value["attempt"])
    if kind is RestoreEvent:
        arguments["applied"] = AppliedSet.from_json(value["applied"])
        arguments["buffers"] = AppliedSet.from_json(value["buffers"])
    if "mode" in value:
        arguments["mode"] = WeightMode(value["mode"])
    if "owners" in value:
        arguments["owners"] = _versions(value["owners"])
    if "reads" in value:
        arguments["reads"] = tuple(_versions(one) for one in value["reads"])
    return Record(value["sequence"], kind(**arguments))


def _microbatch(value: list[Any]) -> Microbatch:
    if len(value) != 3 or any(type(one) is not int for one in value):
        raise ValueError(f"not a microbatch: {value!r}")
    return Microbatch(*value)


def _versions(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or any(type(one) is not int for one in value):
        raise ValueError(f"not a list of versions: {value!r}")
    return tuple(value)
