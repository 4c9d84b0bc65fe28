"""Policies for TDX hosts: confidential virtual machines that run the key service or a model server.

    version = [1, 0]
    mode = "production"
    measurements = ["<MRTD, 96 hex digits>"]
    rtmr1 = ["<96 hex digits>"]
    rtmr2 = ["<96 hex digits>"]
    minimum_tcb_evaluation_number = 17

MRTD is the virtual firmware alone. A policy that leaves RTMR1 and RTMR2 open accepts any kernel and any command
line that this firmware starts.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from stip_protocol.attestation.policy import EvidenceRules
from stip_protocol.attestation.tdx import MEASUREMENT, RTMRS

TdAttribute = Literal["LASS", "TPA", "PERFMON"]
"""Names of `stip_protocol.attestation.tdx.TdAttributes` that a policy decides about. About the others it may not:
debug, profiling, migration and supervisor keys are always refused, SEPT_VE_DISABLE is always required."""


def _from_hex(value: object) -> object:
    return bytes.fromhex(value) if isinstance(value, str) else value


Bytes48 = Annotated[bytes, BeforeValidator(_from_hex), Field(min_length=MEASUREMENT, max_length=MEASUREMENT)]
Measurements = Annotated[tuple[Bytes48, ...], Field(strict=False, min_length=1, max_length=256)]


class HostPolicy(EvidenceRules):
    """What evidence of a TDX host is accepted. A list that is given must hold one of its values; None accepts any."""

    context: ClassVar[str] = "stip/host-policy"
    title: ClassVar[str] = "host policy"

    measurements: Measurements
    """MRTDs."""
    rtmr0: Measurements | None = None
    rtmr1: Measurements | None = None
    rtmr2: Measurements | None = None
    rtmr3: Measurements | None = None
    mrseams: Measurements | None = None
    """Measurements of the TDX module; None leaves it to Intel's TCB levels."""
    required_attributes: Annotated[tuple[TdAttribute, ...], Field(strict=False)] = ()
    forbidden_attributes: Annotated[tuple[TdAttribute, ...], Field(strict=False)] = ("PERFMON",)
    """Performance counters are a side channel."""
    xfam_mask: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    """Extended features a TD may have enabled, as bits of XFAM; None accepts any."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        both = sorted(set(self.required_attributes) & set(self.forbidden_attributes))
        if both:
            raise ValueError(f"required_attributes: got {', '.join(both)}, which is forbidden as well")
        return self

    @property
    def rtmrs(self) -> tuple[tuple[bytes, ...] | None, ...]:
        """The lists for RTMR0 to RTMR3."""
        lists = (self.rtmr0, self.rtmr1, self.rtmr2, self.rtmr3)
        assert len(lists) == RTMRS
        return lists
