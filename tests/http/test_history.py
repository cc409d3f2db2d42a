"""Every change of a row is in its history, SQL from outside included, and no edge serves an older history than the row."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from subprocess import CompletedProcess
from typing import Any

import psycopg
import pytest
import requests
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from testkit.api import check_problem, is_hit
from testkit.databases import superuser_dsn
from testkit.outages import refusing
from testkit.stack import Stack, run, wait_until

Item = dict[str, Any]


def as_superuser(stack: Stack) -> str:
    """Return the address of the stack's database with a role that may do anything."""
    return make_conninfo(superuser_dsn(stack), dbname=str(conninfo_to_dict(stack.postgres)["dbname"]))


def create(base_url: str, email: str, **headers: str) -> int:
    body = {"name": "First", "email": email}
    response = requests.post(f"{base_url}/users", json=body, headers=headers, timeout=5)
    assert response.status_code == 201, response.text
    return int(response.json()["id"])


def rename(base_url: str, user: int, name: str) -> None:
    assert requests.patch(f"{base_url}/users/{user}", json={"name": name}, timeout=5).status_code == 200


def get_history(base_url: str, user: int, query: str = "") -> list[Item]:
    response = requests.get(f"{base_url}/users/{user}/history{query}", timeout=5)
    assert response.status_code == 200, response.text
    items: list[Item] = response.json()
    return items


def changes(items: list[Item]) -> list[tuple[int, str | None, str | None]]:
    """Return the version, the change and the name of each item, oldest first."""
    return [(it["version"], it["change"], it["row"] and it["row"]["name"]) for it in reversed(items)]


def versions(stack: Stack, user: int) -> list[tuple[int, str | None, str | None]]:
    """Return the history as every edge and the app show it, once all of them show the same."""
    sources = [*stack.edges, stack.app]

    def agreed() -> list[list[Item]]:
        seen = [get_history(source, user) for source in sources]
        return seen if all(it == seen[0] for it in seen) else []

    return changes(wait_until(agreed)[0])


