"""What the parts of STIP share, and the only place where they meet.

The wire between enclave, gateway and server; the release of keys; leases; attestation; the key algebra;
the error tree; the names of metrics. Nothing here starts a process or opens a socket of its own.
"""
