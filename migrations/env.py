"""Alembic's entry; velikiy/migrate.py hands over the connection, its transaction and its lock."""

from alembic import context

context.configure(connection=context.config.attributes["connection"], transactional_ddl=True)
context.run_migrations()
