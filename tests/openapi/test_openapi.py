"""The OpenAPI document is complete and correct, for its examples and for thousands of generated requests."""

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

from testkit.stack import EDGE_SECRET, ROOT, Stack, running, wait_until
from velikiy import create_app
from velikiy.openapi.document import document
from velikiy.postgres import Database
from velikiy.resources.base import Body, Resource, registry
from velikiy.resources.problems import KINDS, SQLSTATES
from velikiy.settings import Settings

DOCUMENT = document(registry())

NOT_FOR_PROGRAMS = (
    *("/.keys/", "/.lease/", "/.live", "/console", "/docs", "/index.html", "/problems/", "/favicon.ico", "/robots.txt"),
)

OF_EVERY_ADDRESS = ("HEAD", "OPTIONS")
"""Methods that the document describes in one sentence, so that no client has them as operations."""

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
    """Yield each description of a body: the name of its place, the media type, and the description."""
    for _, _, operation in operations():
        name = operation["operationId"]
        for kind, content in operation.get("requestBody", {"content": {}})["content"].items():
            yield f"request of {name}", kind, content
        for status, response in operation["responses"].items():
            for kind, content in resolved(response).get("content", {}).items():
                yield f"response {status} of {name}", kind, content


def examples(content: dict[str, Any]) -> list[Any]:
    single = [content["example"]] if "example" in content else []
    return single + [example["value"] for example in content.get("examples", {}).values()]


def is_valid(value: Any, schema: dict[str, Any]) -> bool:
    schema = {**schema, "components": DOCUMENT["components"]}
    return jsonschema_rs.validator_for(schema, validate_formats=True).is_valid(value)


class TestDocument:
    def test_document_is_valid_openapi_3_1(self) -> None:
        OpenAPIV31SpecValidator(DOCUMENT).validate()

    def test_document_has_exactly_the_routes_and_methods_of_the_app(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Database, "open", lambda _: None)
        app = create_app(
            Settings(
                database_url="postgresql://127.0.0.1:1/none", redis_url="redis://127.0.0.1:1", edge_secret=EDGE_SECRET
            )
        )
        routes = {
            (re.sub("<(?:[a-z]+:)?[a-z_]+>", "{id}", rule.rule), method.lower())
            for rule in app.url_map.iter_rules()
            if rule.rule != "/" and not rule.rule.startswith(NOT_FOR_PROGRAMS)
            for method in rule.methods or ()
            if method not in OF_EVERY_ADDRESS
        }
        assert {(path, method) for path, method, _ in operations()} == routes

    def test_operation_ids_are_unique(self) -> None:
        names = [operation["operationId"] for _, _, operation in operations()]
        assert len(names) == len(set(names))
        assert all(re.fullmatch("[a-z][A-Za-z0-9]+", name) for name in names)

    def test_document_has_each_problem_that_the_app_raises(self) -> None:
        sources = [ast.parse(file.read_text()) for file in (ROOT / "velikiy").rglob("*.py")]
        calls = [node for node in chain.from_iterable(map(ast.walk, sources)) if isinstance(node, ast.Call)]
        raised = {
            call.args[0].value
            for call in calls
            if isinstance(call.func, ast.Name) and call.func.id == "Problem" and isinstance(call.args[0], ast.Constant)
        }
        raised |= {kind for kind, _ in SQLSTATES.values()}
        raised |= {"internal-error", "content-too-large"}  # raised by the framework
        raised -= {"method-not-allowed"}  # no documented operation has it
        documented = set(chain.from_iterable(name.split("-or-") for name in DOCUMENT["components"]["responses"]))
        assert len(raised) > 10
        assert raised <= documented <= set(KINDS)
        assert "(/problems/method-not-allowed)" in DOCUMENT["info"]["description"]

    @pytest.mark.parametrize(("place", "kind", "content"), list(media_types()))
    def test_examples_of_bodies_match_their_schema(self, place: str, kind: str, content: dict[str, Any]) -> None:
        found = examples(content)
        assert found, f"{place} has no example"
        for example in found:
            assert is_valid(example, content["schema"]), example

    def test_examples_of_parameters_and_headers_match_their_schema(self) -> None:
        for _, _, operation in operations():
            headers = [resolved(response).get("headers", {}) for response in operation["responses"].values()]
            for description in chain(operation["parameters"], *(each.values() for each in headers)):
                if "example" in description:
                    assert is_valid(description["example"], description["schema"]), description

    def test_document_describes_a_new_resource(self) -> None:
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

    def test_schemas_omit_titles_and_null_defaults_of_pydantic(self) -> None:
        schemas = str(DOCUMENT["components"]["schemas"])
        assert "'default': None" not in schemas
        assert "'title': 'Name'" not in schemas


