"""Throughput of complete releases: from the challenge to the sealed bundle, decided, logged and on the disk."""
