"""Runs steps on the connection it is given, in that connection's transaction."""

from __future__ import annotations

from alembic import context

from stip_keyservice.service.state.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
