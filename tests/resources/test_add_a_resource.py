"""docs/add-a-resource.md is true: what it says is built, and keeps the promise."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from testkit.api import problem
from testkit.stack import ROOT, Stack, folder, run_in, running, wait_until
from tests.consistency.load import Load
from tests.consistency.soak import Soak

PAGE = (ROOT / "docs/add-a-resource.md").read_text()
IN_A_COPY = ("run", "edge", "migrations", "deploy", "velikiy", "pyproject.toml", "requirements.txt")


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """A copy of the code with the two files of the page, and with nothing else."""
    files = re.findall(r"`((?:velikiy/resources|migrations/versions)/\w+\.py)`.*?```python\n(.*?)```", PAGE, re.DOTALL)
    assert [name for name, _ in files] == ["migrations/versions/0002_products.py", "velikiy/resources/products.py"]
    with folder() as place:
        for name in IN_A_COPY:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
            copy(ROOT / name, place / name)
        for name, text in files:
            assert not (place / name).exists()
            (place / name).write_text(text)
        with running("--edges", "2", root=place) as stack:
            yield stack


@pytest.fixture
def samovar(stack: Stack) -> Iterator[dict[str, Any]]:
    created = requests.post(f"{stack.edge}/products", json={"name": "Samovar", "price": 12900}, timeout=5)
    assert created.status_code == 201, created.text
    yield requests.get(stack.edge + created.headers["Location"], timeout=5).json()
    requests.delete(stack.edge + created.headers["Location"], timeout=5)


def test_a_product_has_the_fields_of_the_page(samovar: dict[str, Any]) -> None:
    assert list(samovar) == ["id", "name", "price", "stock", "created_at", "updated_at", "version"]
    assert (samovar["name"], samovar["price"], samovar["stock"], samovar["version"]) == ("Samovar", 12900, 0, 1)


def test_the_commands_of_the_page_do_what_it_says(stack: Stack) -> None:
    [commands] = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    asked = [line.replace("http://127.0.0.1", stack.edge) for line in commands.splitlines() if line.startswith("curl")]
    create, show, search = asked

    def said(command: str) -> str:
        return subprocess.check_output(command, shell=True, text=True, stderr=subprocess.DEVNULL)

    assert '"message":"Created"' in said(create)
    [(number,)] = stack.sql("SELECT id FROM products WHERE name = 'Samovar'")
    try:
        assert '"stock":0' in said(show.replace("/products/1", f"/products/{number}"))
        assert '"price":12900' in said(search)
    finally:
        requests.delete(f"{stack.edge}/products/{number}", timeout=5)


def test_it_is_cached_and_each_write_is_seen_through_every_edge(stack: Stack, samovar: dict[str, Any]) -> None:
    url = f"/products/{samovar['id']}"
    for address in (url, "/products", "/products?q=samo&sort=-price", "/products/count"):
        wait_until(lambda address=address: hit(stack.edges[1] + address))  # type: ignore[misc]
    answer = requests.patch(stack.edge + url, json={"stock": 3}, timeout=5)
    for edge in stack.edges:
        shown = requests.get(edge + url, timeout=5)
        assert (shown.json()["stock"], shown.headers["ETag"]) == (3, answer.headers["ETag"])
        assert [row["stock"] for row in requests.get(f"{edge}/products?q=samo&sort=-price", timeout=5).json()] == [3]
    requests.delete(stack.edge + url, timeout=5)
    for edge in stack.edges:
        assert requests.get(edge + url, timeout=5).status_code == 404
        assert requests.get(f"{edge}/products/count", timeout=5).json() == {"count": 0}


def hit(url: str) -> bool:
    return requests.get(url, timeout=5).headers["X-Cache-Status"] == "HIT"


def test_sql_from_outside_is_heard_of(stack: Stack, samovar: dict[str, Any]) -> None:
    url = f"{stack.edge}/products/{samovar['id']}"
    wait_until(lambda: hit(url))
    stack.sql("UPDATE products SET price = 1 WHERE id = %s", samovar["id"])
    shown = wait_until(lambda: (it := requests.get(url, timeout=5).json())["price"] == 1 and it)
    assert shown["version"] == 2


def test_rows_that_postgresql_deletes_by_itself_are_heard_of(stack: Stack, samovar: dict[str, Any]) -> None:
    """By a foreign key, in the transaction of an app that knows nothing of it."""
    stack.sql("ALTER TABLE products ADD COLUMN owner bigint REFERENCES users (id) ON DELETE CASCADE")
    created = requests.post(f"{stack.edge}/users", json={"name": "Owner", "email": "owner@example.com"}, timeout=5)
    stack.sql("UPDATE products SET owner = %s", created.json()["id"])
    url = f"/products/{samovar['id']}"
    for edge in stack.edges:
        wait_until(lambda edge=edge: hit(edge + url) and hit(f"{edge}/products/count"))  # type: ignore[misc]
    requests.delete(stack.edge + created.headers["Location"], timeout=5)
    for edge in stack.edges:
        wait_until(lambda edge=edge: requests.get(edge + url, timeout=5).status_code == 404, within=2)  # type: ignore[misc]
        assert requests.get(f"{edge}/products/count", timeout=5).json() == {"count": 0}


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({"name": "Samovar", "price": 1}, 409, "name"),
        ({"name": "Other", "price": -1}, 422, "price"),
        ({"name": "Other", "price": 1.5}, 422, "price"),
        ({"name": "Other", "price": 10**30}, 422, "price"),
        ({"name": "Other", "price": True}, 422, "price"),
        ({"name": "a\0b", "price": 1}, 422, "name"),
        ({"price": 1}, 422, "name"),
        ({"name": "Other", "price": 1, "email": "x"}, 422, "email"),
    ],
)
def test_its_rules_are_kept(stack: Stack, samovar: dict[str, Any], body: Any, status: int, field: str) -> None:
    problem(requests.post(f"{stack.edge}/products", json=body, timeout=5), status, field)


def test_users_are_as_they_were(stack: Stack) -> None:
    assert [user["name"] for user in requests.get(f"{stack.edge}/users", timeout=5).json()] == [
        "Alice",
        "Bob",
        "Charlie",
    ]


def test_it_describes_itself(stack: Stack) -> None:
    document = requests.get(f"{stack.edge}/openapi.json", timeout=5).json()
    assert {"/products", "/products/{id}", "/products/count", "/products/batch"} <= set(document["paths"])


def test_its_commands_are_there(stack: Stack) -> None:
    done = run_in(stack.root, "velikiy", "products", "seed", "--count", "3", DATA=str(stack.data))
    assert done.returncode == 0, done.stderr
    assert requests.get(f"{stack.edge}/products/count", timeout=5).json() == {"count": 3}
    stack.sql("DELETE FROM products")
    wait_until(lambda: requests.get(f"{stack.edge}/products/count", timeout=5).json() == {"count": 0})


@pytest.mark.exclusive
def test_every_read_of_it_is_explained_by_the_writes(stack: Stack) -> None:
    load = Load(tuple(stack.edges), seed=1, path="/products", fields=lambda name: {"price": len(name), "stock": 1})
    soak = Soak(load)
    for _ in soak.run(10):
        pass
    assert soak.verdict.wrong == 0, soak.verdict
    assert soak.verdict.reads > 1000
    assert soak.verdict.writes["ok"] > 10
