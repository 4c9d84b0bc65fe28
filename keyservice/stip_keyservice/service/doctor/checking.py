"""How checks are run, and what they find."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from stip_keyservice.service.config import KeyServiceSettings
from stip_protocol.errors import ConfigurationError, StipError
from stip_protocol.runtime.logs import fault

CHECK_SECONDS = 10.0


class Verdict(StrEnum):
    PASS = "pass"  # noqa: S105 - a verdict
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """What a check found, in words without secrets, and what to do where that is not as it should be."""

    verdict: Verdict
    found: str
    remedy: str = ""


def passed(found: str) -> Finding:
    return Finding(Verdict.PASS, found)


def warned(found: str, remedy: str) -> Finding:
    return Finding(Verdict.WARN, found, remedy)


def failed(found: str, remedy: str) -> Finding:
    return Finding(Verdict.FAIL, found, remedy)


def worst(findings: Sequence[Finding]) -> Finding:
    """One finding for several: the gravest verdict, everything that is wrong, or else the first that is right."""
    order = [Verdict.FAIL, Verdict.WARN, Verdict.PASS]
    verdict = min((one.verdict for one in findings), key=order.index)
    told = [one for one in findings if one.verdict is not Verdict.PASS] or list(findings[:1])
    remedies = dict.fromkeys(one.remedy for one in told if one.remedy)
    return Finding(verdict, "; ".join(one.found for one in told), " ".join(remedies))


def _synchronized() -> bool | None:
    """Whether the system's clock is kept by NTP; None where nobody can say."""
    command = shutil.which("timedatectl")
    if command is None:
        return None
    asked = [command, "show", "--property=NTPSynchronized", "--value"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=5, check=False)
    return {"yes": True, "no": False}.get(done.stdout.strip())


@dataclass(frozen=True)
class Patient:
    """The key service that is examined, and the machine it is on."""

    home: Path
    settings: KeyServiceSettings | None = None
    """None where no configuration was named, or it cannot be read: `refusal`."""
    refusal: ConfigurationError | None = None
    wall: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic
    synchronized: Callable[[], bool | None] = _synchronized
    free: Callable[[Path], int] = field(default=lambda path: shutil.disk_usage(path).free)
    """Bytes free where a path is."""
    proc: Path = Path("/proc")


@dataclass(frozen=True)
class Check:
    name: str
    run: Callable[[Patient], Finding]
    remedy: str
    """What to do where the check itself raises."""


def examine(patient: Patient, checks: Iterable[Check], *, seconds: float = CHECK_SECONDS) -> list[tuple[str, Finding]]:
    """Run all checks, at once; returns their findings in the order of the table, after at most `seconds`."""
    running = [(check, *_begin(patient, check)) for check in checks]
    end = time.monotonic() + seconds
    findings = []
    for check, done, found in running:
        in_time = done.wait(max(0.0, end - time.monotonic()))
        late = failed(f"no answer within {seconds:g} s", check.remedy)
        findings.append((check.name, found[0] if in_time else late))
    return findings


def _begin(patient: Patient, check: Check) -> tuple[threading.Event, list[Finding]]:
    done, found = threading.Event(), list[Finding]()

    def work() -> None:
        try:
            found.append(check.run(patient))
        except StipError as error:
            found.append(failed(error.message, check.remedy))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
            found.append(failed(fault(error), check.remedy))
        done.set()

    threading.Thread(target=work, name=f"doctor {check.name}", daemon=True).start()
    return done, found
