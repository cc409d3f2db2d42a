"""The API's document is complete, and true: of each example, and of some thousand requests that are made from it."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import jsonschema_rs
import pytest
import requests
from openapi_spec_validator import OpenAPIV31SpecValidator
from pydantic import Field

from testkit.stack import ROOT, Stack, running, wait_until
from velikiy import create_app
from velikiy.openapi.document import document
from velikiy.postgres import Database
from velikiy.resources.base import Body, Resource, registry
from velikiy.resources.problems import KINDS, SQLSTATES
from velikiy.settings import Settings

DOCUMENT = document(registry())

NOT_FOR_PROGRAMS = ("/.lease/", "/docs", "/problems/")

Operation = tuple[str, str, dict[str, Any]]


def operations() -> Iterator[Operation]:
    for path, methods in DOCUMENT["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def resolved(node: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in node:
        return node
    found: Any = DOCUMENT
    for part in node["$ref"].removeprefix("#/").split("/"):
        found = found[part]
    return dict(found)


def media_types() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Each place that has examples of a body: a name for it, the type, and what is said of it."""
    for _, _, operation in operations():
        name = operation["operationId"]
        for kind, content in operation.get("requestBody", {"content": {}})["content"].items():
            yield f"{name} sends", kind, content
        for status, answer in operation["responses"].items():
            for kind, content in resolved(answer).get("content", {}).items():
                yield f"{name} answers {status}", kind, content


def examples(content: dict[str, Any]) -> list[Any]:
    one = [content["example"]] if "example" in content else []
    return one + [example["value"] for example in content.get("examples", {}).values()]


def fits(value: Any, schema: dict[str, Any]) -> bool:
    whole = {**schema, "components": DOCUMENT["components"]}
    return jsonschema_rs.validator_for(whole, validate_formats=True).is_valid(value)


class TestTheDocument:
    def test_it_is_openapi_3_1(self) -> None:
        OpenAPIV31SpecValidator(DOCUMENT).validate()

    def test_it_has_each_route_and_method_and_no_others(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Database, "open", lambda _: None)
        app = create_app(Settings(database_url="postgresql://127.0.0.1:1/none", redis_url="redis://127.0.0.1:1"))
        there = {
            (re.sub("<(?:[a-z]+:)?[a-z_]+>", "{id}", rule.rule), method.lower())
            for rule in app.url_map.iter_rules()
            if not rule.rule.startswith(NOT_FOR_PROGRAMS)
            for method in rule.methods or ()
        }
        assert {(path, method) for path, method, _ in operations()} == there

    def test_names_of_operations_are_unique(self) -> None:
        names = [operation["operationId"] for _, _, operation in operations()]
        assert len(names) == len(set(names))
        assert all(re.fullmatch("[a-z][A-Za-z0-9]+", name) for name in names)

    def test_it_has_each_problem_that_the_app_raises(self) -> None:
        sources = [ast.parse(file.read_text()) for file in (ROOT / "velikiy").rglob("*.py")]
        calls = [node for node in chain.from_iterable(map(ast.walk, sources)) if isinstance(node, ast.Call)]
        raised = {
            call.args[0].value
            for call in calls
            if isinstance(call.func, ast.Name) and call.func.id == "Problem" and isinstance(call.args[0], ast.Constant)
        }
        raised |= {kind for kind, _ in SQLSTATES.values()}
        raised |= {"method-not-allowed", "internal-error", "content-too-large"}  # by the framework
        documented = set(chain.from_iterable(name.split("-or-") for name in DOCUMENT["components"]["responses"]))
        assert len(raised) > 10
        assert raised <= documented <= set(KINDS)

    @pytest.mark.parametrize(("place", "kind", "content"), list(media_types()))
    def test_examples_of_bodies_fit(self, place: str, kind: str, content: dict[str, Any]) -> None:
        found = examples(content)
        assert found, f"{place} has no example"
        for example in found:
            assert fits(example, content["schema"]), example

    def test_examples_of_parameters_and_headers_fit(self) -> None:
        for _, _, operation in operations():
            headers = [resolved(answer).get("headers", {}) for answer in operation["responses"].values()]
            for said in chain(operation["parameters"], *(each.values() for each in headers)):
                if "example" in said:
                    assert fits(said["example"], said["schema"]), said

    def test_any_resource_is_described(self) -> None:
        class NewPart(Body):
            weight: Annotated[int, Field(ge=0, examples=[3])] = 0

        parts = Resource("spare_parts", "part", NewPart, seed_row=lambda number: {"weight": number})
        both = document({**registry(), "spare_parts": parts})
        OpenAPIV31SpecValidator(both).validate()
        [post, get] = [both["paths"]["/spare_parts"][method] for method in ("post", "get")]
        assert post["operationId"] == "createPart"
        assert post["responses"]["409"] == {"$ref": "#/components/responses/in-flight"}
        assert [parameter["name"] for parameter in get["parameters"]] == ["cursor", "limit", "sort", "If-None-Match"]
        assert both["components"]["schemas"]["Part"]["properties"]["weight"]["minimum"] == 0
        assert "default" not in both["components"]["schemas"]["PartChanges"]["properties"]["weight"]

    def test_nothing_is_left_of_how_it_is_made(self) -> None:
        schemas = str(DOCUMENT["components"]["schemas"])
        assert "'default': None" not in schemas
        assert "'title': 'Name'" not in schemas


