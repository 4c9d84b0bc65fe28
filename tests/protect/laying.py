"""The two parts of an instance, laid out from a plan without the rest of a protection: no manifest, no client part."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save, save_file

from stip_keyservice.protect.equivalence.certificate import Certificate
from stip_keyservice.protect.equivalence.certification import Certification
from stip_keyservice.protect.equivalence.protected_model import InstanceFiles
from stip_keyservice.protect.plan import Plan, plan
from stip_keyservice.protect.storage.checkpoint import Checkpoint
from stip_protocol.keys import VOCABULARY_LABEL, derive
from stip_protocol.sealed import SealedWriter

ROOT = bytes(range(32))
PART_KEY = bytes(32)


@dataclass(frozen=True)
class Laid:
    """Two parts on disk, their source and their plan."""

    source: Checkpoint
    planned: Plan
    files: InstanceFiles

    def certify(self, advance: Callable[[int], None] = lambda step: None, **options: Any) -> Certificate:
        return self.certification(**options).run(advance)

    def certification(self, **options: Any) -> Certification:
        return Certification(self.files, self.source, self.planned, **({"samples": 2, "length": 24} | options))


def lay_out(model: Path, folder: Path, preset: str, **options: Any) -> Laid:
    """Protect the checkpoint `model` into `folder`. `options` are those of `plan`."""
    source = Checkpoint.open(model)
    accepted = {"accept_tied_head": True, "accept_token_cipher": True}
    planned = plan(source.config, source.headers, preset, ROOT, **(accepted | options))
    server, enclave = folder / "server", folder / "enclave"
    server.mkdir(parents=True)
    enclave.mkdir()
    (server / "config.json").write_text(json.dumps(planned.config))
    whole = slice(0, None)
    tensors = {output.name: planned.compute(output, source, whole) for output in planned.server}
    save_file(tensors, server / "model.safetensors", metadata={"format": "pt"})
    named = {"instance": "0" * 32, "epoch": 0, "preset": preset}
    for output in planned.enclave:
        with SealedWriter(enclave / f"{output.name}.sealed", key=PART_KEY, chunk_bytes=5000, **named) as sink:  # type: ignore[arg-type]
            sink.write(save({output.name: planned.compute(output, source, whole)}))
    seed = None if planned.output == "hidden" else derive(ROOT, VOCABULARY_LABEL)
    files = InstanceFiles(folder, "0" * 32, 0, preset, planned.output, planned.vocabulary, PART_KEY, seed)
    return Laid(source, planned, files)
