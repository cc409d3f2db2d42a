-- Lets this edge leave for good, without a failed request and without a write that waits for its exclusion. A program
-- that is about to stop the edge writes a number of seconds into the file `leaving` in EDGE_DATA (edge/leave), and
-- stops Nginx after the file is gone:
--
-- 1. The edge is not ready (control.lua:ready), and each response closes its connection (closing.lua). Clients and
--    balancers choose other edges within the seconds that the file names. The cache is still in use: without it, the
--    clients that are left would load the apps at once.
-- 2. The edge gives its cache lease up, and an app deletes its row (renewal.lua:resign).
--
-- A file needs no secret and no client: only the user of the edge may write there.

local clock = require "clock"
local closing = require "closing"
local renewal = require "renewal"

local CHECK_INTERVAL_S = 0.1

local state = ngx.shared.state

local _M = {}

local path
local resign_at


-- In init_by_lua.
function _M.configure(folder)
    path = folder .. "/leaving"
end


function _M.has_begun()
    return state:get("leaving")
end


local function check(premature)
    local file = not premature and io.open(path)
    if not file then
        return
    end
    local seconds = tonumber(file:read("*l")) or 0
    file:close()
    closing.begin()  -- in each round, since it lasts for some seconds
    if not resign_at then
        state:set("leaving", true)
        resign_at = clock.now_ms() + seconds * 1000
    end
    if clock.now_ms() >= resign_at and renewal.resign() then
        os.remove(path)
    end
end


-- In init_worker_by_lua: the worker that renews the lease also gives it up.
function _M.start()
    if ngx.worker.id() == 0 then
        ngx.timer.every(CHECK_INTERVAL_S, check)
    end
end


return _M
