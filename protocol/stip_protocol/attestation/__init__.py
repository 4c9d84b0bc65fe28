"""Attestation: from a quote to a decision.

- `quote`, `tdx`, `certificates`, `collateral`: strict parsers of what evidence is made of.
- `gates`: conditions that evidence of every TEE must meet, and how a table of conditions is gone through.
- `policy`, `checks`, `verifier`: SGX enclaves: what is accepted, the table of conditions, the decision.
- `hostpolicy`, `hosts`: the same for TDX hosts.
- `platforms`, `pccs`, `collateral_cache`, `collateral_bundle`: how collateral gets here, and how long it is served.
- `evidence`, `gramine`: where an enclave gets its evidence.
- `ratls`, `freshness`: how evidence is bound to a TLS channel.
"""