class TestChanges:
    def test_history_has_each_version_of_a_row_as_a_read_returned_it(self, base_url: str, email: str) -> None:
        user = create(base_url, email)
        read = [requests.get(f"{base_url}/users/{user}", timeout=5).json()]
        for name in ("Second", "Third"):
            rename(base_url, user, name)
            read.append(requests.get(f"{base_url}/users/{user}", timeout=5).json())
        items = get_history(base_url, user)
        assert [it["row"] for it in reversed(items)] == read
        assert changes(items) == [(1, "create", "First"), (2, "update", "Second"), (3, "update", "Third")]
        assert [it["changed_at"] for it in items[:2]] == [it["row"]["updated_at"] for it in items[:2]]
        assert {(it["through"], it["changed_by"]) for it in items} == {("api", None)}

    def test_history_of_a_deleted_row_stays(self, stack: Stack, base_url: str, email: str) -> None:
        user = create(base_url, email)
        assert len(get_history(base_url, user)) == 1
        requests.delete(f"{base_url}/users/{user}", timeout=5)
        assert versions(stack, user) == [(1, "create", "First"), (2, "delete", None)]

    def test_history_has_the_changes_of_a_batch(self, stack: Stack, email: str) -> None:
        create_one = {"op": "create", "name": "Batch", "email": email}
        response = requests.post(f"{stack.edge}/users/batch", json={"operations": [create_one]}, timeout=5)
        user = response.json()["results"][0]["id"]
        operations = [{"op": "update", "id": user, "name": "Again"}, {"op": "delete", "id": user}]
        requests.post(f"{stack.edge}/users/batch", json={"operations": operations}, timeout=5)
        assert versions(stack, user) == [(1, "create", "Batch"), (2, "update", "Again"), (3, "delete", None)]

    def test_history_has_the_changes_of_sql_and_the_role(self, stack: Stack, email: str) -> None:
        user = create(stack.edge, email)
        get_history(stack.edge, user)
        stack.sql("UPDATE users SET name = 'By SQL' WHERE id = %s", user)
        stack.sql("DELETE FROM users WHERE id = %s", user)
        wait_until(lambda: len(get_history(stack.edge, user)) == 3)
        assert versions(stack, user) == [(1, "create", "First"), (2, "update", "By SQL"), (3, "delete", None)]
        [(role,)] = stack.sql("SELECT session_user::text")
        assert [(it["through"], it["changed_by"]) for it in get_history(stack.edge, user)[:2]] == [("sql", role)] * 2

    def test_history_has_the_rows_of_a_copy(self, stack: Stack, email: str) -> None:
        with psycopg.connect(stack.postgres) as connection:
            with connection.cursor().copy("COPY users (name, email) FROM STDIN") as copy:
                copy.write_row(("Copied", email))
            [(user,)] = connection.execute("SELECT id FROM users WHERE email = %s", (email,)).fetchall()
        assert versions(stack, user) == [(1, "create", "Copied")]

    def test_history_has_the_rows_of_a_truncated_table(self, stack: Stack, email: str) -> None:
        user = create(stack.edge, email)
        with psycopg.connect(stack.postgres) as connection:
            connection.execute("TRUNCATE users")
            statement = "SELECT change, before->>'name' FROM row_history WHERE row_id = %s ORDER BY version"
            rows = connection.execute(statement, (user,)).fetchall()
            connection.rollback()
        assert rows == [("create", None), ("delete", "First")]

    def test_history_has_the_changes_of_a_session_whose_triggers_are_those_of_a_replica(
        self, stack: Stack, email: str
    ) -> None:
        user = create(stack.edge, email)
        with psycopg.connect(as_superuser(stack)) as connection:
            connection.execute("SET session_replication_role = replica")
            connection.execute("UPDATE users SET name = 'Replicated' WHERE id = %s", (user,))
            connection.execute("DELETE FROM users WHERE id = %s", (user,))
        wait_until(lambda: len(get_history(stack.edge, user)) == 3)
        assert versions(stack, user) == [(1, "create", "First"), (2, "update", "Replicated"), (3, "delete", None)]

    def test_row_whose_id_is_changed_ends_under_one_id_and_begins_under_the_other(
        self, stack: Stack, email: str
    ) -> None:
        old, new = create(stack.edge, email), create(stack.edge, f"{email}.org")
        requests.delete(f"{stack.edge}/users/{new}", timeout=5)
        stack.sql("UPDATE users SET id = %s WHERE id = %s", new, old)
        wait_until(lambda: len(get_history(stack.edge, new)) == 3)
        assert versions(stack, old) == [(1, "create", "First"), (2, "delete", None)]
        assert versions(stack, new) == [(1, "create", "First"), (2, "delete", None), (3, "create", "First")]

    def test_versions_of_an_id_go_on_when_sql_uses_the_id_again(self, stack: Stack, email: str) -> None:
        user = create(stack.edge, email)
        rename(stack.edge, user, "Second")
        requests.delete(f"{stack.edge}/users/{user}", timeout=5)
        stack.sql("INSERT INTO users (id, name, email) VALUES (%s, 'Other', %s)", user, email)
        wait_until(lambda: requests.get(f"{stack.edge}/users/{user}", timeout=5).status_code == 200)
        assert requests.get(f"{stack.edge}/users/{user}", timeout=5).json()["version"] == 4
        assert versions(stack, user)[-2:] == [(3, "delete", None), (4, "create", "Other")]

    @pytest.mark.parametrize("entries", ["kept", "removed"])
    def test_insert_by_sql_waits_for_the_deletion_of_its_id_and_continues_the_versions(
        self, stack: Stack, email: str, entries: str
    ) -> None:
        user = create(stack.edge, email)
        rename(stack.edge, user, "Second")
        if entries == "removed":
            stack.sql("DELETE FROM row_history WHERE row_id = %s", user)
        waiting = "SELECT pid FROM pg_stat_activity WHERE %s = ANY (pg_blocking_pids(pid)) AND query LIKE 'INSERT%%'"
        insert = "INSERT INTO users (id, name, email) VALUES (%s, 'Other', %s) RETURNING version"
        with psycopg.connect(stack.postgres) as deleting, ThreadPoolExecutor(1) as pool:
            deleting.execute("DELETE FROM users WHERE id = %s", (user,))
            inserted = pool.submit(stack.sql, insert, user, email)
            wait_until(lambda: stack.sql(waiting, deleting.info.backend_pid), what="the INSERT waits")
            deleting.commit()
            assert inserted.result(timeout=5) == [(4,)]
        wait_until(lambda: get_history(stack.edge, user)[0]["version"] == 4)
        assert versions(stack, user)[-2:] == [(3, "delete", None), (4, "create", "Other")]

    def test_entry_of_a_publisher_replaces_the_one_that_the_replicated_row_has_made(
        self, stack: Stack, email: str
    ) -> None:
        """The worker of a logical replication applies the row, and then the entry that the publisher has made."""
        [(user,)] = stack.sql("SELECT nextval('users_id_seq')")
        with psycopg.connect(as_superuser(stack)) as connection:
            connection.execute("SET session_replication_role = replica")
            connection.execute("INSERT INTO users (id, name, email) VALUES (%s, 'Published', %s)", (user, email))
            connection.execute(
                "INSERT INTO row_history (resource, row_id, version, change, changed_by, through)"
                " VALUES ('users', %s, 1, 'create', 'their key', 'api')",
                (user,),
            )
        assert versions(stack, user) == [(1, "create", "Published")]
        [item] = get_history(stack.edge, user)
        assert (item["changed_by"], item["through"]) == ("their key", "api")

    @pytest.mark.parametrize(
        "change",
        ["DELETE FROM row_history WHERE row_id = %s", "UPDATE row_history SET changed_by = 'x' WHERE row_id = %s"],
    )
    def test_change_of_the_history_in_a_session_of_a_replica_is_seen_at_once(
        self, stack: Stack, email: str, change: str
    ) -> None:
        user = create(stack.edge, email)
        [before] = get_history(stack.edge, user)
        wait_until(lambda: is_hit(f"{stack.edge}/users/{user}/history"))
        with psycopg.connect(as_superuser(stack)) as connection:
            connection.execute("SET session_replication_role = replica")
            connection.execute(change, (user,))
        wait_until(lambda: get_history(stack.edge, user) != [before], within=1)

    def test_triggers_find_former_versions_by_an_index(self, stack: Stack) -> None:
        with psycopg.connect(stack.postgres) as connection:
            connection.execute("SET LOCAL enable_seqscan = off; SET LOCAL plan_cache_mode = force_generic_plan")
            connection.execute(
                "PREPARE latest (name, bigint) AS"
                " SELECT max(version) FROM row_history WHERE resource = $1::text AND row_id = $2"
            )
            plan = connection.execute("EXPLAIN EXECUTE latest ('users', 1)").fetchall()
        [condition] = [line for (line,) in plan if "Index Cond" in line]
        assert "resource = " in condition

    def test_first_version_of_a_row_without_entries_is_the_row_itself(self, stack: Stack, email: str) -> None:
        user = create(stack.edge, email)
        stack.sql("DELETE FROM row_history WHERE row_id = %s", user)
        wait_until(lambda: get_history(stack.edge, user)[0]["change"] is None)
        rename(stack.edge, user, "Second")
        assert versions(stack, user) == [(1, None, "First"), (2, "update", "Second")]

    def test_role_that_may_only_write_users_leaves_entries(self, stack: Stack, email: str) -> None:
        with psycopg.connect(as_superuser(stack)) as connection:
            connection.execute("CREATE ROLE clerk")
            connection.execute("GRANT INSERT ON users TO clerk")
            connection.execute("SET ROLE clerk")
            connection.execute("INSERT INTO users (name, email) VALUES ('Clerk', %s)", (email,))
            connection.execute("RESET ROLE")
            statement = "SELECT change FROM row_history JOIN users ON users.id = row_id WHERE email = %s"
            assert connection.execute(statement, (email,)).fetchall() == [("create",)]
            connection.rollback()


