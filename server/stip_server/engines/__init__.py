"""Engines behind `stip_server.engine.Engine`."""
