"""Build the resource that docs/add-a-resource.md describes into a copy of the code, and check that it keeps the promise."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from testkit.api import check_problem, is_hit
from testkit.stack import ROOT, Stack, folder, run_in, running, wait_until
from tests.consistency.load import Load
from tests.consistency.soak import Soak

PAGE = (ROOT / "docs/add-a-resource.md").read_text()
COPIED_FILES = ("run", "edge", "migrations", "deploy", "velikiy", "pyproject.toml", "requirements.txt")


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """A stack of a copy of the code, to which only the two files of the page are added."""
    files = re.findall(r"`((?:velikiy/resources|migrations/versions)/\w+\.py)`.*?```python\n(.*?)```", PAGE, re.DOTALL)
    assert [name for name, _ in files] == ["migrations/versions/0012_products.py", "velikiy/resources/products.py"]
    with folder() as root:
        for name in COPIED_FILES:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
            copy(ROOT / name, root / name)
        for name, text in files:
            assert not (root / name).exists()
            (root / name).write_text(text)
        with running("--edges", "2", root=root) as stack:
            yield stack


@pytest.fixture
def samovar(stack: Stack) -> Iterator[dict[str, Any]]:
    created = requests.post(f"{stack.edge}/products", json={"name": "Samovar", "price": 12900}, timeout=5)
    assert created.status_code == 201, created.text
    yield requests.get(stack.edge + created.headers["Location"], timeout=5).json()
    requests.delete(stack.edge + created.headers["Location"], timeout=5)


def test_row_of_an_added_resource_has_the_fields_of_the_guide(samovar: dict[str, Any]) -> None:
    assert list(samovar) == ["id", "name", "price", "stock", "created_at", "updated_at", "version"]
    assert (samovar["name"], samovar["price"], samovar["stock"], samovar["version"]) == ("Samovar", 12900, 0, 1)


def test_update_does_not_take_false_for_a_stored_zero(stack: Stack, samovar: dict[str, Any]) -> None:
    assert samovar["stock"] == 0
    url = f"{stack.edge}/products/{samovar['id']}"
    check_problem(requests.patch(url, json={"stock": False}, timeout=5), 422, "stock")


def test_commands_of_the_guide_print_the_documented_output(stack: Stack) -> None:
    [block] = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    create, show, search = (
        line.replace("http://127.0.0.1", stack.edge) for line in block.splitlines() if line.startswith("curl")
    )

    def output(command: str) -> str:
        return subprocess.check_output(command, shell=True, text=True, stderr=subprocess.DEVNULL)

    assert '"message":"Created"' in output(create)
    [(product_id,)] = stack.sql("SELECT id FROM products WHERE name = 'Samovar'")
    try:
        assert '"stock":0' in output(show.replace("/products/1", f"/products/{product_id}"))
        assert '"price":12900' in output(search)
    finally:
        requests.delete(f"{stack.edge}/products/{product_id}", timeout=5)


def test_added_resource_is_cached_and_each_write_is_seen_through_every_edge(
    stack: Stack, samovar: dict[str, Any]
) -> None:
    path = f"/products/{samovar['id']}"
    for target in (path, "/products", "/products?q=samo&sort=-price", "/products/count"):
        wait_until(lambda target=target: is_hit(stack.edges[1] + target))  # type: ignore[misc]
    written = requests.patch(stack.edge + path, json={"stock": 3}, timeout=5)
    for edge in stack.edges:
        read = requests.get(edge + path, timeout=5)
        assert (read.json()["stock"], read.headers["ETag"]) == (3, written.headers["ETag"])
        assert [row["stock"] for row in requests.get(f"{edge}/products?q=samo&sort=-price", timeout=5).json()] == [3]
    requests.delete(stack.edge + path, timeout=5)
    for edge in stack.edges:
        assert requests.get(edge + path, timeout=5).status_code == 404
        assert requests.get(f"{edge}/products/count", timeout=5).json() == {"count": 0}


def test_sql_from_outside_is_seen_for_an_added_resource(stack: Stack, samovar: dict[str, Any]) -> None:
    url = f"{stack.edge}/products/{samovar['id']}"
    wait_until(lambda: is_hit(url))
    stack.sql("UPDATE products SET price = 1 WHERE id = %s", samovar["id"])
    product = wait_until(lambda: (row := requests.get(url, timeout=5).json())["price"] == 1 and row)
    assert product["version"] == 2


def test_rows_that_postgresql_deletes_by_a_foreign_key_are_invalidated(stack: Stack, samovar: dict[str, Any]) -> None:
    """The app whose transaction deletes the rows does not know of them."""
    stack.sql("ALTER TABLE products ADD COLUMN owner bigint REFERENCES users (id) ON DELETE CASCADE")
    created = requests.post(f"{stack.edge}/users", json={"name": "Owner", "email": "owner@example.com"}, timeout=5)
    stack.sql("UPDATE products SET owner = %s", created.json()["id"])
    url = f"/products/{samovar['id']}"
    for edge in stack.edges:
        wait_until(lambda edge=edge: is_hit(edge + url) and is_hit(f"{edge}/products/count"))  # type: ignore[misc]
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
def test_invalid_row_of_an_added_resource_is_refused_and_the_field_is_named(
    stack: Stack, samovar: dict[str, Any], body: Any, status: int, field: str
) -> None:
    check_problem(requests.post(f"{stack.edge}/products", json=body, timeout=5), status, field)


def test_added_resource_leaves_the_users_unchanged(stack: Stack) -> None:
    assert [user["name"] for user in requests.get(f"{stack.edge}/users", timeout=5).json()] == [
        "Alice",
        "Bob",
        "Charlie",
    ]


def test_openapi_document_contains_an_added_resource(stack: Stack) -> None:
    document = requests.get(f"{stack.edge}/openapi.json", timeout=5).json()
    assert {"/products", "/products/{id}", "/products/count", "/products/batch"} <= set(document["paths"])


def test_added_resource_has_commands(stack: Stack) -> None:
    finished = run_in(stack.root, "velikiy", "products", "seed", "--count", "3", DATA=str(stack.data))
    assert finished.returncode == 0, finished.stderr
    assert requests.get(f"{stack.edge}/products/count", timeout=5).json() == {"count": 3}
    stack.sql("DELETE FROM products")
    wait_until(lambda: requests.get(f"{stack.edge}/products/count", timeout=5).json() == {"count": 0})


@pytest.mark.exclusive
def test_soak_of_an_added_resource_finds_no_wrong_read(stack: Stack) -> None:
    load = Load(tuple(stack.edges), seed=1, path="/products", fields=lambda name: {"price": len(name), "stock": 1})
    soak = Soak(load)
    for _ in soak.run(10):
        pass
    assert soak.verdict.wrong == 0, soak.verdict
    assert soak.verdict.reads > 1000
    assert soak.verdict.writes["ok"] > 10
