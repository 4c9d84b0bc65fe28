"""Configuration files: TOML, validated once at start into frozen models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo

from stip_protocol import toml
from stip_protocol.documents import explain
from stip_protocol.errors import ConfigurationError


def _resolve(path: Path, info: ValidationInfo) -> Path:
    base = (info.context or {}).get("base")
    try:
        return path if base is None else Path(base, path.expanduser())
    except RuntimeError:
        raise ValueError("the home folder of that user is not known") from None


def _require_port(address: str) -> str:
    if int(address.rpartition(":")[2]) > 0xFFFF:
        raise ValueError("the port is above 65535")
    return address


ConfigPath = Annotated[Path, AfterValidator(_resolve)]
"""A path in a configuration file: relative ones are relative to the file's folder."""
Address = Annotated[
    str, Field(pattern=r"^(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.\-]+):[0-9]{1,5}$"), AfterValidator(_require_port)
]
"""host:port; port 0 takes a free one and announces it."""


class Settings(BaseModel):
    """Base of every part's configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class Serving(Settings):
    """Where a part listens and how it leaves."""

    listen: Address = "127.0.0.1:0"
    metrics: Address = "127.0.0.1:0"
    metrics_snapshot_seconds: float = Field(default=15.0, ge=0)
    """Scrapes within this time see the same numbers, so that a scraper cannot time single tokens."""
    drain_seconds: float = Field(default=30.0, ge=0, le=3600)
    log_level: str = Field(default="info", pattern="^(debug|info|warning|error)$")


S = TypeVar("S", bound=Settings)


def load(kind: type[S], path: Path) -> S:
    """The settings in a TOML file. Raises `ConfigurationError` naming the file and the field."""
    try:
        return kind.model_validate(toml.read(path.read_bytes()), context={"base": path.parent})
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        raise ConfigurationError(f"{path}: {explain(error)}") from None
    except ValueError as error:
        raise ConfigurationError(f"{path}: {error}") from None
