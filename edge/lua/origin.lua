-- Fetches the response of an app to a cacheable read, and the entries of API keys.
--
-- A request over HTTP/1.1 does so by a subrequest. Nginx's Lua makes no subrequest of a request over HTTP/2, so that
-- request sends another one to a listener of this edge (edge/conf/inner.conf), over a Unix socket and HTTP/1.0, which
-- knows no chunks. Only misses take this way.
--
-- Remove when: Debian's lua-nginx-module makes subrequests for HTTP/2; 0.10.23 refuses them.

local traces = require "traces"

local concat = table.concat

local CONNECT_MS = 1000
local SEND_MS = 1000

local _M = {}

local address, read_ms


-- In init_by_lua. inner: the address of the inner listener; read_timeout: seconds after which it answers by itself.
function _M.configure(inner, read_timeout)
    address, read_ms = inner, (3 * read_timeout + 3) * 1000  -- it may try three apps
end


-- Return the table of a response's header, in the form of ngx.location.capture, or nil and an error.
local function receive_header(socket)
    local header = {}
    while true do
        local line, err = socket:receive("*l")
        if not line then
            return nil, err
        end
        if line == "" then
            return header
        end
        local name, value = line:match("^([^:]+):%s*(.*)$")
        if name then
            local before = header[name]
            header[name] = not before and value
                           or type(before) == "table" and { unpack(before), value } or { before, value }
        end
    end
end


local function request(socket, lines)
    socket:settimeouts(CONNECT_MS, SEND_MS, read_ms)
    local ok, err = socket:connect(address)
    if ok then
        ok, err = socket:send(lines)
    end
    local status_line
    if ok then
        status_line, err = socket:receive("*l")
    end
    local status = status_line and tonumber(status_line:match("^HTTP/1%.%d (%d%d%d)"))
    if not status then
        return nil, err
    end
    local header
    header, err = receive_header(socket)
    if not header then
        return nil, err
    end
    local body, _, received = socket:receive("*a")
    body = body or received
    local length = tonumber(header["Content-Length"])
    header["Content-Length"] = nil
    return { status = status, header = header, body = body, truncated = length and length ~= #body }
end


local function fetch_over_http1(uri, fill_lease, fallback)
    local var = ngx.var
    local lines = { "GET ", uri, " HTTP/1.0\r\nHost: ", var.host, "\r\nX-Request-Id: ", var.id,
                    "\r\nClient-Request-Id: ", var.client_request_id, "\r\nTraceparent: ", traces.for_apps(var),
                    "\r\nFill-Lease: ", fill_lease, "\r\nFallback: ", fallback,
                    "\r\nAuthorization: ", var.forwarded_authorization, "\r\n\r\n" }
    local socket = ngx.socket.tcp()
    local response = request(socket, concat(lines)) or { status = 502, header = {}, body = "" }
    socket:close()
    return response, response.header["App"], response.header["App-Seconds"]
end


-- Return the response, the address of the app, and the seconds until its header arrived.
-- fallback: "stale" if a stored response can be sent instead, else "none" (balancer.lua).
function _M.fetch(fill_lease, fallback)
    if ngx.var.http2 ~= "" then
        return fetch_over_http1(ngx.var.request_uri, fill_lease, fallback)
    end
    local upstream = {}
    local vars = { fill_lease = fill_lease, fallback = fallback, traced = ngx.var.traced }
    local response = ngx.location.capture("/.app", { vars = vars, ctx = upstream })
    if upstream.gave_up then
        response.status, response.truncated = upstream.gave_up, false
    end
    return response, upstream.app, upstream.seconds
end


-- Return an app's response with the entry of an API key.
function _M.fetch_key(path)
    if ngx.var.http2 ~= "" then
        return (fetch_over_http1(path, "", "none"))
    end
    local upstream = {}
    local response = ngx.location.capture("/.key", { vars = { key_path = path }, ctx = upstream })
    response.status = upstream.gave_up or response.status
    return response
end


return _M
