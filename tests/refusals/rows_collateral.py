"""Collateral: what Intel must have said, and when, of this platform, its quoting enclave and its certificates."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from stip_protocol.attestation.platforms import PlatformKind
from stip_protocol.attestation.quote import Attributes
from stip_stack.pccs import StandIn, serve
from stip_stack.tee import Faults
from stip_stack.tee.collateral import EVALUATION_NUMBER
from stip_stack.tee.pki import FMSPC, PCE_SVN
from tests.refusals.forge import DAY, Edit, Forge, date, dump
from tests.refusals.scene import Scene
from tests.refusals.table import Act, Case, Rules, Section

HOUR = 3600
SGX = PlatformKind("sgx", FMSPC, "platform")
EXPIRED, REFUSED, MALFORMED = "collateral_expired", "evidence_refused", "evidence_malformed"
STATUSES = (
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
    "Revoked",
)
"""Of Intel's, all that an ordinary policy does not accept."""


def faulty(
    name: str, told: str, code: str = REFUSED, *, says: str = "", rules: Rules | None = None, **faults: Any
) -> Case:
    """Evidence of a platform about which something is wrong, and whose signatures all hold."""

    async def arrange(scene: Scene) -> Act:
        return scene.asking(await scene.request(enclave=scene.new_enclave(faults=Faults(**faults))))

    return Case(name, told, code, arrange, says=says, rules=rules or {})


def given(
    name: str, told: str, code: str, make: Callable[[Scene], bytes], *, says: str = "", rules: Rules | None = None
) -> Case:
    """A genuine quote with other collateral."""

    async def arrange(scene: Scene) -> Act:
        request = await scene.request()
        request.collateral = make(scene)
        return scene.asking(request)

    return Case(name, told, code, arrange, says=says, rules=rules or {})


def changed(**fields: Any) -> Callable[[Scene], bytes]:
    return lambda scene: dump(scene.forge.collateral() | fields)


def reissued(name: str, told: str, role: str, by: str, *, opens: int, closes: int) -> Case:
    """A certificate of the platform's hierarchy with other dates, in quote and collateral alike."""

    async def arrange(scene: Scene) -> Act:
        made = scene.new_enclave()
        forged = scene.forge.reissued(role, by, opens=opens, closes=closes)
        made.provider = forged.provider(made.provider)
        return scene.asking(await scene.request(enclave=made))

    return Case(name, told, EXPIRED, arrange)


def dates(opens: int, closes: int) -> Callable[[Forge], Edit]:
    def made(forge: Forge) -> Edit:
        return lambda value: value.update(issueDate=date(forge.at(opens)), nextUpdate=date(forge.at(closes)))

    return made


def dated(when: str, opens: int, closes: int) -> tuple[Case, ...]:
    """Every piece of evidence that has dates, with these (seconds from now)."""
    window = dates(opens, closes)
    signed, listed, certified = "its `issueDate` and `nextUpdate`", "its `thisUpdate` and `nextUpdate`", "its validity"
    return (
        given(
            f"TCB info that {when}", signed, EXPIRED,
            lambda scene: scene.forge.with_tcb_info(window(scene.forge)),
        ),
        given(
            f"a QE identity that {when}", signed, EXPIRED,
            lambda scene: scene.forge.with_qe_identity(window(scene.forge)),
        ),
        given(
            f"a root CRL that {when}", listed, EXPIRED,
            lambda scene: scene.forge.with_crl("root_ca_crl", "root", opens=opens, closes=closes),
        ),
        given(
            f"a PCK CRL that {when}", listed, EXPIRED,
            lambda scene: scene.forge.with_crl("pck_crl", "pck_ca", opens=opens, closes=closes),
        ),
        reissued(f"a PCK certificate that {when}", certified, "pck", "pck_ca", opens=opens, closes=closes),
        reissued(f"a PCK CA that {when}", certified, "pck_ca", "root", opens=opens, closes=closes),
        reissued(
            f"a TCB signing certificate that {when}", certified, "tcb_signer", "root", opens=opens, closes=closes
        ),
    )  # fmt: skip


def signed_by_pck(field: str) -> Callable[[Scene], bytes]:
    """Of the two signed documents, one signed by the PCK key, under the chain that says so."""

    def make(scene: Scene) -> bytes:
        forge, collateral = scene.forge, scene.forge.collateral()
        signature = forge.pki.sign("pck", collateral[field].encode()).hex()
        chain = forge.pki.chain("pck", "pck_ca", "root")
        return dump(collateral | {f"{field}_signature": signature, f"{field}_issuer_chain": chain})

    return make


