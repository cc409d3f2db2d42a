"""A process connects to PostgreSQL again, however long PostgreSQL was away."""

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from testkit.stack import Stack, folder, wait_until
from velikiy.postgres import Database, DatabaseUnavailable


def test_more_requests_than_may_wait_have_failed_in_an_outage(stack: Stack) -> None:
    def answers() -> bool:
        try:
            with database.autocommit() as connection:
                connection.execute("SELECT 1")
        except DatabaseUnavailable:
            return False
        return True

    with folder() as path:
        sockets = path / "sockets"  # the address of the server, which is not there yet
        database = Database(make_conninfo(stack.postgres, host=str(sockets)), size=1, timeout=0.3)
        database.open()
        try:
            assert not any(answers() for _ in range(12))  # 10 may wait
            sockets.symlink_to(str(conninfo_to_dict(stack.postgres)["host"]))
            wait_until(answers, within=40)
        finally:
            database.close()
