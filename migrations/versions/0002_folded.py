"""Unicode's rules of case decide which e-mails are equal and which rows a search finds. A search ignores accents, and
finds parts of texts in scripts without spaces."""

from alembic import op
from sqlalchemy import text

from velikiy.postgres.migrate import CannotMigrate, statements

revision = "0002_folded"
down_revision = "0001_baseline"


def upgrade() -> None:
    op.execute(statements("folded"))
    refuse_equal_emails()
    op.execute(statements("users_folded_emails"))
    op.execute(statements("recompute_words"))


def refuse_equal_emails() -> None:
    """Name the ids of the rows, and not their personal data."""
    groups = op.get_bind().execute(text(statements("users_equal_emails"))).scalars().all()
    if groups:
        raise CannotMigrate(
            "the table users has rows whose e-mails are equal by Unicode's rules of case and form, such as ß and SS or"
            f" full-width letters: ids {'; '.join(groups)}. Change or delete all but one row of each group, with the"
            " version that you ran before or with psql, and start again; nothing was changed."
        )
