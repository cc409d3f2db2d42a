"""Backups: the whole database as an archive of pg_dump, and its rows put back as one write that passes the gate.

archive     a file of pg_dump: checks, tables, rows
tables      the tables of the service, and rows of an archive in temporary tables beside them
create      a backup of one snapshot, verified before it gets its name
retention   files in a folder, of which the newest are kept
restore     replaces the rows, in one transaction
scratch     a database of its own, in which rows of an older schema are migrated

docs/backup.md describes the commands, docs/decisions/0162-restore-as-a-write.md the reasons.
"""


class CannotBackUp(Exception):
    """No backup was made. The text is a sentence for the operator."""


class CannotRestore(Exception):
    """Nothing was changed. The text is a sentence for the operator."""
