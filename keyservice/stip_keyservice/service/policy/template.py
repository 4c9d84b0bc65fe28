"""What `policy init` writes: every rule, with what it is for.

A value that only its reader can know is a placeholder in angle brackets: the file refuses to load before that.
"""

from __future__ import annotations

from collections.abc import Sequence
from string import Template

MEASUREMENT = "<MRENCLAVE: 64 hex digits, of gramine-sgx-sigstruct-view>"
MANIFEST = "<SHA-256 of manifest.json: 64 hex digits, of sha256sum>"
ROOT = "<SHA-256 of the simulated root: 64 hex digits, of sha256sum>"

_HEAD = """\
# Policy of a key service: which enclaves get keys, of which instances, how much, for how long.
# Every rule: docs/policy.md. What is unknown refuses, and so does what is empty.
version = [1, 1]
"""

_PRODUCTION_EVIDENCE = """\
serial = 1                              # raise it with every change that is signed

[evidence]                              # all of it must hold
mode = "production"                     # Intel's root, and no other
measurements = [$measurements]
minimum_tcb_evaluation_number = 17      # Intel's round of TCB recovery; raise it with each
collateral_max_age_seconds = 2_592_000  # 30 days
# platforms = ["<PPID or platform instance id: 32 hex digits>"]   # enrol them where the operator hosts the enclave
accepted_statuses = [
    { status = "UpToDate" },
    # { status = "SWHardeningNeeded", advisories = ["INTEL-SA-00615"] },   # only advisories that you have read
]
"""

_DEVELOPMENT_EVIDENCE = """\
# serial = 1                            # needed once the policy is signed

[evidence]
mode = "development"                    # a simulated TEE: NOTHING IS PROTECTED
simulated_root_sha256 = $root
measurements = [$measurements]
"""

_REST = """
[lease]
seconds = 900                           # life of one lease
tokens = 1024                           # debited at once; lost where an enclave dies
heartbeat_tokens = 64                   # a revocation reaches a running enclave within so many
grace_seconds = 300                     # so long after its end a lease is still renewed
audience = "gateway.stip"               # `audience` of gateway.toml

[release]
nonce_seconds = 60                      # how old evidence may be
delegation_seconds = 86_400             # the longest word of a user

[budgets]                               # caps on what any user is given, whatever their own budget
tokens_per_day = 1_000_000
# tokens_per_user = 100_000_000

[canaries]
per_bundle = 0                          # sessions with known results that go with one bundle
"""

_INSTANCE = """
[[instances]]                           # a signed manifest that is served; each epoch has its own
manifest = $manifest
# kind = "dedicated"                    # or "shared"; default: as it is registered
# domains = ["acme"]                    # who at most may use it; default: whom the registry says
# users = ["alice"]
"""

_PRODUCTION_LEAKAGE = """
[leakage]
required = true                         # nothing of an instance that was not audited

[[leakage.maxima]]                      # the operator alone may read at most this share of tokens
knowledge = ["server"]
metric = "token_top1"
at_most = 0.5
attacks = ["A", "B", "C", "I"]
"""


def production(measurements: Sequence[str], manifests: Sequence[str]) -> str:
    """A policy for production. Without measurements or manifests their place is marked."""
    return _HEAD + _filled(_PRODUCTION_EVIDENCE, measurements) + _REST + _instances(manifests) + _PRODUCTION_LEAKAGE


def development(measurements: Sequence[str], manifests: Sequence[str], root: str | None) -> str:
    """A policy that trusts a simulated TEE by the SHA-256 of its root. Without manifests it serves every instance."""
    listed = _instances(manifests) if manifests else ""
    return _HEAD + _filled(_DEVELOPMENT_EVIDENCE, measurements, root=_quoted(root or ROOT)) + _REST + listed


def _filled(text: str, measurements: Sequence[str], **values: str) -> str:
    listed = ", ".join(map(_quoted, measurements or [MEASUREMENT]))
    return Template(text).substitute(values, measurements=listed)


def _instances(manifests: Sequence[str]) -> str:
    return "".join(Template(_INSTANCE).substitute(manifest=_quoted(one)) for one in manifests or [MANIFEST])


def _quoted(text: str) -> str:
    return f'"{text}"'