def schemas() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each schema of the document, and its place."""

    def below(place: str, node: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        if not isinstance(node, dict):
            return
        yield place, node
        for name, property_ in node.get("properties", {}).items():
            yield from below(f"{place}.{name}", property_)
        yield from below(f"{place}.items", node.get("items"))
        for keyword in ("allOf", "anyOf", "oneOf"):
            for number, member in enumerate(node.get(keyword, ())):
                yield from below(f"{place}.{keyword}.{number}", member)

    for name, schema in DOCUMENT["components"]["schemas"].items():
        yield from below(name, schema)
    for place, _, content in media_types():
        yield from below(f"{place}.", content["schema"])


class TestClients:
    """Generators of clients need these properties. tests/openapi/test_generated_clients.py runs them, which takes longer."""

    def test_parameters_have_one_simple_type(self) -> None:
        for path, method, operation in operations():
            for parameter in operation["parameters"]:
                schema = parameter["schema"]
                assert isinstance(schema["type"], str), (method, path, parameter)
                assert not {"anyOf", "oneOf", "allOf", "const", "not"} & set(schema), (method, path, parameter)

    def test_only_ids_are_filled_in_by_the_page(self) -> None:
        for _, _, operation in operations():
            for parameter in operation["parameters"]:
                assert ("example" in parameter) == (parameter["in"] == "path"), parameter
                assert not {"example", "examples"} & set(parameter["schema"]), parameter

    def test_each_object_has_a_name(self) -> None:
        for place, schema in schemas():
            assert "." not in place or "properties" not in schema, place

    def test_choices_are_between_schemas_with_names(self) -> None:
        for place, schema in schemas():
            assert "allOf" not in schema, place
            members = [member for key in ("anyOf", "oneOf") for member in schema.get(key, ())]
            assert all("$ref" in member or member == {"type": "null"} for member in members), place

    def test_patterns_mean_the_same_with_and_without_the_unicode_flag_of_javascript(self) -> None:
        parameters = chain.from_iterable(operation["parameters"] for _, _, operation in operations())
        patterns = {schema.get("pattern", "") for _, schema in schemas()}
        patterns |= {parameter["schema"].get("pattern", "") for parameter in parameters}
        assert len(patterns) > 5
        for pattern in patterns:
            assert pattern.isascii(), pattern

    def test_problems_share_one_type_that_may_get_new_members(self) -> None:
        for name, response in DOCUMENT["components"]["responses"].items():
            [content] = response["content"].values()
            assert content["schema"] == {"$ref": "#/components/schemas/Problem"}, name
        assert "enum" not in DOCUMENT["components"]["schemas"]["Problem"]["properties"]["type"]

    def test_each_operation_of_users_has_a_name_that_says_what_it_does(self) -> None:
        names = {f"{method} {path}": operation["operationId"] for path, method, operation in operations()}
        expected = {
            "get /users": "listUsers",
            "post /users": "createUser",
            "get /users/count": "countUsers",
            "post /users/batch": "batchUsers",
            "get /users/{id}": "getUser",
            "put /users/{id}": "putUser",
            "patch /users/{id}": "updateUser",
            "delete /users/{id}": "deleteUser",
            "get /readyz": "checkReadiness",
        }
        assert expected.items() <= names.items()

    def test_each_order_of_a_list_has_a_name(self) -> None:
        [sort] = [each["schema"] for each in DOCUMENT["paths"]["/users"]["get"]["parameters"] if each["name"] == "sort"]
        names = dict(zip(sort["enum"], sort["x-enum-varnames"], strict=True))
        assert (names["email"], names["-created_at"]) == ("EMAIL", "CREATED_AT_DESCENDING")


@pytest.mark.parametrize("path", list(DOCUMENT["paths"]))
def test_each_address_supports_options_and_head_if_it_can_be_read(stack: Stack, path: str) -> None:
    documented = {method.upper() for method in DOCUMENT["paths"][path]}
    address = stack.edge + path.format(id=1)
    allow = requests.options(address, timeout=5).headers["Allow"]
    assert set(allow.split(", ")) == documented | {"OPTIONS"} | ({"HEAD"} if "GET" in documented else set())
    if "GET" in documented:
        plain = {"Accept-Encoding": "identity"}
        head, get = (requests.request(method, address, headers=plain, timeout=5) for method in ("HEAD", "GET"))
        names = ("ETag", "Content-Type", "Cache-Control", "Last-Modified", "Link")
        assert head.status_code == get.status_code
        assert [head.headers.get(name) for name in names] == [get.headers.get(name) for name in names]


class TestAddress:
    def test_document_is_served_with_an_etag(self, stack: Stack) -> None:
        for base in (stack.app, stack.edge):
            first = requests.get(f"{base}/openapi.json", timeout=5)
            assert first.json() == DOCUMENT
            second = requests.get(f"{base}/openapi.json", headers={"If-None-Match": first.headers["ETag"]}, timeout=5)
            assert (second.status_code, second.content) == (304, b"")

    def test_document_refuses_query_parameters(self, stack: Stack) -> None:
        assert requests.get(f"{stack.app}/openapi.json?x=1", timeout=5).status_code == 400


@pytest.fixture(scope="module")
def fuzzed_stack() -> Iterator[Stack]:
    """Start a stack for these tests alone, because they change arbitrary users. Its timeout is long, so that a busy machine
    does not cause a 503."""
    with running(DATABASE_TIMEOUT="10") as stack:
        yield stack


@pytest.fixture
def new_stack(fuzzed_stack: Stack) -> Stack:
    """The rows of a new database, with their ids."""
    fuzzed_stack.sql("TRUNCATE users RESTART IDENTITY")
    statements = (ROOT / "migrations/sql/users_create.sql").read_text()
    [insert] = re.findall(r"INSERT INTO users.*?;", statements, re.DOTALL)
    fuzzed_stack.sql(insert)
    address = f"{fuzzed_stack.edge}/users/1"
    wait_until(lambda: requests.get(address, timeout=5).json().get("email") == "alice@example.com", within=5)
    return fuzzed_stack


def requests_of_examples() -> Iterator[tuple[str, str, dict[str, Any], int]]:
    """Yield the method, address and further arguments of each valid request, and the documented status."""
    for path, method, operation in operations():
        parameters = {parameter["name"]: parameter for parameter in operation["parameters"]}
        address = path.format(**{name: each.get("example") for name, each in parameters.items()})
        query = {
            name: each["example"] for name, each in parameters.items() if each["in"] == "query" and "example" in each
        }
        status = int(next(iter(operation["responses"])))
        bodies = operation.get("requestBody", {"content": {}})["content"]
        for kind, content in bodies.items():
            for body in examples(content):
                yield method, address, {"json": body, "headers": {"Content-Type": kind}}, status
        if not bodies:
            yield method, address, {"params": query}, status


@pytest.mark.parametrize(("method", "address", "more", "status"), list(requests_of_examples()))
def test_example_of_a_request_gets_the_documented_status(
    fuzzed_stack: Stack, method: str, address: str, more: dict[str, Any], status: int
) -> None:
    fuzzed_stack.sql("DELETE FROM users")
    fuzzed_stack.sql(
        "INSERT INTO users (id, name, email) SELECT n, 'N', n || '@example.com' FROM generate_series(1, 3) n"
    )

    def has_documented_status() -> bool:
        return requests.request(method, fuzzed_stack.edge + address, **more, timeout=10).status_code == status

    # Reads are correct only after the relay has invalidated the rows that SQL wrote. Writes read no cache.
    wait_until(has_documented_status, within=5 if method == "get" else 0)


def test_first_examples_work_one_after_the_other_on_a_new_database(new_stack: Stack) -> None:
    """A reader of the page at /docs may press "Execute" from its top to its end."""
    tried = set()
    for method, address, more, status in requests_of_examples():
        if (method, address) not in tried:
            tried.add((method, address))
            response = requests.request(method, new_stack.edge + address, **more, timeout=10)
            assert response.status_code == status, (method, address, more, response.text)
    assert ("delete", "/users/2") in tried


@pytest.mark.timeout(400)
def test_generated_requests_get_documented_responses(fuzzed_stack: Stack, tmp_path: Path) -> None:
    command = [
        *(
            str(Path(sys.executable).with_name("schemathesis")),
            "--config-file",
            str(ROOT / "schemathesis.toml"),
        ),
        *("run", f"{fuzzed_stack.edge}/openapi.json", "--url", fuzzed_stack.edge, "--no-color"),
        *("--max-examples", "200"),  # all checks and all phases, which are the defaults
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    completed = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=350, check=False, env=environment
    )
    assert completed.returncode == 0, completed.stdout[-20_000:] + completed.stderr
    cases = re.search(r"(\d+) generated", completed.stdout)
    assert cases and int(cases[1]) > 1500, completed.stdout[-2000:]
