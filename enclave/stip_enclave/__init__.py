"""The enclave: sessions from ids to ids. Keyed rows go out, outputs come back, ids are sampled here.

- `main`, `cli`, `config`, `guards`: one process, its settings, what it denies its host.
- `collateral`: the process beside it, on its host, that keeps the collateral file fresh.
- `identity`, `release`, `lease`, `accounts`: who it is, and what the key service lets it do.
- `tables`, `head`, `instances`: an opened instance.
- `links`, `link`, `outbox`, `inbox`, `replies`, `cards`: the streams to the replicas, and what is believed of them.
- `travel`, `seat`, `patience`, `history`: where a session's rows are, and how they get elsewhere.
- `stepwise`, `drafting`, `alone`, `substitution`: the two ways of decoding.
- `sampling`, `batches`, `decode`: outputs to tokens.
- `session`, `turns`, `service`: turns, and the clients' side.
"""