def tampered(field: str) -> Callable[[Scene], bytes]:
    """A signed document with another date that stays good, under the signature it had."""

    def make(scene: Scene) -> bytes:
        collateral = scene.forge.collateral()
        value = json.loads(collateral[field])
        value["nextUpdate"] = date(scene.forge.at(300 * DAY))
        return dump(collateral | {field: json.dumps(value, separators=(",", ":"))})

    return make


def stranger_part(*fields: str) -> Callable[[Scene], bytes]:
    """Parts of another hierarchy's collateral."""

    def make(scene: Scene) -> bytes:
        other = scene.stranger_forge.collateral()
        return dump(scene.forge.collateral() | {field: other[field] for field in fields})

    return make


def without(field: str) -> Callable[[Scene], bytes]:
    def make(scene: Scene) -> bytes:
        collateral = scene.forge.collateral()
        del collateral[field]
        return dump(collateral)

    return make


def pretending(name: str, told: str, edit: Edit) -> Case:
    return given(name, told, REFUSED, lambda scene: scene.forge.with_qe_identity(edit))


def low_evaluation(document: str) -> Callable[[Scene], bytes]:
    def edit(value: dict[str, Any]) -> None:
        value["tcbEvaluationDataNumber"] = EVALUATION_NUMBER - 1

    def make(scene: Scene) -> bytes:
        forge = scene.forge
        return forge.with_tcb_info(edit) if document == "tcb_info" else forge.with_qe_identity(edit)

    return make


async def too_old(scene: Scene) -> Act:
    made = scene.new_enclave()
    request = await scene.request(enclave=made)
    request.collateral = scene.world.platform.collateral(scene.now - 8 * DAY)
    return scene.asking(request)


LEAST: Rules = {"evidence": {"minimum_tcb_evaluation_number": EVALUATION_NUMBER}}
HARDENED: Rules = {
    "evidence": {
        "accepted_statuses": [
            {"status": "UpToDate"},
            {"status": "SWHardeningNeeded", "advisories": ["INTEL-SA-00334"]},
            {"status": "OutOfDate", "advisories": ["INTEL-SA-00615"]},
        ]
    }
}

