"""Somebody else's server in the enclave's place."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from pathlib import Path

from stip_protocol.attestation import ratls


class Impostor:
    """A TLS server that records every decrypted byte it is told and every handshake it is offered."""

    def __init__(self, identity: ratls.Identity, folder: Path) -> None:
        pem = folder / "impostor.pem"
        pem.write_bytes(identity.certificate_pem + identity.private_key_pem)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(pem)
        self._context.set_alpn_protocols(["h2"])
        self.offered = 0
        self.heard = b""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.offered += 1
                threading.Thread(target=self._listen, args=(connection,), daemon=True).start()

    def _listen(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), self._context.wrap_socket(connection, server_side=True) as secured:
            while data := secured.recv(65536):
                self.heard += data

    def close(self) -> None:
        self._listener.close()
