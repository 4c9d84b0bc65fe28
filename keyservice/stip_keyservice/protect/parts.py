"""The server part and the enclave part, as files to write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from stip_keyservice.protect.plan import Output, Plan
from stip_keyservice.protect.progress import Stages
from stip_keyservice.protect.storage.checkpoint import CONFIG, GENERATION_CONFIG, INDEX, Checkpoint
from stip_keyservice.protect.storage.journal import Journal
from stip_keyservice.protect.storage.memory import default_workers, give_back
from stip_keyservice.protect.storage.workspace import JOURNAL, Workspace
from stip_keyservice.protect.storage.writer import (
    SHARD_BYTES,
    Compute,
    DigestedFile,
    Stream,
    TensorFile,
    checkpoint_files,
    index_of,
    write_document,
    write_files,
)
from stip_protocol.manifest import FileDigest
from stip_protocol.sealed import SealedStream
from stip_protocol.secrets_file import InstanceSecrets, grant_of

READ_AHEAD = 8
"""Outputs between the one that is computed and the one whose source the disk is asked for."""

Digests = dict[str, FileDigest]
"""Of what was written, taken while it was written, by name in a part's folder."""


def write_parts(
    workspace: Workspace,
    source: Checkpoint,
    planned: Plan,
    identity: InstanceSecrets,
    stages: Stages,
    *,
    workers: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Digests]:
    """Write both parts, but for the files that an earlier run left whole. Gives the digests of each part's files.

    `workers` None: as many as cores and memory allow.

    Raises `ConfigurationError` where the disk has no room or the source is at fault.
    """
    parts = {"server": server_files(planned, source, shard_bytes), "enclave": enclave_files(planned, source, identity)}
    journal = Journal(workspace.folder / JOURNAL, workspace.folder, identity.root)
    if journal.listed:
        layouts = {file.name: file.layout for files in parts.values() for file in files}
        with stages.stage("check", sum(digest.size for digest in journal.listed.values())) as advance:
            journal.keep_whole(layouts, advance)
    workspace.clear(journal.listed)
    missing = [file for files in parts.values() for file in files if file.name not in journal.listed]
    workspace.require_space(sum(file.nbytes for file in missing))
    if workers is None:
        workers = default_workers(source.headers, source.largest_shard, planned.residual_width)
    compute = _reading_ahead(planned, source, [output for file in missing for output in file.outputs])
    for part, files in parts.items():
        total = sum(file.nbytes for file in files)
        before = sum(file.nbytes for file in files if file.name in journal.listed)
        with stages.stage(part, total, before) as advance:
            write_files(workspace.folder, files, compute, workers=workers, journal=journal, advance=advance)
    source.let_go()
    give_back()
    digests = {part: {Path(file.name).name: journal.listed[file.name] for file in parts[part]} for part in parts}
    digests["server"] |= write_server_documents(workspace.folder / "server", planned, parts["server"])
    return digests


def server_files(planned: Plan, source: Checkpoint, shard_bytes: int = SHARD_BYTES) -> list[TensorFile]:
    """The shards of the server part."""
    return checkpoint_files("server", in_file_order(planned.server, planned, source), shard_bytes)


def enclave_files(planned: Plan, source: Checkpoint, secrets: InstanceSecrets) -> list[TensorFile]:
    """A sealed file for each tensor of the enclave part; none where the server holds everything."""
    return [
        TensorFile(f"enclave/{output.name}.sealed", (output,), partial(_sealed, secrets, f"{output.name}.sealed"))
        for output in in_file_order(planned.enclave, planned, source)
    ]


def _reading_ahead(planned: Plan, source: Checkpoint, outputs: Sequence[Output]) -> Compute:
    """Computes row blocks of `outputs`, which come in this order, and has the disk read what comes after them."""
    following = dict(zip(outputs, outputs[READ_AHEAD:], strict=False))

    def compute(output: Output, rows: slice) -> torch.Tensor:
        soon = following.get(output)
        if rows.start == 0 and soon and (place := planned.namesake(soon)):
            source.expect(place.name, place.start, place.stop)
        return planned.compute(output, source, rows)

    return compute


def in_file_order(outputs: Sequence[Output], planned: Plan, source: Checkpoint) -> list[Output]:
    """Outputs as the source's tensors of the same names lie, so that a disk is read about once from front to back.

    Never as what they are made of lies: where experts have changed names, that order would be the key's.
    """

    def place(output: Output) -> tuple[int, int, int]:
        namesake = planned.namesake(output)
        return (*source.place(namesake.name), namesake.start) if namesake else (-1, 0, 0)

    return sorted(outputs, key=place)


def write_server_documents(folder: Path, planned: Plan, files: Sequence[TensorFile]) -> Digests:
    """What lies beside the shards: configurations, and the index once the shards are whole."""
    documents = {
        name: (json.dumps(content, indent=2) + "\n").encode()
        for name, content in ((CONFIG, planned.config), (GENERATION_CONFIG, planned.generation_config))
    }
    if index := index_of(files):
        documents[INDEX] = index
    return {name: write_document(folder / name, data) for name, data in documents.items()}


def _sealed(secrets: InstanceSecrets, name: str, file: DigestedFile) -> Stream:
    return SealedStream(
        file,
        key=grant_of(secrets).part_key,
        instance=secrets.instance,
        epoch=secrets.epoch,
        preset=secrets.preset,
        file=name,
    )
