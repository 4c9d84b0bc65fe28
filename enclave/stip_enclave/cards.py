"""What a replica says of itself, held against the signed manifest."""

from __future__ import annotations

import grpc.aio

from stip_protocol import rpc
from stip_protocol.errors import ManifestMismatch
from stip_protocol.manifest import Manifest
from stip_protocol.versions import require_wire
from stip_protocol.wire import model_pb2, model_pb2_grpc

OUTPUT = {"hidden": model_pb2.OUTPUT_HIDDEN, "top": model_pb2.OUTPUT_TOP, "ids": model_pb2.OUTPUT_IDS}
"""The wire's output by the manifest's."""


async def describe(
    channel: grpc.aio.Channel, manifest: Manifest, digest: bytes, seconds: float, replica: str = ""
) -> model_pb2.Card:
    """The card of `replica`, or of any that the peer chooses. `digest`: of the manifest.

    Raises `ManifestMismatch`, `VersionUnsupported`, or what the peer or the transport says.
    """
    reference = model_pb2.InstanceRef(instance=manifest.instance, epoch=manifest.epoch)
    metadata = ((rpc.REPLICA_KEY, replica),) if replica else ()
    try:
        card: model_pb2.Card = await model_pb2_grpc.ModelStub(channel).Describe(
            reference, timeout=seconds, metadata=metadata
        )
    except grpc.aio.AioRpcError as error:
        raise rpc.from_rpc(error) from None
    require_card(card, manifest, digest)
    return card


def require_card(card: model_pb2.Card, manifest: Manifest, digest: bytes) -> None:
    """Raise `ManifestMismatch` or `VersionUnsupported` where the card is not that of the manifest's instance."""
    require_wire(card.version, peer="replica")
    vocabulary = 0 if manifest.output == "hidden" else manifest.vocabulary
    for field_name, got, allowed in (
        ("instance", card.instance, manifest.instance),
        ("epoch", card.epoch, manifest.epoch),
        ("manifest_digest", card.manifest_digest.hex(), digest.hex()),
        ("preset", card.preset, manifest.preset),
        ("dtype", card.dtype, manifest.dtype),
        ("width", card.width, manifest.width),
        ("vocabulary", card.vocabulary, vocabulary),
    ):
        if got != allowed:
            raise ManifestMismatch.because(f"card {field_name}", got, allowed)
    if OUTPUT[manifest.output] not in card.outputs:
        raise ManifestMismatch.because("card outputs", list(card.outputs), f"{OUTPUT[manifest.output]} among them")
    if min(card.max_rows, card.max_positions) < 1:
        raise ManifestMismatch.because("card max_rows, max_positions", 0, "at least 1")
