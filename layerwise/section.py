"""What the sections of a job file have in common: how they are read, and how a kind is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
)
from pydantic_core import CoreSchema

from layerwise.specification import EXPECTED

IMPORT_PATTERN = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$"

Positive: TypeAlias = Annotated[float, Field(gt=0)]
NotNegative: TypeAlias = Annotated[float, Field(ge=0)]
Fraction: TypeAlias = Annotated[float, Field(ge=0, lt=1)]
Count: TypeAlias = Annotated[int, Field(ge=1)]
Seed: TypeAlias = Annotated[int, Field(ge=0, lt=2**63)]
AutoCount: TypeAlias = Literal["auto"] | Count


class Section(BaseModel):
    """A map of the job file: unknown keys are refused, types are not converted, values never change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=(), populate_by_name=True
    )


class Import(Section):
    """The user's own function, ``import: package.module:function``; every other key is one of its arguments."""

    model_config = ConfigDict(extra="allow")

    target: str = Field(alias="import", pattern=IMPORT_PATTERN, json_schema_extra={EXPECTED: "package.module:function"})

    @property
    def arguments(self) -> dict[str, Any]:
        """The keys beside ``import:``."""
        return dict(self.model_extra or {})


class BareName:
    """Adds "or just the name" to a kind's JSON Schema."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "string", "enum": list(self.names)}, handler(core)]}


def expand_name(value: object) -> object:
    """``{"name": value}`` for a bare name; anything else as it is."""
    return {"name": value} if isinstance(value, str) else value


def kind_of(value: object) -> str | None:
    """The tag of a section: its ``name``, or ``import``. Objects of the classes below come with theirs."""
    if isinstance(value, Import):
        return "import"
    if isinstance(value, Mapping):
        return "import" if "import" in value else value.get("name")
    return getattr(value, "name", None)
