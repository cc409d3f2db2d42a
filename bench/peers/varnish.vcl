# Varnish in front of velikiy's app, with a plain TTL. A template: bench/servers.py fills in ${HOST} and ${PORT}.
vcl 4.1;

backend app {
    .host = "${HOST}";
    .port = "${PORT}";
}

sub vcl_backend_response {
    set beresp.ttl = 5s;
    # velikiy's Cache-Control addresses caches that no writer invalidates; by its own rules Varnish would store nothing.
    return (deliver);
}
