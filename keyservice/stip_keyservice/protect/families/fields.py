"""Reading configurations: the fields that a family knows, validated once, and no others.

A family's fields are also all that a server's configuration may hold: names, paths, token ids and whatever
else a `config.json` carries stay behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from stip_keyservice.protect.families.activations import ACTIVATIONS
from stip_protocol.documents import explain
from stip_protocol.errors import CheckpointInvalid


def _known(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ValueError(f"must act on each value alone, as {', '.join(sorted(ACTIVATIONS))} do")
    return name


Layers = Annotated[int, Field(ge=1, le=1 << 12)]
Dimension = Annotated[int, Field(ge=1, le=1 << 20)]
Entries = Annotated[int, Field(ge=1, le=1 << 24)]
"""Rows of a vocabulary or a table of positions."""
Epsilon = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Activation = Annotated[str, AfterValidator(_known)]
LayerTypes = list[Literal["full_attention", "sliding_attention"]]
Window = Annotated[int, Field(ge=0, le=1 << 24)]
"""Positions that a sliding attention sees; the engine reads it, protection does not."""


class Fields(BaseModel):
    """Base of a family's fields: values of the wrong type or range are refused, unknown fields ignored.

    A default here is the default of the family's class in transformers.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", hide_input_in_errors=True, allow_inf_nan=False)

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Self:
        """Raises `CheckpointInvalid` naming the first field that is wrong."""
        try:
            return cls.model_validate(dict(config))
        except ValidationError as error:
            # Several fields that do not fit each other have no place of their own, and are named in the reason.
            where = "config." if error.errors()[0]["loc"] else "config: "
            raise CheckpointInvalid(where + explain(error).removeprefix("document: Value error, ")) from None

    def kept(self) -> dict[str, Any]:
        """The fields as a server's configuration holds them: those that were stated, as they were stated.

        A null stays, because a class's own default may be something else.
        """
        return self.model_dump(exclude_unset=True, by_alias=True)


RopeType = Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"]


class Rope(Fields):
    """Rotary parameters, all of which depend on positions only. An unknown one is refused: it could do otherwise."""

    model_config = ConfigDict(extra="forbid")

    rope_type: RopeType | None = None
    type: RopeType | None = None
    rope_theta: float | None = None
    factor: float | None = None
    original_max_position_embeddings: int | float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    short_factor: list[float] | None = None
    long_factor: list[float] | None = None
    truncate: bool | None = None
    finetuned: bool | None = None
    """Of YaRN's first checkpoints; transformers does not read it."""
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] | None = None


class LayeredRope(Fields):
    """Rotary parameters by kind of layer (Gemma 3)."""

    model_config = ConfigDict(extra="forbid")

    full_attention: Rope | None = None
    sliding_attention: Rope | None = None
