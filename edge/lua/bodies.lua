-- Reads the body of a request, which has to arrive at a minimum rate: client_body_timeout
-- (edge/conf/timeouts_and_sizes.conf) begins again with each byte, so a byte in nine seconds would hold a connection
-- and a place among the writes for days.
--
-- A rate, because a time for all bodies would be too long for a small body or too short for 2 MB. A single slot of
-- GPRS, the slowest link in use, still carries 1100 bytes in a second. A client that was fast has time for a pause.
--
-- Remove when: Nginx has a minimum rate for bodies.

local clock = require "clock"

local GRACE_S = 8  -- below client_body_timeout, after which Nginx closes the connection without a response
local MIN_BYTES_PER_S = 1000
local CHECK_INTERVAL_S = 1

local _M = {}


local function read()  -- a thread runs no function of C
    ngx.req.read_body()
end


-- Return when the body that is on its way is too slow.
local function watch()
    local began_ms, header_bytes = clock.now_ms(), tonumber(ngx.var.request_length)
    repeat
        ngx.sleep(CHECK_INTERVAL_S)
        local received = tonumber(ngx.var.request_length) - header_bytes
    until received < ((clock.now_ms() - began_ms) / 1000 - GRACE_S) * MIN_BYTES_PER_S
    return "too slow"
end


-- Send the problem and end the connection. Nginx itself would send no response with the status 408, and a page of
-- error_page would begin while the body is still being read.
local function refuse()
    local var = ngx.var
    ngx.status = 408
    ngx.header["Content-Type"] = "application/problem+json"
    ngx.header["Cache-Control"] = "private, no-cache"
    ngx.header["X-Content-Type-Options"] = "nosniff"
    if var.http2 == "" then
        ngx.header["Connection"] = "close"
    end
    local body = "{" .. var.problem_type .. ',"status":408,"detail":"' .. var.problem_detail .. '","request_id":"'
                 .. var.id .. '"}'
    ngx.header["Content-Length"] = #body
    ngx.print(body)
    ngx.flush(true)
    ngx.eof()
    return ngx.exit(ngx.ERROR)
end


-- In access_by_lua. A body that has arrived already costs no watch.
function _M.read()
    local reader = ngx.thread.spawn(read)
    if coroutine.status(reader) == "zombie" or coroutine.status(reader) == "dead" then
        return
    end
    local watcher = ngx.thread.spawn(watch)
    local _, verdict = ngx.thread.wait(reader, watcher)
    if verdict == "too slow" then
        return refuse()
    end
    ngx.thread.kill(watcher)
end


-- Read the body of a method that needs none. Few requests have one, and Nginx would read it anyway.
function _M.read_unusual()
    local var = ngx.var
    if var.http_content_length or var.http_transfer_encoding or var.http2 ~= "" then
        _M.read()
    end
end


return _M
