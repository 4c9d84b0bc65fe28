"""Enclaves that are genuine, and not those that the policy means."""

from __future__ import annotations

import hashlib
from typing import Any

from stip_protocol.attestation.quote import Attributes
from stip_stack.tee import Faults
from stip_stack.tee.platform import SIGNER
from tests.keyservice.conftest import MEASUREMENT
from tests.refusals.scene import Scene
from tests.refusals.table import Act, Case, Rules, Section

ORDINARY = Attributes.INIT | Attributes.MODE64
OTHER = hashlib.sha256(b"another enclave").digest()
SIGNED: Rules = {
    "evidence": {
        "measurements": [MEASUREMENT.hex()],
        "signers": [{"mrsigner": SIGNER.hex(), "isv_prod_id": 7, "minimum_isv_svn": 5}],
    }
}
"""Besides a measurement, product 7 of a signer from SVN 5 on."""


def enclave(name: str, told: str, code: str, *, rules: Rules | None = None, **options: Any) -> Case:
    async def arrange(scene: Scene) -> Act:
        return scene.asking(await scene.request(enclave=scene.new_enclave(**options)))

    return Case(name, told, code, arrange, rules=rules or {})


def with_attributes(name: str, told: str, attributes: Attributes, code: str = "evidence_refused") -> Case:
    return enclave(name, told, code, faults=Faults(attributes=attributes))


async def not_enrolled(scene: Scene) -> Act:
    made = scene.new_enclave()
    made.provider = scene.forge.elsewhere().provider(made.provider)
    return scene.asking(await scene.request(enclave=made))


ENCLAVES = Section(
    "Enclaves",
    "Evidence that verifies, of an enclave that the policy does not mean: its attributes, its code, its signer, its "
    "platform.",
    "service",
    (
        with_attributes(
            "an enclave under debug", "DEBUG", ORDINARY | Attributes.DEBUG, "debug_enclave_refused"
        ),
        with_attributes("an enclave with the provisioning key", "PROVISION_KEY", ORDINARY | Attributes.PROVISION_KEY),
        with_attributes("an enclave with the launch key", "EINITTOKEN_KEY", ORDINARY | Attributes.EINITTOKEN_KEY),
        with_attributes("an enclave with an unknown attribute", "bit 40", ORDINARY | Attributes(1 << 40)),
        with_attributes("an enclave with a reserved attribute", "bit 3", ORDINARY | Attributes(1 << 3)),
        with_attributes("an enclave that was not initialised", "INIT", Attributes.MODE64),
        with_attributes("an enclave of 32 bits", "MODE64BIT", Attributes.INIT),
        enclave("an enclave of other code", "MRENCLAVE", "measurement_refused", measurement=OTHER),
        enclave("an enclave whose measurement is zero", "MRENCLAVE", "measurement_refused", measurement=bytes(32)),
        enclave(
            "an enclave of an accepted signer's other product", "ISVPRODID 6", "measurement_refused",
            rules=SIGNED, measurement=OTHER, isv_prod_id=6, isv_svn=5,
        ),
        enclave(
            "an enclave below the minimum security version", "ISVSVN 4", "measurement_refused",
            rules=SIGNED, measurement=OTHER, isv_prod_id=7, isv_svn=4,
        ),
        enclave(
            "an enclave of another signer with that product and version", "MRSIGNER", "measurement_refused",
            rules=SIGNED, measurement=OTHER, isv_prod_id=7, isv_svn=5, signer=bytes(32),
        ),
        Case(
            "an enclave on a platform that is not enrolled", "PPID and platform instance id", "evidence_refused",
            not_enrolled, rules={"evidence": {"platforms": lambda forge: [forge.ppid().hex()]}},
        ),
    ),
)  # fmt: skip
