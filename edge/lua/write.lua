-- The checks of a write before it is sent to an app, and its deadline.

local bodies = require "bodies"
local clock = require "clock"
local keys = require "keys"
local limits = require "limits"
local shedding = require "shedding"
local signature = require "signature"

-- The time that is reserved for the COMMIT and the way back, so that a write that an app commits in time is also
-- answered in time.
local RESERVE_MS = 500

local _M = {}

local clock_name
local timeout_ms  -- by the kind of a write

-- Nginx would forward the first of two equal headers, and no empty header. A write that loses its precondition would
-- overwrite a newer row; of two idempotency keys the order would decide; a web page without its origin
-- would pass for a program.
local ONCE = { "Content-Type", "If-Match", "If-None-Match", "If-Unmodified-Since", "Idempotency-Key", "Origin",
               "Sec-Fetch-Site" }


-- name: the clock of clock.now_ms (edge/start); write_s, costly_s: the times after which this edge answers 504.
function _M.configure(name, write_s, costly_s)
    clock_name, timeout_ms = name, { writes = write_s * 1000, costly = costly_s * 1000 }
end


-- In access_by_lua. kind: "writes", or "costly" for many rows in one body.
function _M.begin(kind)
    keys.admit()
    local headers = ngx.req.get_headers(0)  -- 0: all of them, and not the first 100
    for _, name in ipairs(ONCE) do
        local value = headers[name]
        if value == "" or type(value) == "table" then
            return ngx.exit(ngx.HTTP_BAD_REQUEST)
        end
    end
    if headers["Idempotency-Key"] then
        -- The owner of the key, if the client has no API key (velikiy/http/requests.py).
        ngx.var.client_digest = signature.digest_of_client(limits.name_of(ngx.var.binary_remote_addr))
    end
    bodies.read()  -- first: a client may take longer to send the body than the app has to commit it
    if not shedding.enter(kind) then
        return ngx.exit(ngx.HTTP_SERVICE_UNAVAILABLE)
    end
    -- The deadline as a moment of this clock, and as the time that is left, which counts for an app that does not share
    -- this clock, from the arrival of the request on (velikiy/coherence/deadline.py).
    local left_ms = timeout_ms[kind] - RESERVE_MS
    ngx.var.write_deadline = string.format("%s %.0f %.0f", clock_name, clock.now_ms() + left_ms, left_ms)
end


return _M
