-- Lets clients leave before a reload. A worker that Nginx replaces closes its idle connections at once, so a request
-- that a client is just sending there would be lost. Therefore each response carries `Connection: close` for some
-- seconds before a reload (velikiy/stack/rolling.py): clients open another connection for their next request, and busy
-- clients have no idle connection left.
--
-- Relies on: a request that passes a location with `keepalive_timeout 0` is the last on its connection.
-- Remove when: Debian's Nginx has keepalive_min_timeout (1.27.4).

local clock = require "clock"

local DURATION_MS = 15000  -- on a busy machine, the reload may come late
local CHECK_INTERVAL_S = 0.1

local state = ngx.shared.state

local _M = { is_closing = false }

local started_ms


-- In all workers.
function _M.begin()
    state:set("closing_since", clock.now_ms())
end


local function check()
    local since = state:get("closing_since") or 0
    _M.is_closing = since > started_ms and clock.now_ms() < since + DURATION_MS
end


-- In init_worker_by_lua. Each worker looks by itself, so that a hit need not. A worker that the reload has started
-- keeps its connections.
function _M.start()
    started_ms = clock.now_ms()
    ngx.timer.every(CHECK_INTERVAL_S, check)
end


return _M