class TestReads:
    def test_history_of_a_row_that_never_existed_is_404_until_the_row_exists(self, stack: Stack, email: str) -> None:
        [(user,)] = stack.sql("SELECT last_value + 1000 FROM users_id_seq")
        for _ in range(2):
            check_problem(requests.get(f"{stack.edge}/users/{user}/history", timeout=5), 404)
        stack.sql("INSERT INTO users (id, name, email) VALUES (%s, 'New', %s)", user, email)
        wait_until(lambda: requests.get(f"{stack.edge}/users/{user}/history", timeout=5).status_code == 200)

    def test_pages_contain_each_version_once(self, stack: Stack, base_url: str, email: str) -> None:
        user = create(base_url, email)
        for number in range(6):
            rename(base_url, user, f"Name {number}")
        stack.sql("UPDATE users SET name = 'Last' WHERE id = %s", user)
        wait_until(lambda: len(get_history(base_url, user)) == 8)
        complete, pages, url = get_history(base_url, user), [], f"{base_url}/users/{user}/history?limit=3"
        while url:
            response = requests.get(url, timeout=5)
            pages.append(response.json())
            assert ("first" in response.links) == (len(pages) > 1 or "next" in response.links)
            url = base_url + response.links["next"]["url"] if "next" in response.links else ""
        assert [len(page) for page in pages] == [3, 3, 2]
        assert [it for page in pages for it in page] == complete

    def test_history_is_cached_by_the_edge_and_conditional(self, stack: Stack, email: str) -> None:
        user = create(stack.edge, email)
        for address in (f"/users/{user}/history", f"/users/{user}/history?limit=5"):
            wait_until(partial(is_hit, stack.edge + address))
            response = requests.get(stack.edge + address, timeout=5)
            head = requests.head(stack.edge + address, timeout=5)
            assert (head.status_code, head.headers["ETag"], head.text) == (200, response.headers["ETag"], "")
            same = requests.get(stack.edge + address, headers={"If-None-Match": response.headers["ETag"]}, timeout=5)
            assert same.status_code == 304
        shown = run("velikiy", "cache", "show", f"/users/{user}/history", "--data", str(stack.data)).stdout
        assert "bytes of /history" in shown and "of /history?limit=5" in shown, shown

    @pytest.mark.parametrize("query", ["limit=0", "limit=1001", "cursor=", "cursor=AAAA", "sort=id", "q=Ann", "x=1"])
    def test_bad_parameter_is_400(self, base_url: str, query: str) -> None:
        check_problem(requests.get(f"{base_url}/users/1/history?{query}", timeout=5), 400)

    def test_cursor_of_another_row_is_400(self, base_url: str, email: str) -> None:
        user = create(base_url, email)
        rename(base_url, user, "Second")
        link = requests.get(f"{base_url}/users/{user}/history?limit=1", timeout=5).links["next"]["url"]
        check_problem(requests.get(base_url + link.replace(f"/{user}/", "/1/"), timeout=5), 400)

    @pytest.mark.parametrize(
        "address", ["/users/history", "/users/07/history", "/users/1/history/", "/users/1/History"]
    )
    def test_other_addresses_are_404(self, base_url: str, address: str) -> None:
        check_problem(requests.get(base_url + address, timeout=5), 404)

    def test_history_supports_no_writes(self, base_url: str) -> None:
        response = requests.post(f"{base_url}/users/1/history", json={}, timeout=5)
        assert set(response.headers["Allow"].split(", ")) == {"GET", "HEAD", "OPTIONS"}
        check_problem(response, 405)


