"""TDX hosts: every field of a version 4 quote altered, and genuine hosts that the policy does not mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stip_protocol.attestation import hosts
from stip_protocol.attestation.evidence import Evidence, bind
from stip_protocol.attestation.hostpolicy import HostPolicy
from stip_protocol.attestation.tdx import TdAttributes
from stip_stack.tee import Faults, SimulatedPlatform
from stip_stack.tee.collateral import EVALUATION_NUMBER, TEE_TCB_SVN
from tests.refusals.forge import DAY, Forge, dump
from tests.refusals.rows_quote import MALFORMED, REFUSED, REPORT, Field, laid_out
from tests.refusals.table import Act, Case, Section

MRTD = bytes(range(48))
RTMRS = tuple(bytes([index]) * 48 for index in range(1, 5))
CLAIMS = b"claims of a host"
MEASURED, DEBUG, EXPIRED = "measurement_refused", "debug_enclave_refused", "collateral_expired"

QUOTE_V4 = laid_out(
    ("version", 2, MALFORMED),
    ("attestation key type", 2, MALFORMED),
    ("TEE type", 4, MALFORMED),
    ("reserved, once QE SVN", 2, REFUSED),
    ("reserved, once PCE SVN", 2, REFUSED),
    ("QE vendor id", 16, MALFORMED),
    ("user data", 20, REFUSED),
    ("TEE_TCB_SVN", 16, REFUSED),
    ("MRSEAM", 48, REFUSED),
    ("MRSIGNERSEAM", 48, REFUSED),
    ("SEAMATTRIBUTES", 8, REFUSED),
    ("TDATTRIBUTES", 8, DEBUG),
    ("XFAM", 8, REFUSED),
    ("MRTD", 48, REFUSED),
    ("MRCONFIGID", 48, REFUSED),
    ("MROWNER", 48, REFUSED),
    ("MROWNERCONFIG", 48, REFUSED),
    *((f"RTMR{index}", 48, REFUSED) for index in range(4)),
    ("REPORTDATA", 64, REFUSED),
    ("signature data length", 4, MALFORMED),
    ("signature", 64, REFUSED),
    ("attestation key", 64, REFUSED),
    ("certification data type", 2, MALFORMED),
    ("certification data size", 4, MALFORMED),
    *((f"QE report {name}", size, REFUSED) for name, size in REPORT),
    ("QE report signature", 64, REFUSED),
    ("QE authentication data length", 2, MALFORMED),
    ("QE authentication data", 32, REFUSED),
    ("nested certification data type", 2, MALFORMED),
    ("nested certification data size", 4, MALFORMED),
)
"""Intel, "Intel TDX DCAP Quoting Library API", Appendix A.3: everything before the PEM of the PCK chain."""
CHAIN = QUOTE_V4[-1].offset + QUOTE_V4[-1].size


@dataclass
class HostScene:
    """A genuine host, and a policy that means it: MRTD and all run-time measurements."""

    platform: SimulatedPlatform
    forge: Forge
    now: int

    def evidence(self, *, mrtd: bytes = MRTD, rtmrs: tuple[bytes, ...] = RTMRS, **faults: Any) -> Evidence:
        wrong = Faults(**faults)
        quote = self.platform.host_quote(mrtd, bind(CLAIMS), rtmrs=rtmrs, faults=wrong)
        return Evidence(quote, self.platform.collateral(self.now, faults=wrong, tee="TDX"))

    def policy(self, **rules: Any) -> HostPolicy:
        fields = {
            "mode": "development",
            "measurements": [MRTD.hex()],
            "simulated_root_sha256": self.platform.root_sha256.hex(),
            **{f"rtmr{index}": [value.hex()] for index, value in enumerate(RTMRS)},
        }
        return HostPolicy.from_mapping(fields | rules)

    def verifying(self, evidence: Evidence, *, claims: bytes = CLAIMS, **rules: Any) -> Act:
        async def verified() -> Any:
            return hosts.verify(evidence, self.policy(**rules), report_data=bind(claims), now=self.now)

        return verified


def host(name: str, told: str, code: str, *, rules: dict[str, Any] | None = None, **made: Any) -> Case:
    """A host whose signatures all hold."""

    async def arrange(scene: HostScene) -> Act:
        return scene.verifying(scene.evidence(**made), **rules or {})

    return Case(name, told, code, arrange, event=None)


def quoted(name: str, told: str, code: str, alter: Callable[[bytes, HostScene], bytes]) -> Case:
    async def arrange(scene: HostScene) -> Act:
        genuine = scene.evidence()
        return scene.verifying(Evidence(alter(genuine.quote, scene), genuine.collateral))

    return Case(name, told, code, arrange, event=None)


def field_row(field: Field) -> Case:
    def flipped(quote: bytes, scene: HostScene) -> bytes:
        data = bytearray(quote)
        data[field.offset] ^= 1
        return bytes(data)

    return quoted(
        f"a TDX quote whose {field.name} was altered",
        f"{field.name}: bit 0 of byte {field.offset}",
        field.code,
        flipped,
    )


def sgx(quote: bytes, scene: HostScene) -> bytes:
    return scene.platform.provider(bytes(32)).quote(bind(CLAIMS))


async def of_sgx(scene: HostScene) -> Act:
    """Evidence of an SGX enclave, collateral and all."""
    provider = scene.platform.provider(bytes(32), clock=lambda: float(scene.now))
    return scene.verifying(Evidence(provider.quote(bind(CLAIMS)), provider.collateral()))


async def with_collateral_of_sgx(scene: HostScene) -> Act:
    return scene.verifying(Evidence(scene.evidence().quote, scene.platform.collateral(scene.now)))


async def over_other_claims(scene: HostScene) -> Act:
    return scene.verifying(scene.evidence(), claims=b"claims of another host")


async def too_old(scene: HostScene) -> Act:
    quote = scene.evidence().quote
    return scene.verifying(Evidence(quote, scene.platform.collateral(scene.now - 31 * DAY, tee="TDX")))


async def unknown_key(scene: HostScene) -> Act:
    genuine = scene.evidence()
    return scene.verifying(Evidence(genuine.quote, dump(json.loads(genuine.collateral) | {"debug": True})))


HOST_QUOTES = Section(
    "TDX quotes, field by field",
    "One bit of every field of a genuine version 4 quote of a host: of the key service's own machine, or of a "
    "confidential model server.",
    "host",
    (
        *(field_row(field) for field in QUOTE_V4),
        quoted("a TDX quote with a byte after it", "one byte more", MALFORMED, lambda quote, scene: quote + b"\x00"),
        quoted("a TDX quote cut by a byte", "one byte less", MALFORMED, lambda quote, scene: quote[:-1]),
        quoted("a TDX quote cut after its report", "632 bytes", MALFORMED, lambda quote, scene: quote[:632]),
        quoted(
            "a TDX quote labelled version 5", "version", MALFORMED,
            lambda quote, scene: b"\x05\x00" + quote[2:],
        ),
        quoted("an SGX quote where a host's is expected", "the TEE", MALFORMED, sgx),
        Case("evidence of an SGX enclave where a host's is expected", "quote and collateral", MALFORMED, of_sgx,
             event=None),
    ),
)  # fmt: skip
HOSTS = Section(
    "TDX hosts",
    "Evidence that verifies, of a host that the policy does not mean, and collateral that does not speak of it.",
    "host",
    (
        host("a host with other firmware", "MRTD", MEASURED, mrtd=bytes(48)),
        *(
            host(
                f"a host with another RTMR{index}", f"RTMR{index}", MEASURED,
                rtmrs=tuple(bytes(48) if at == index else value for at, value in enumerate(RTMRS)),
            )
            for index in range(4)
        ),
        host("a host under debug", "DEBUG", DEBUG, td_attributes=TdAttributes.SEPT_VE_DISABLE | TdAttributes.DEBUG),
        host(
            "a host under performance profiling", "PERF_PROF", DEBUG,
            td_attributes=TdAttributes.SEPT_VE_DISABLE | TdAttributes.PERF_PROF,
        ),
        host("a host that the hypervisor may interrupt at page faults", "SEPT_VE_DISABLE", REFUSED,
             td_attributes=TdAttributes(0)),
        host(
            "a host that may be migrated", "MIGRATABLE", REFUSED,
            td_attributes=TdAttributes.SEPT_VE_DISABLE | TdAttributes.MIGRATABLE,
        ),
        host(
            "a host with an attribute that nobody knows", "bit 40", REFUSED,
            td_attributes=TdAttributes.SEPT_VE_DISABLE | TdAttributes(1 << 40),
        ),
        host("a host with more extended features than the policy allows", "XFAM", REFUSED, rules={"xfam_mask": 3}),
        host("a host with a TDX module that the policy does not list", "MRSEAM", MEASURED,
             rules={"mrseams": ["ab" * 48]}),
        host("a host with a TDX module of another signer", "MRSIGNERSEAM", REFUSED, mrsignerseam=b"\x01" * 48),
        host("a host with a TDX module of an unknown version", "TEE_TCB_SVN", REFUSED,
             tee_tcb_svn=bytes([TEE_TCB_SVN[0], 9, TEE_TCB_SVN[2], *bytes(13)])),
        host("a host with a TDX module that is out of date", "its SVN", REFUSED,
             required_module_svn=TEE_TCB_SVN[0] + 1),
        host("a host with a TDX module that was revoked", "its status", REFUSED, tdx_module_status="Revoked"),
        host("a host below the current TCB level", "the third TDX component", REFUSED,
             required_tdx_svn=TEE_TCB_SVN[2] + 1),
        host("a host whose TCB status is OutOfDate", "`tcbStatus`", REFUSED, tcb_status="OutOfDate"),
        host("a host whose PCK certificate was revoked", "the PCK CRL", REFUSED, pck_revoked=True),
        host("a host with TCB info signed by a PCK certificate", "its signer", REFUSED, signer="pck"),
        host("a host with collateral of an older TCB recovery", "`tcbEvaluationDataNumber`", REFUSED,
             rules={"minimum_tcb_evaluation_number": EVALUATION_NUMBER + 1}),
        host("a host with a quoting enclave that is out of date", "its ISVSVN", REFUSED, qe_isv_svn=7),
        host("a host with a QE identity of SGX", "`id`: QE", REFUSED, qe_identity_id="QE"),
        host("a host on a platform that is not enrolled", "`platforms`", REFUSED, rules={"platforms": ["ab" * 16]}),
        host("a simulated host in production mode", "`mode`", "simulated_evidence_refused",
             rules={"mode": "production", "simulated_root_sha256": None}),
        Case("a host with collateral of SGX", "the collateral", REFUSED, with_collateral_of_sgx, event=None),
        Case("a host whose quote is over other claims", "REPORTDATA", "report_data_mismatch", over_other_claims,
             event=None),
        Case("a host with expired collateral", "31 days", EXPIRED, too_old, event=None),
        Case("a host with collateral with a key that nobody knows", "`debug`", MALFORMED, unknown_key, event=None),
    ),
)  # fmt: skip
