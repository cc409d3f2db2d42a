-- Fetches the response of an app to a cacheable read, and the entries of API keys.
--
-- A request over HTTP/1.1 does so by a subrequest. Nginx's Lua makes no subrequest of a request over HTTP/2, so that
-- request sends another one to a listener of this edge (edge/conf/inner.conf), over a Unix socket and HTTP/1.0, which
-- knows no chunks. Only misses take this way.
--
-- An app repeats the id of the request in its response. Nginx takes noise on a broken connection for a response of
-- HTTP/0.9 with the status 200: without the id it counts as no response, and so does the response to another request.
-- Another app may answer such a read (read.lua).
--
-- Remove when: Debian's lua-nginx-module makes subrequests for HTTP/2; 0.10.23 refuses them.

local balancer = require "balancer"
local traces = require "traces"

local concat = table.concat

local CONNECT_MS = 1000
local SEND_MS = 1000
local HTTP_CLOSE = 444  -- Nginx's own code: close the connection without a response

local _M = {}

local address, read_ms


-- In init_by_lua. inner: the address of the inner listener; read_timeout: seconds after which it answers 504.
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


-- id: the id that was sent to the app. Without the time of a header, Nginx itself has answered.
local function is_answer(id)
    local var = ngx.var
    return var.upstream_http_x_request_id == id or not (var.upstream_header_time or ""):find("%d$")
end


-- In header_filter_by_lua of a subrequest: note the app that has answered. After noise, do not wait for its end.
function _M.note_answer(id)
    local ctx, var = ngx.ctx, ngx.var
    balancer.note_answer(ctx)
    ctx.app, ctx.seconds = var.upstream_addr, var.upstream_header_time
    ctx.is_answered = ctx.gave_up or is_answer(id)
    if not ctx.is_answered then
        return ngx.exit(ngx.ERROR)
    end
end


-- In header_filter_by_lua of a location whose response is passed on: answer 502 instead. After noise Nginx would send
-- that without a header, as HTTP/0.9, so the connection is closed.
function _M.refuse_noise(id)
    balancer.note_answer(ngx.ctx)
    if ngx.var.upstream_status and not is_answer(id) then
        local is_noise = ngx.var.http2 == "" and ngx.req.http_version() < 1
        return ngx.exit(is_noise and HTTP_CLOSE or ngx.HTTP_BAD_GATEWAY)
    end
end


-- In header_filter_by_lua of the inner listener: mark noise. After noise without a status line Nginx sends no header,
-- and closes the connection.
function _M.mark_noise(id)
    balancer.note_answer(ngx.ctx)
    if ngx.var.upstream_status and not is_answer(id) then
        return ngx.exit(HTTP_CLOSE)
    end
end


local function fetch_by_inner_request(uri, fill_lease, fallback, avoided)
    local var = ngx.var
    local lines = { "GET ", uri, " HTTP/1.0\r\nHost: ", var.host, "\r\nX-Request-Id: ", var.id,
                    "\r\nClient-Request-Id: ", var.client_request_id, "\r\nTraceparent: ", traces.for_apps(var),
                    "\r\nFill-Lease: ", fill_lease, "\r\nFallback: ", fallback, "\r\nAvoided: ", avoided,
                    "\r\nAuthorization: ", var.forwarded_authorization, "\r\n\r\n" }
    local socket = ngx.socket.tcp()
    local response, err = request(socket, concat(lines))
    if not response or response.status == HTTP_CLOSE then
        response = { status = 502, header = {}, body = "", is_noise = response ~= nil or err == "closed" }
    end
    socket:close()
    return response, response.header["App"], response.header["App-Seconds"]
end


local function fetch_by_subrequest(location, vars)
    local upstream = {}
    local response = ngx.location.capture(location, { vars = vars, ctx = upstream })
    if upstream.gave_up then
        response = { status = ngx.HTTP_GATEWAY_TIMEOUT, header = {}, body = "" }
    elseif upstream.app and not upstream.is_answered then
        response = { status = ngx.HTTP_BAD_GATEWAY, header = {}, body = "", is_noise = true }
    end
    return response, upstream
end


-- Return the response, the addresses of the apps that were tried, and the seconds until its header arrived.
-- fallback: "stale" if a stored response can be sent instead, "answered" if another app has answered that PostgreSQL
-- does not answer it, else "none" (balancer.lua); avoided: the address of an app that is chosen only if there is no
-- other, or "".
function _M.fetch(fill_lease, fallback, avoided)
    if ngx.var.http2 ~= "" then
        return fetch_by_inner_request(ngx.var.request_uri, fill_lease, fallback, avoided)
    end
    local vars = { fill_lease = fill_lease, fallback = fallback, avoided = avoided, traced = ngx.var.traced }
    local response, upstream = fetch_by_subrequest("/.app", vars)
    return response, upstream.app, upstream.seconds
end


-- Return an app's response with the entry of an API key.
function _M.fetch_key(path)
    if ngx.var.http2 ~= "" then
        return (fetch_by_inner_request(path, "", "none", ""))
    end
    return (fetch_by_subrequest("/.key", { key_path = path }))
end


return _M