class TestUndo:
    def put_again(self, base_url: str, user: int, body: Item, **headers: str) -> requests.Response:
        sent = {"If-None-Match": "*", **headers}
        return requests.put(f"{base_url}/users/{user}", json=body, headers=sent, timeout=5)

    def test_deleted_row_returns_with_its_id_its_time_and_the_next_version(
        self, stack: Stack, base_url: str, email: str
    ) -> None:
        user = create(base_url, email)
        row = requests.get(f"{base_url}/users/{user}", timeout=5).json()
        requests.delete(f"{base_url}/users/{user}", timeout=5)
        check_problem(requests.get(f"{stack.edge}/users/{user}", timeout=5), 404)
        response = self.put_again(base_url, user, row)
        assert response.status_code == 201, response.text
        assert response.json() == {"id": user, "message": "Created"}
        assert response.headers["Location"] == f"/users/{user}"
        for source in (*stack.edges, stack.app):
            read = requests.get(f"{source}/users/{user}", timeout=5)
            assert read.headers["ETag"] == response.headers["ETag"]
            assert read.json() == {**row, "version": 3, "updated_at": read.json()["updated_at"]}
        assert versions(stack, user) == [(1, "create", "First"), (2, "delete", None), (3, "create", "First")]

    def test_row_that_exists_is_412_and_keeps_its_values(self, base_url: str, email: str) -> None:
        user = create(base_url, email)
        for body in ({"name": "Other", "email": email}, {"name": "Other"}):
            check_problem(self.put_again(base_url, user, body), 412)
        assert requests.get(f"{base_url}/users/{user}", timeout=5).json()["name"] == "First"

    def test_id_that_no_row_had_is_404(self, base_url: str) -> None:
        check_problem(self.put_again(base_url, 999_999_999, {"name": "A", "email": "a@example.com"}), 404)

    def test_missing_field_is_422(self, base_url: str, email: str) -> None:
        user = create(base_url, email)
        requests.delete(f"{base_url}/users/{user}", timeout=5)
        assert "email" in check_problem(self.put_again(base_url, user, {"name": "Other"}), 422)

    def test_value_that_another_row_has_meanwhile_is_409(self, base_url: str, email: str) -> None:
        user = create(base_url, email)
        requests.delete(f"{base_url}/users/{user}", timeout=5)
        create(base_url, email)
        check_problem(self.put_again(base_url, user, {"name": "First", "email": email}), 409)

    def test_old_version_is_restored_by_a_conditional_write(self, stack: Stack, email: str) -> None:
        user = create(stack.edge, email)
        rename(stack.edge, user, "Second")
        old = get_history(stack.edge, user)[-1]["row"]
        etag = requests.get(f"{stack.edge}/users/{user}", timeout=5).headers["ETag"]
        for status in (200, 412):
            response = requests.put(f"{stack.edge}/users/{user}", json=old, headers={"If-Match": etag}, timeout=5)
            assert response.status_code == status
        assert versions(stack, user)[-1] == (3, "update", "First")


