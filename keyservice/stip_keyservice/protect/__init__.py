"""Protecting a model, offline: architectures as tables, keys, folding, streaming, the certificate."""
