-- A write: what is looked at before an app is asked.

local lease = require "lease"

-- Milliseconds before the edge gives up. They are left for the COMMIT and the way back, so that a write that an app
-- commits in time is also answered in time.
local RESERVE_MS = 1000

local _M = {}

local clock, wait_ms

-- Headers that Nginx would not pass on unchanged: it passes on the first of two, and no empty one. A write that loses
-- its condition would overwrite a newer row; two keys in another order would be another request; a page without its
-- origin would pass for a program.
local ONCE = { "Content-Type", "If-Match", "If-None-Match", "If-Unmodified-Since", "Idempotency-Key", "Origin",
               "Sec-Fetch-Site" }


-- which: names the clock of lease.now (edge/start); seconds: after which this edge answers 504 for an app.
function _M.configure(which, seconds)
    clock, wait_ms = which, seconds * 1000
end


-- In rewrite_by_lua.
function _M.begin()
    local headers = ngx.req.get_headers(0)  -- all of them, not the first 100
    for _, name in ipairs(ONCE) do
        local value = headers[name]
        if value == "" or type(value) == "table" then
            return ngx.exit(ngx.HTTP_BAD_REQUEST)
        end
    end
    ngx.req.read_body()  -- first: a client may take longer to send it than the app has to commit it
    -- Until when an app may commit this write: as a moment of this machine's clock, and as the time that is left. An
    -- app that does not share this clock counts the latter from the arrival of the request.
    local left = wait_ms - RESERVE_MS
    ngx.var.write_deadline = string.format("%s %.0f %.0f", clock, lease.now() + left, left)
end


return _M