class TestExpiry:
    def test_relay_removes_versions_that_were_replaced_long_ago(self, stack: Stack, email: str) -> None:
        user = create(stack.edge, email)
        for name in ("Second", "Third"):
            rename(stack.edge, user, name)
        versions(stack, user)
        past = "UPDATE row_history SET changed_at = now() - interval '366 days' WHERE row_id = %s AND version <= 2"
        stack.sql(past, user)
        with refusing(stack, "relay"):
            pass  # it removes what has expired at its start, and then once a minute
        for edge in stack.edges:
            wait_until(lambda edge=edge: len(get_history(edge, user)) == 2)  # type: ignore[misc]
            assert changes(get_history(edge, user)) == [(2, None, "Second"), (3, "update", "Third")]


class TestErasure:
    def erase(self, stack: Stack, *arguments: object) -> CompletedProcess[str]:
        return run("velikiy", "users", "erase", *map(str, arguments), DATA=str(stack.data))

    def test_nothing_is_left_of_an_erased_row(self, stack: Stack, email: str) -> None:
        headers = {"Prefer": "return=representation", "Idempotency-Key": email}
        user = create(stack.edge, email, **headers)
        rename(stack.edge, user, "Second")
        versions(stack, user)
        assert email in requests.get(f"{stack.edge}/users/{user}/history", timeout=5).text
        refused = self.erase(stack, user)
        assert refused.returncode == 1
        assert "add --delete" in refused.stderr
        erased = self.erase(stack, "--delete", user)
        assert (erased.returncode, erased.stderr) == (0, f"erased user {user}: 3 changes\n")
        for source in (*stack.edges, stack.app):
            check_problem(requests.get(f"{source}/users/{user}", timeout=5), 404)
            [item] = get_history(source, user)
            assert (item["version"], item["change"], item["row"]) == (4, "erase", None)
            assert (item["through"], item["changed_by"]) == ("command", "velikiy users erase")
        for table in ("users", "row_history", "idempotency_keys"):
            statement = f"SELECT FROM {table} t WHERE to_jsonb(t)::text LIKE %s"
            assert stack.sql(statement, f"%{email}%" if table != "idempotency_keys" else f'%"email":%{email}%') == []
        replayed = requests.post(
            f"{stack.edge}/users", json={"name": "First", "email": email}, headers=headers, timeout=5
        )
        assert replayed.json() == {"id": user, "message": "Created"}
        assert self.erase(stack, user).stderr == f"nothing to erase of user {user}\n"
