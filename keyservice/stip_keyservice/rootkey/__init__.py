"""The root key: what every secret of a home is encrypted under, and what keeps it.

    provider ─keeps─▶ root key (32 bytes, made once) ─wraps─▶ private keys in the home's files
                                                             ▶ top-level data keys in the database

The root key is random and known by an id; a process that may use it holds it in memory (`ring.SoftwareRoot`). Between
processes a *provider* keeps it: a file, Gramine's sealing key, a key in a PKCS #11 token, or M of N shares
(`providers.PROVIDERS`). `[root_key]` in `home.toml` says which (`settings`); `stip_keyservice.service.state.rewrap`
moves everything under a new one.
"""