class TestItsAddress:
    def test_it_is_served_with_an_etag(self, stack: Stack) -> None:
        for base in (stack.app, stack.edge):
            first = requests.get(f"{base}/openapi.json", timeout=5)
            assert first.json() == DOCUMENT
            again = requests.get(f"{base}/openapi.json", headers={"If-None-Match": first.headers["ETag"]}, timeout=5)
            assert (again.status_code, again.content) == (304, b"")

    def test_it_takes_no_parameters(self, stack: Stack) -> None:
        assert requests.get(f"{stack.app}/openapi.json?x=1", timeout=5).status_code == 400


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[Stack]:
    """Of its own: afterwards nobody knows who Alice is. A busy machine is no reason for a 503."""
    with running(DATABASE_TIMEOUT="10") as stack:
        yield stack


def requests_of_examples() -> Iterator[tuple[str, str, dict[str, Any], int]]:
    """Method, address, what else is sent, and the status that a right request has."""
    for path, method, operation in operations():
        given = {parameter["name"]: parameter for parameter in operation["parameters"]}
        address = path.format(**{name: each.get("example") for name, each in given.items()})
        query = {name: each["example"] for name, each in given.items() if each["in"] == "query" and "example" in each}
        status = int(next(iter(operation["responses"])))
        bodies = operation.get("requestBody", {"content": {}})["content"]
        for kind, content in bodies.items():
            for body in examples(content):
                yield method, address, {"json": body, "headers": {"Content-Type": kind}}, status
        if not bodies:
            yield method, address, {"params": query}, status


@pytest.mark.parametrize(("method", "address", "more", "status"), list(requests_of_examples()))
def test_an_example_of_a_request_gets_the_answer_that_is_documented(
    fuzzed: Stack, method: str, address: str, more: dict[str, Any], status: int
) -> None:
    fuzzed.sql("DELETE FROM users")
    fuzzed.sql("INSERT INTO users (id, name, email) SELECT n, 'N', n || '@example.com' FROM generate_series(1, 3) n")

    def answered() -> bool:
        return requests.request(method, fuzzed.edge + address, **more, timeout=10).status_code == status

    # The relay tells caches of what SQL has written; a write reads none.
    wait_until(answered, within=5 if method in ("get", "head") else 0)


@pytest.mark.timeout(400)
def test_requests_made_from_it_are_answered_as_documented(fuzzed: Stack, tmp_path: Path) -> None:
    command = [
        *(
            str(Path(sys.executable).with_name("schemathesis")),
            "--config-file",
            str(ROOT / "tests/openapi/schemathesis.toml"),
        ),
        *("run", f"{fuzzed.edge}/openapi.json", "--url", fuzzed.edge, "--no-color"),
        *("--checks", "all", "--phases", "examples,coverage,fuzzing,stateful", "--max-examples", "200"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=350, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr
    cases = re.search(r"(\d+) generated", done.stdout)
    assert cases and int(cases[1]) > 3000, done.stdout[-2000:]
