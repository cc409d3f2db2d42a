# Varnish before our app, with a plain TTL. A template: bench/servers.py fills in ${HOST} and ${PORT}.
vcl 4.1;

backend app {
    .host = "${HOST}";
    .port = "${PORT}";
}

sub vcl_backend_response {
    set beresp.ttl = 5s;
    # Our app's Cache-Control is for those who cannot be told of a write; Varnish' own rules would keep nothing by it.
    return (deliver);
}
