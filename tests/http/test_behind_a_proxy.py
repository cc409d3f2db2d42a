"""Another Nginx in front of the edge, with the configuration of docs/proxies.md: its clients see right addresses."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urljoin, urlsplit

import pytest
import requests
from playwright.sync_api import Browser, expect

from testkit.nginx_proxy import nginx_location
from testkit.stack import ROOT, Stack, running, status_of, wait_until


@contextmanager
def running_proxy(edge: str) -> Iterator[str]:
    """Run Nginx with the location of the document in front of this edge; yield its address."""
    [location] = re.findall(r"```nginx\n(.*?)```", (ROOT / "docs/proxies.md").read_text(), re.DOTALL)
    assert "127.0.0.1:8080" in location
    with nginx_location(edge, location.replace("127.0.0.1:8080", urlsplit(edge).netloc), "/api") as url:
        yield url


@pytest.fixture(scope="module")
def trusting() -> Iterator[Stack]:
    with running(TRUSTED_PROXIES="127.0.0.0/8", EDGE_TTL="60") as stack:
        yield stack


@pytest.fixture(scope="module")
def api(trusting: Stack) -> Iterator[str]:
    """The address of the service as clients of the proxy see it."""
    with running_proxy(trusting.edge) as url:
        yield url


def test_pages_lead_through_the_proxy_and_past_it_from_the_same_entries(trusting: Stack, api: str) -> None:
    for base in (api, trusting.edge, api):
        url, names = f"{base}/users?limit=1&sort=name", []
        while url:
            response = requests.get(url, timeout=5)
            assert response.status_code == 200, (url, response.text)
            names += [user["name"] for user in response.json()]
            if base == api and "cursor" not in url:
                first = response.headers["X-Cache-Status"]
            link = response.links.get("next", {}).get("url")
            assert not link or link.startswith(urlsplit(base).path + "/users?")
            url = urljoin(url, link) if link else ""
        assert names == ["Alice", "Bob", "Charlie"]
    assert first == "HIT"


def test_location_and_batch_lead_through_the_proxy(api: str) -> None:
    headers = {"Idempotency-Key": "behind"}
    body = {"name": "Dora", "email": "dora.proxy@example.com"}
    first, again = (requests.post(f"{api}/users", json=body, headers=headers, timeout=5) for _ in range(2))
    assert again.headers["Idempotency-Replayed"] == "true"
    assert first.headers["Location"] == again.headers["Location"]
    created = urljoin(api, first.headers["Location"])
    assert created.startswith(f"{api}/users/")
    assert requests.get(created, timeout=5).json()["name"] == "Dora"
    large = {"operations": [{"op": "delete", "id": first.json()["id"]}], "x": "y" * 1_500_000}
    refused = requests.post(f"{api}/users/batch", json=large, timeout=5)
    assert (refused.status_code, refused.json()["type"]) == (422, "/api/problems/invalid")
    assert requests.delete(created, timeout=5).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [
        ("GET", "/users/999999", "not-found"),
        ("GET", "/nothing/here", "not-found"),
        ("GET", "/users?limit=0", "bad-request"),
        ("GET", "/users?cursor=x", "bad-request"),
        ("DELETE", "/users/999999", "not-found"),
        ("PUT", "/docs", "method-not-allowed"),
        ("FO", "/users", "not-implemented"),
        ("GET", "/" + "x" * 5000, "uri-too-long"),
    ],
)
def test_type_of_a_problem_is_the_address_of_its_page(api: str, method: str, path: str, kind: str) -> None:
    response = requests.request(method, api + path, timeout=5)
    problem = response.json()
    assert problem["type"] == f"/api/problems/{kind}"
    page = requests.get(urljoin(api, problem["type"]), timeout=5)
    assert page.status_code == 200
    assert page.headers["Content-Type"].startswith("text/html")


def test_links_of_the_pages_about_problems_lead_through_the_proxy(api: str) -> None:
    for page in (f"{api}/problems", f"{api}/problems/", f"{api}/problems/taken"):
        links = re.findall(r'href="([^"]+)"', requests.get(page, timeout=5).text)
        assert links
        for link in links:
            assert status_of(urljoin(page, link)) == 200, (page, link)


def test_document_names_the_server_and_the_problems_as_clients_of_the_proxy_see_them(trusting: Stack, api: str) -> None:
    behind, direct = (requests.get(f"{base}/openapi.json", timeout=5) for base in (api, trusting.edge))
    assert (behind.json()["servers"], direct.json()["servers"]) == ([{"url": "/api"}], [{"url": "/"}])
    assert list(behind.json()["paths"]) == list(direct.json()["paths"])
    assert "(/api/problems/" in behind.json()["components"]["schemas"]["Problem"]["properties"]["type"]["description"]
    assert not re.search(r'["`(]/problems/', behind.text)
    assert behind.headers["ETag"] != direct.headers["ETag"]
    for url, response in ((api, behind), (trusting.edge, direct)):
        condition = {"If-None-Match": response.headers["ETag"]}
        assert requests.get(f"{url}/openapi.json", headers=condition, timeout=5).status_code == 304


def test_swagger_ui_works_behind_the_proxy(api: str, browser: Callable[..., Browser]) -> None:
    with browser() as chromium:
        page = chromium.new_page()
        failed: list[str] = []
        page.on("response", lambda response: failed.append(response.url) if response.status >= 400 else None)
        page.goto(f"{api}/docs")
        page.locator("#operations-users-count_users, #operations-users-countUsers").first.click()
        page.get_by_role("button", name="Try it out").click()
        page.get_by_role("button", name="Execute").click()
        expect(page.locator(".request-url pre").first).to_have_text(re.compile(r"/api/users/count"))
        expect(page.locator(".live-responses-table .response-col_status").last).to_contain_text("200")
        assert failed == []


def test_both_logs_have_the_ids_of_the_client_and_the_edge_its_address(trusting: Stack, api: str) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    headers = {"X-Request-Id": "from-the-client", "traceparent": trace}
    response = requests.delete(f"{api}/users/999999", headers=headers, timeout=5)
    request_id = response.headers["X-Request-Id"]

    def lines(*logs: str) -> list[str]:
        return [line for log in logs for line in trusting.log(log).splitlines() if f'"{request_id}"' in line]

    [of_edge] = wait_until(lambda: lines("edge1"))
    [of_app] = wait_until(lambda: lines("app1", "app2"))
    for line in (of_edge, of_app):
        assert '"client_request_id":"from-the-client"' in line
        assert f'"traceparent":"{trace}"' in line
    assert '"client":"127.0.0.1"' in of_edge


def test_page_of_the_other_scheme_cannot_write(trusting: Stack, api: str) -> None:
    address = urlsplit(api).netloc
    for scheme, status in (("http", 404), ("https", 403)):
        headers = {"Origin": f"{scheme}://{address}"}
        assert requests.delete(f"{api}/users/999999", headers=headers, timeout=5).status_code == status
    host = urlsplit(trusting.edge).netloc
    for proto, scheme, status in (("https", "https", 404), ("https", "http", 403), ("", "https", 404)):
        headers = {"Origin": f"{scheme}://{host}", "X-Forwarded-Proto": proto}
        assert requests.delete(f"{trusting.edge}/users/999999", headers=headers, timeout=5).status_code == status


def test_prefix_is_not_believed_from_a_client_of_an_edge_that_trusts_no_proxy(stack: Stack) -> None:
    with running_proxy(stack.edge) as api:
        for _ in range(2):
            response = requests.get(f"{api}/users?limit=1", timeout=5)
            assert response.links["next"]["url"].startswith("/users?")
        assert requests.get(f"{api}/users/999999", timeout=5).json()["type"] == "/problems/not-found"


def test_address_with_the_prefix_that_the_proxy_did_not_remove_is_404(trusting: Stack) -> None:
    response = requests.get(f"{trusting.edge}/api/users", headers={"X-Forwarded-Prefix": "/api"}, timeout=5)
    assert (response.status_code, response.json()["type"]) == (404, "/api/problems/not-found")


def test_setting_is_the_prefix_without_any_header() -> None:
    with running(PATH_PREFIX="/v1/") as stack:
        assert requests.get(f"{stack.edge}/openapi.json", timeout=5).json()["servers"] == [{"url": "/v1"}]
        response = requests.get(f"{stack.edge}/users?limit=1", headers={"X-Forwarded-Prefix": "/evil"}, timeout=5)
        assert response.links["next"]["url"].startswith("/v1/users?")
        assert requests.get(f"{stack.edge}/users/0", timeout=5).json()["type"] == "/v1/problems/not-found"