SIGNERS = Section(
    "Who signed the collateral",
    "TCB info and QE identity are signed by Intel's TCB signing certificate directly below the root, and by nobody "
    "else whose certificate chains to it.",
    "service",
    (
        faulty("collateral signed by a PCK certificate", "the signer of both documents", signer="pck"),
        given("TCB info signed by a PCK certificate", "its signer", REFUSED, signed_by_pck("tcb_info"),
              says="TCB info chain"),
        given("a QE identity signed by a PCK certificate", "its signer", REFUSED, signed_by_pck("qe_identity"),
              says="QE identity chain"),
        faulty("collateral signed under another common name", "the CN of the TCB signer", signer="renamed",
               says="common name"),
        given("TCB info altered after signing", "`nextUpdate`", REFUSED, tampered("tcb_info"),
              says="Signature is invalid for tcb_info"),
        given("a QE identity altered after signing", "`nextUpdate`", REFUSED, tampered("qe_identity"),
              says="Signature is invalid for qe_identity"),
        given(
            "TCB info of another hierarchy", "document, signature and chain", REFUSED,
            stranger_part("tcb_info", "tcb_info_signature", "tcb_info_issuer_chain"),
        ),
        given(
            "a QE identity of another hierarchy", "document, signature and chain", REFUSED,
            stranger_part("qe_identity", "qe_identity_signature", "qe_identity_issuer_chain"),
        ),
        given(
            "TCB info under another one's signature", "the signature", REFUSED, stranger_part("tcb_info_signature"),
            says="Signature is invalid for tcb_info"
        ),
        given("a PCK CRL of another CA of the same name", "the CRL", REFUSED, stranger_part("pck_crl")),
        given("a root CRL of another root of the same name", "the CRL", REFUSED, stranger_part("root_ca_crl")),
        given(
            "a PCK CRL by the root", "its issuer", REFUSED,
            lambda scene: scene.forge.with_crl("pck_crl", "root", opens=-HOUR, closes=DAY), says="CRL issuers"
        ),
        given(
            "a root CRL by the PCK CA", "its issuer", REFUSED,
            lambda scene: scene.forge.with_crl("root_ca_crl", "pck_ca", opens=-HOUR, closes=DAY), says="CRL issuers"
        ),
        given(
            "a PCK CRL with the chain of another CA", "its issuer chain", REFUSED,
            stranger_part("pck_crl_issuer_chain"), says="PCK CRL root"
        ),
        given(
            "everything of another hierarchy but the quote", "the collateral", REFUSED,
            lambda scene: dump(scene.stranger_forge.collateral()),
        ),
    ),
)  # fmt: skip
DATES = Section(
    "When collateral holds",
    "Everything in quote and collateral has a beginning and an end, and one piece that does not hold is enough.",
    "service",
    (
        *dated("expired", -2 * DAY, -HOUR),
        *dated("is not valid yet", HOUR, 2 * DAY),
        Case(
            "collateral older than the policy allows", "eight days, where seven are allowed", EXPIRED,
            too_old, rules={"evidence": {"collateral_max_age_seconds": 7 * DAY}}, says="collateral age"
        ),
    ),
)  # fmt: skip
REVOKED = Section(
    "What Intel revoked",
    "A revocation list names the certificate.",
    "service",
    (
        faulty("a revoked PCK certificate", "the PCK CRL", pck_revoked=True),
        faulty("a revoked PCK CA", "the root CRL", intermediate_revoked=True),
        faulty("a revoked TCB signer", "the root CRL", tcb_signer_revoked=True),
    ),
)
LEVELS = Section(
    "What the collateral says of the platform",
    "The TCB level of platform and quoting enclave, with the advisories that stand against it; and that the collateral "
    "is about this platform at all.",
    "service",
    (
        faulty("TCB info labelled version 2", "`version`", tcb_info_version=2, says="got SGX, 2"),
        faulty("TCB info of another PCE", "`pceId`", pce_id=b"\x00\x01", says="0001, allowed"),
        faulty("TCB info of another platform family", "`fmspc`", fmspc=b"OTHERS", says="Fmspc mismatch"),
        faulty("TCB info of TDX", "`id`", tcb_info_id="TDX", says="non-SGX TCB info"),
        faulty("a QE identity of the verification enclave", "`id`: QVE", qe_identity_id="QVE", says="QVE version 2"),
        faulty("a QE identity of TDX", "`id`: TD_QE", qe_identity_id="TD_QE", says="TD_QE version 2"),
        pretending(
            "a QE identity of another signer", "`mrsigner`", lambda value: value.update(mrsigner="AB" * 32)
        ),
        pretending("a QE identity of another product", "`isvprodid`", lambda value: value.update(isvprodid=99)),
        pretending(
            "a QE identity with other attributes", "`attributes`",
            lambda value: value.update(attributes=int(Attributes.INIT).to_bytes(8, "little").hex() + "00" * 8),
        ),
        pretending(
            "a QE identity with another MISCSELECT", "`miscselect`", lambda value: value.update(miscselect="00000001")
        ),
        pretending("a QE identity labelled version 3", "`version`", lambda value: value.update(version=3)),
        faulty("a quoting enclave that is out of date", "its ISVSVN, below the current one", qe_isv_svn=7,
               says="TCB status: got OutOfDate, INTEL-SA-00615"),
        faulty("a quoting enclave below every known level", "its ISVSVN", qe_isv_svn=0, says="QE ISVSVN 0"),
        faulty("a platform below the current level", "`pcesvn` of the best level", required_pce_svn=PCE_SVN + 1,
               says="TCB status: got OutOfDate, INTEL-SA-00828"),
        faulty(
            "a platform below every known level", "`pcesvn` of all levels",
            required_pce_svn=PCE_SVN + 2, oldest_pce_svn=PCE_SVN + 1, says="No matching TCB level"
        ),
        *(
            faulty(f"a platform whose TCB status is {status}", "`tcbStatus`", tcb_status=status)
            for status in STATUSES
        ),
        faulty("a platform with a status that nobody knows", "`tcbStatus`", tcb_status="Fine"),
        faulty("a current platform with an advisory", "`advisoryIDs`", advisories=("INTEL-SA-00334",),
               says="got UpToDate, INTEL-SA-00334"),
        faulty(
            "an accepted status with an advisory that is not listed", "`advisoryIDs`: one more than the policy accepts",
            tcb_status="SWHardeningNeeded", advisories=("INTEL-SA-00334", "INTEL-SA-00615"), rules=HARDENED,
            says="got SWHardeningNeeded, INTEL-SA-00334, INTEL-SA-00615"
        ),
        faulty(
            "an advisory that is accepted with another status", "`advisoryIDs`",
            tcb_status="SWHardeningNeeded", advisories=("INTEL-SA-00615",), rules=HARDENED,
            says="got SWHardeningNeeded, INTEL-SA-00615"
        ),
        faulty(
            "collateral of an older TCB recovery", "`tcbEvaluationDataNumber` of both documents",
            evaluation_number=EVALUATION_NUMBER - 1, rules=LEAST, says="TCB evaluation number"
        ),
        given(
            "TCB info of an older TCB recovery", "`tcbEvaluationDataNumber`", REFUSED, low_evaluation("tcb_info"),
            rules=LEAST, says="TCB evaluation number"
        ),
        given(
            "a QE identity of an older TCB recovery", "`tcbEvaluationDataNumber`", REFUSED,
            low_evaluation("qe_identity"), rules=LEAST, says="TCB evaluation number"
        ),
    ),
)  # fmt: skip
FORM = Section(
    "What is no collateral",
    "Parsed strictly: some keys that Intel's libraries know would replace the chain that lies in the quote.",
    "service",
    (
        given("collateral with a key that nobody knows", "`debug`", MALFORMED, changed(debug=True)),
        given(
            "collateral that brings a PCK chain of its own", "`pck_certificate_chain`", MALFORMED,
            lambda scene: dump(
                scene.forge.collateral() | {"pck_certificate_chain": scene.forge.pki.chain("pck", "pck_ca", "root")}
            ),
        ),
        *(
            given(f"collateral without its {field}", f"`{field}`, left out", MALFORMED, without(field))
            for field in (
                "tcb_info", "tcb_info_signature", "tcb_info_issuer_chain", "qe_identity", "qe_identity_signature",
                "qe_identity_issuer_chain", "root_ca_crl", "pck_crl", "pck_crl_issuer_chain",
            )
        ),
        given("collateral with a signature of 63 bytes", "`tcb_info_signature`", MALFORMED,
              changed(tcb_info_signature="ab" * 63)),
        given("collateral with a root CRL that is none", "`root_ca_crl`", MALFORMED, changed(root_ca_crl="3000")),
        given("collateral with TCB info that is no JSON", "`tcb_info`", MALFORMED, changed(tcb_info="{")),
        given("no collateral", "nothing", MALFORMED, lambda scene: b""),
        given("collateral that is no JSON", "every byte", MALFORMED, lambda scene: b"\xff" * 64),
        given("collateral larger than any", "70,000 bytes", MALFORMED, lambda scene: bytes(70_000)),
    ),
)  # fmt: skip


