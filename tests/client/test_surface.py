"""The surface: exactly these names, and light enough for a laptop."""

from __future__ import annotations

import subprocess
import sys

import stip

EXPORTED = {
    "AsyncConnection",
    "AsyncSession",
    "AttestationError",
    "ChannelChanged",
    "Chunk",
    "Completion",
    "ConfigurationError",
    "Connection",
    "FinishReason",
    "IntegrityError",
    "Profile",
    "RequestInvalid",
    "Session",
    "StipError",
    "Unavailable",
    "Verification",
    "aconnect",
    "averify",
    "connect",
    "verify",
}


def test_the_exported_names_are_exactly_the_intended_ones():
    assert set(stip.__all__) == EXPORTED
    assert all(hasattr(stip, name) for name in EXPORTED)


def test_the_client_loads_neither_torch_nor_numpy_nor_transformers_nor_the_key_algebra():
    code = (
        "import sys, stip, stip.cli\n"
        "heavy = ('torch', 'numpy', 'transformers', 'sqlalchemy', 'stip_protocol.keys', 'stip_stack')\n"
        "print(*(name for name in heavy if name in sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
