"""`docker-compose up --build` with Compose 1.29 and the legacy builder, as Debian 12 packages both."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from .engine import Engine, build, run
from .stack import Stack, wait_until

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def stack(engine: Engine, checkout: Path) -> Iterator[Stack]:
    if not engine.compose_v1:
        pytest.skip("only Debian 12 has Compose 1.29")
    stack = Stack(engine.compose_v1, checkout, image_tag="test-v1")
    try:
        stack.up("--build", settings={"DOCKER_BUILDKIT": "0"})
        yield stack
    finally:
        stack.remove()


@pytest.mark.parametrize("dockerfile", ["Dockerfile", "edge/Dockerfile"])
def test_legacy_builder_builds_each_image(engine: Engine, checkout: Path, dockerfile: str) -> None:
    tag = "velikiy-edge:test-v1" if "edge" in dockerfile else "velikiy-app:test-v1"
    assert "Successfully built" in build(checkout, "--tag", tag, "--file", str(checkout / dockerfile))


def test_compose_v1_stack_passes_all_checks_of_test_app(stack: Stack) -> None:
    run(str(stack.checkout / "test_app.sh"), stack.url, limit=300)


def test_compose_v1_publishes_only_the_edge_and_only_on_this_machine(stack: Stack) -> None:
    ((port, (binding,)),) = stack.container("edge")["NetworkSettings"]["Ports"].items()
    assert port == "8080/tcp"
    assert (binding["HostIp"], binding["HostPort"]) == ("127.0.0.1", str(stack.port))
    for service in ("postgres", "redis", "app", "relay"):
        assert not any(stack.container(service)["NetworkSettings"]["Ports"].values())


def test_sql_from_outside_is_seen_within_two_seconds_with_compose_v1(stack: Stack) -> None:
    user = stack.wait_until_it_works()
    stack.warm(user)
    stack.sql(f"UPDATE users SET name = 'From outside' WHERE id = {user}")
    wait_until(lambda: stack.name_of(user) == "From outside", "the new name is read", limit=2)


def test_app_is_scaled_and_replaced_while_the_edge_runs(stack: Stack) -> None:
    edge = stack.container("edge")["State"]["StartedAt"]
    stack.up("--no-recreate", "--scale", "app=3")
    assert len(stack.containers("app")) == 3
    stack.up("--no-deps", "--force-recreate", "app")
    assert stack.container("edge")["State"]["StartedAt"] == edge


def test_compose_v1_down_keeps_the_data_and_down_with_volumes_deletes_it(stack: Stack) -> None:
    user = stack.wait_until_it_works()
    stack.compose("down")
    stack.up()
    wait_until(lambda: stack.reads(user), "the user from before is read")
    stack.compose("down", "--volumes")
    stack.up()
    assert not stack.reads(user)
