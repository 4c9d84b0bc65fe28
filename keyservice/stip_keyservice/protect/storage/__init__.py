"""Checkpoints read and instances written: formats, streams, threads, and what a kill leaves."""
