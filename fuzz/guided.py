"""One coverage-guided run, in a process of its own: `python -m fuzz.guided NAME CORPUS [libFuzzer options]`.

libFuzzer ends the process itself, at the first finding or when its time is over.
"""

from __future__ import annotations

import logging
import sys

import atheris
import structlog

INSTRUMENTED = ["stip_protocol", "stip_enclave", "stip_gateway", "stip_server", "stip_keyservice", "cbor2", "tomllib"]


def main() -> None:
    with atheris.instrument_imports(include=INSTRUMENTED):
        from fuzz.target import judge
        from fuzz.targets import TARGETS

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    target = TARGETS[sys.argv[1]]
    atheris.Setup([sys.argv[0], *sys.argv[2:]], lambda data: judge(target, bytes(data)))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
