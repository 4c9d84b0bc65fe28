"""Servers and tokens that tests start themselves, and skip loudly where they are not installed (`make services`)."""
