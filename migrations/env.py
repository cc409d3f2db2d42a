"""Alembic's entry; velikiy/postgres/migrate.py hands over the connection, its transaction and its lock."""

from alembic import context

from velikiy.postgres.migrate import VERSION_TABLE

context.configure(
    connection=context.config.attributes["connection"], transactional_ddl=True, version_table=VERSION_TABLE
)
context.run_migrations()
