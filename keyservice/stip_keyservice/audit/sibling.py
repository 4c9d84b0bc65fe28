"""Another instance of the same model, made for an audit alone: what linking two instances needs.

Its keys are drawn from a root secret of its own, which derives from the audited instance's: unrelated to the keys of
that instance for whoever holds neither, and the same in every audit, so that an audit can be repeated.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from stip_keyservice.protect.equivalence.opening import OpenedInstance
from stip_keyservice.protect.parts import write_parts
from stip_keyservice.protect.plan import plan
from stip_keyservice.protect.progress import Stages, silent
from stip_keyservice.protect.storage.workspace import claimed
from stip_protocol.keys.stream import derive
from stip_protocol.secrets_file import InstanceSecrets, grant_of

LABEL = "audit/sibling"
NAME_LABEL = "audit/sibling/name"


def make(opened: OpenedInstance, folder: Path) -> OpenedInstance:
    """Protect the source of `opened` again, under other keys, into `folder`; neither certified nor signed.

    Raises `ConfigurationError` where the disk has no room or the source is at fault.
    """
    root = derive(opened.secrets.root, LABEL)
    identity = InstanceSecrets(
        instance=derive(root, NAME_LABEL)[:16].hex(),
        epoch=opened.manifest.epoch,
        preset=opened.manifest.preset,
        manifest_digest=bytes(32),  # there is no manifest
        root=root,
    )
    planned = plan(
        opened.source.config,
        opened.source.headers,
        identity.preset,
        root,
        accept_tied_head=True,  # as it was when the audited instance was made
        accept_token_cipher=True,
    )
    with claimed(folder) as workspace:
        digests = write_parts(workspace, opened.source, planned, identity, Stages(silent))
        directory = workspace.folder
    grant = grant_of(identity)
    files = replace(
        opened.files,
        directory=directory,
        instance=identity.instance,
        part_key=grant.part_key,
        vocabulary_seed=grant.vocabulary_seed,
    )
    changed = {"instance": identity.instance, "leakage": None, **digests}
    manifest = opened.manifest.model_copy(update=changed)
    return replace(opened, manifest=manifest, planned=planned, files=files, secrets=identity)
