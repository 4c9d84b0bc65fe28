"""The enclave: sessions from ids to ids. Keyed rows go out, outputs come back, ids are sampled here.

- `main`, `cli`, `config`, `guards`: one process, its settings, what it denies its host.
- `identity`, `release`, `lease`, `accounts`: who it is, and what the key service lets it do.
- `tables`, `head`, `instances`: an opened instance.
- `link`, `outbox`, `replies`: the stream to the gateway, and what is believed of its answers.
- `sampling`, `decode`, `session`, `service`: tokens, turns, and the clients' side.
"""
