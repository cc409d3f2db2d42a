-- Lets clients leave before a reload or a stop. A worker that Nginx replaces or stops closes its idle connections at
-- once, so a request that a client is just sending there would be lost. Therefore each response carries
-- `Connection: close` for some seconds before a reload (velikiy/stack/rolling.py) and before a stop (edge/container):
-- clients open another connection for their next request, and busy clients have no idle connection left.
--
-- Relies on: a request that passes a location with `keepalive_timeout 0` is the last on its connection.
-- Remove when: Debian's Nginx has keepalive_min_timeout (1.27.4).

local clock = require "clock"

local DURATION_MS = 3000
local CHECK_INTERVAL_S = 0.1

local state = ngx.shared.state

local FOREVER_MS = 2 ^ 52

local _M = {
    is_closing = false,
    is_leaving = false,  -- the edge is about to stop
}


-- In all workers.
function _M.begin()
    state:set("closing_until", clock.now_ms() + DURATION_MS)
end


-- In all workers, until the edge stops.
function _M.leave()
    state:set("closing_until", FOREVER_MS)
end


local function check()
    local closing_until = state:get("closing_until") or 0
    _M.is_closing = clock.now_ms() < closing_until
    _M.is_leaving = closing_until == FOREVER_MS
end


-- In init_worker_by_lua. Each worker looks by itself, so that a hit need not.
function _M.start()
    ngx.timer.every(CHECK_INTERVAL_S, check)
end


return _M
