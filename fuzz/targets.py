"""Every target, by name."""

from __future__ import annotations

from fuzz import documents, evidence, files, frames
from fuzz.target import Target

TARGETS: dict[str, Target] = {
    target.name: target for target in (*evidence.TARGETS, *documents.TARGETS, *files.TARGETS, *frames.TARGETS)
}
