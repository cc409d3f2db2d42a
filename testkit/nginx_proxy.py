"""Debian's Nginx as a proxy in front of a service, as operators put it there for TLS and compression."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from testkit.stack import folder, free_ports, status_of, wait_until

CONFIGURATION = """
daemon off;
worker_processes 1;
pid {data}/nginx.pid;
error_log stderr alert;
events {{}}
http {{
    access_log off;
    client_body_temp_path {data}/body;
    proxy_temp_path {data}/proxy;
    fastcgi_temp_path {data}/fastcgi;
    uwsgi_temp_path {data}/uwsgi;
    scgi_temp_path {data}/scgi;
    upstream service {{
        server {service};
        keepalive 4;  # requests of several clients share a connection
    }}
    server {{
        listen 127.0.0.1:{port};
        keepalive_requests 100000;  # clients of the tests keep a connection for more than the 1,000 of the default
        {location}
    }}
}}
"""

LOCATION = """
        location / {
            proxy_pass http://service;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $http_host;
            %s
        }
"""


@contextmanager
def nginx_proxy(service: str, directives: str) -> Iterator[str]:
    """Run a proxy in front of the service, with further directives; yield its address."""
    with nginx_location(service, LOCATION % directives) as url:
        yield url


@contextmanager
def nginx_location(service: str, location: str, prefix: str = "") -> Iterator[str]:
    """Run a proxy with this location in front of the service; yield its address, which ends with the prefix."""
    port = free_ports(1)
    with folder() as data:
        data.chmod(0o777)  # the workers of root's Nginx are another user
        file = data / "nginx.conf"
        file.write_text(CONFIGURATION.format(data=data, port=port, service=urlsplit(service).netloc, location=location))
        proxy = subprocess.Popen(["/usr/sbin/nginx", "-e", "stderr", "-p", str(data), "-c", str(file)])
        try:
            url = f"http://127.0.0.1:{port}{prefix}"
            wait_until(lambda: status_of(f"{url}/livez") == 200)
            yield url
        finally:
            proxy.terminate()
            proxy.wait(10)
