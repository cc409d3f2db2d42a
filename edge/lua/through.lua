-- Reads a row through another edge, for the page Prove it: a browser reaches one edge only, the one that it connects
-- to. This edge sends a signed request to the control listener of the other edge, which sends the read to its own
-- listener for clients. So the read passes each step of a read there. With AUTH=all the read needs the API key of the
-- client, which this edge sends once the other one has proven that it has the secret: another program may have taken
-- the port of an edge that has ended.
--
-- A client chooses among the edges that PostgreSQL has registered, by a digest, and never an address.

local keys = require "keys"
local live = require "live"
local renewal = require "renewal"
local signature = require "signature"
local signed_client = require "signed_client"

local TIMEOUT_MS = 2000
local MAX_RESPONSE_BYTES = 65536
local PATH = "^/[a-z][a-z0-9_]*/[1-9]%d*$"
local HEADERS = { "ETag", "X-Cache-Status", "Cache-Status" }

local _M = {}

local host, port, uses_tls


-- In init_by_lua. address: EDGE_LISTEN; tls: whether clients connect with TLS.
function _M.configure(address, tls)
    host, port = address:match("^(.*):(%d+)$")
    host = host == "0.0.0.0" and "127.0.0.1" or host == "[::]" and "[::1]" or host
    port, uses_tls = tonumber(port), tls
end


-- For a client.
function _M.forward(id, path)
    local instance_id, address = live.address_of(id)
    if not instance_id then
        return ngx.exit(ngx.HTTP_NOT_FOUND)
    end
    local name, number = address:match("^(.*):(%d+)$")
    local function connect(socket)
        return socket:connect(name, tonumber(number))
    end
    local target, headers = "/through?edge=" .. ngx.escape_uri(instance_id), ""
    if keys.are_needed then
        if not signed_client.get(connect, target, "", TIMEOUT_MS) then
            return ngx.exit(ngx.HTTP_BAD_GATEWAY)
        end
        headers = "Authorization: " .. ngx.var.forwarded_authorization .. "\r\n"
    end
    local status, body = signed_client.get(connect, target .. "&path=" .. path, headers, TIMEOUT_MS)
    local code, etag, cache_result, cache_status, content
    if status == "200" then
        code, etag, cache_result, cache_status, content = body:match("^(%d+)\n([^\n]*)\n([^\n]*)\n([^\n]*)\n(.*)$")
    end
    if not code then
        return ngx.exit(ngx.HTTP_BAD_GATEWAY)
    end
    ngx.status = tonumber(code)
    ngx.header["Content-Type"] = ngx.status < 400 and "application/json" or "application/problem+json"
    ngx.header["Cache-Control"] = "private, no-store"
    ngx.header["X-Content-Type-Options"] = "nosniff"
    ngx.header["ETag"] = etag ~= "" and etag or nil
    ngx.header["Content-Length"] = #content  -- a small body with a length is not compressed
    ngx.var.cache_result, ngx.var.cache_status = cache_result, cache_status
    return ngx.print(content)
end


-- Read a row at the listener for clients. Return the response with the headers that `forward` sends on, or nil.
local function read(path, authorization)
    local socket = ngx.socket.tcp()
    socket:settimeouts(TIMEOUT_MS, TIMEOUT_MS, TIMEOUT_MS)
    local response
    if socket:connect(host, port) and (not uses_tls or socket:sslhandshake(nil, nil, false))
        and socket:send("GET " .. path .. " HTTP/1.0\r\nHost: localhost\r\n" .. authorization .. "\r\n") then
        response = ""
        while #response < MAX_RESPONSE_BYTES do
            local piece, err = socket:receiveany(MAX_RESPONSE_BYTES)
            if not piece then
                response = err == "closed" and response or nil
                break
            end
            response = response .. piece
        end
    end
    socket:close()
    local head, body = (response or ""):match("^(.-\r\n)\r\n(.*)$")
    local status = head and head:match("^HTTP/1%.%d (%d%d%d) ")
    if not status then
        return nil
    end
    local lines = { status }
    for _, name in ipairs(HEADERS) do
        lines[#lines + 1] = head:match("\r\n" .. name:gsub("%-", "%%-") .. ": ([^\r\n]*)") or ""
    end
    lines[#lines + 1] = body
    return table.concat(lines, "\n")
end


-- At the control listener, for another edge.
function _M.answer()
    local request = signature.request_mac("") or ngx.exit(ngx.HTTP_UNAUTHORIZED)
    if ngx.unescape_uri(ngx.var.arg_edge or "") ~= renewal.instance_id() then
        return ngx.exit(ngx.HTTP_CONFLICT)
    elseif not ngx.var.arg_path then  -- the question whether this is an edge
        return signature.respond(request, ngx.HTTP_OK, "")
    end
    local path = ngx.var.arg_path:match(PATH) or ngx.exit(ngx.HTTP_CONFLICT)
    local authorization = ngx.var.http_authorization
    local response = read(path, authorization and "Authorization: " .. authorization .. "\r\n" or "")
    return signature.respond(request, response and ngx.HTTP_OK or ngx.HTTP_BAD_GATEWAY, response or "away")
end


return _M
