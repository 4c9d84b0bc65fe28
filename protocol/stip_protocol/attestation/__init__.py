"""Attestation: from a quote to a decision.

- `quote`, `certificates`, `collateral`: strict parsers of what evidence is made of.
- `policy`: what is accepted. `checks`: the table of conditions. `verifier`: the decision.
- `evidence`, `gramine`: where an enclave gets its evidence.
- `ratls`, `freshness`: how evidence is bound to a TLS channel.
"""
