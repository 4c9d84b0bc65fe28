"""Reading configurations: the fields that a family knows, validated once, and no others.

A family's fields are also all that a server's configuration may hold: names, paths, token ids and whatever
else a `config.json` carries stay behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from stip_keyservice.protect.architecture import ELEMENTWISE
from stip_protocol.documents import explain
from stip_protocol.errors import CheckpointInvalid


def _elementwise(name: str) -> str:
    if name not in ELEMENTWISE:
        raise ValueError(f"must act on each value alone, as {', '.join(sorted(ELEMENTWISE))} do")
    return name


Layers = Annotated[int, Field(ge=1, le=1 << 12)]
Dimension = Annotated[int, Field(ge=1, le=1 << 20)]
Entries = Annotated[int, Field(ge=1, le=1 << 24)]
"""Rows of a vocabulary or a table of positions."""
Epsilon = Annotated[float, Field(gt=0, lt=1)]
Activation = Annotated[str, AfterValidator(_elementwise)]


class Fields(BaseModel):
    """Base of a family's fields: values of the wrong type or range are refused, unknown fields ignored."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", hide_input_in_errors=True, allow_inf_nan=False)

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Self:
        """Raises `CheckpointInvalid` naming the first field that is wrong."""
        try:
            return cls.model_validate(dict(config))
        except ValidationError as error:
            raise CheckpointInvalid(f"config.{explain(error)}") from None

    def kept(self) -> dict[str, Any]:
        """The fields as a server's configuration holds them."""
        return self.model_dump(exclude_none=True)