async def revoked_since(scene: Scene) -> Act:
    """The host sends collateral from before the revocation, which would still hold for weeks."""
    stale = scene.world.platform.collateral(scene.now)
    now = StandIn({SGX: scene.world.platform.collateral(scene.now, faults=Faults(pck_revoked=True))})
    served = serve(now)
    scene.finally_(lambda: served.__exit__(None, None, None))
    source = scene.collateral_source(served.__enter__().url)
    replica = await scene.replica(collateral=source)
    request = await scene.request()
    request.collateral = stale
    return scene.asking(request, stub=replica.stub)


async def nobody_to_ask(scene: Scene) -> Act:
    replica = await scene.replica(collateral=scene.collateral_source())
    return scene.asking(await scene.request(), stub=replica.stub)


async def another_family(scene: Scene) -> Act:
    served = serve(StandIn({}))
    scene.finally_(lambda: served.__exit__(None, None, None))
    replica = await scene.replica(collateral=scene.collateral_source(served.__enter__().url))
    return scene.asking(await scene.request(), stub=replica.stub)


OWN = Section(
    "Collateral of the key service's own",
    "With `[collateral]`, evidence is judged by what the key service fetched itself, and not by what the enclave's "
    "host likes to send.",
    "service",
    (
        Case("a PCK certificate revoked since, behind collateral of before", "what the host sends", REFUSED,
             revoked_since, says="certificate chain"),
        Case("evidence while no collateral of its platform is kept, offline", "`[collateral]`",
             "collateral_unavailable", nobody_to_ask),
        Case("evidence of a platform of which the PCCS has no collateral", "`[collateral]`",
             "collateral_unavailable", another_family),
    ),
)  # fmt: skip
