-- Lets this edge leave for good, without a failed request and without a write that waits for its exclusion. A program
-- that is about to stop the edge writes a number of seconds into the file `leaving` in EDGE_DATA (edge/leave):
--
-- 1. The edge is not ready, and each response closes its connection (closing.lua). Clients and balancers choose other
--    edges within the seconds that the file names. The cache is still in use: without it, the clients that are left
--    would load the apps at once.
-- 2. The edge gives its cache lease up, and an app deletes its row (renewal.lua:resign). Then the file is gone.
-- 3. With the file `stopping`, the edge refuses connections (listeners.lua), and accepts for a second the connections
--    that wait already. Then the file is gone, and Nginx may be stopped.
--
-- A file needs no secret and no client: only the user of the edge may write there.

local clock = require "clock"
local closing = require "closing"
local listeners = require "listeners"
local renewal = require "renewal"

local CHECK_INTERVAL_S = 0.1
local ACCEPTING_MS = 1000

local state = ngx.shared.state

local _M = {}

local leaving, stopping  -- paths
local resign_at
local refuses_since


-- In init_by_lua.
function _M.configure(folder)
    leaving, stopping = folder .. "/leaving", folder .. "/stopping"
end


function _M.has_begun()
    return state:get("leaving")
end


-- Return the first line of a file; nil if there is no such file.
local function first_line(path)
    local file = io.open(path)
    if file then
        local line = file:read("*l") or ""
        file:close()
        return line
    end
end


local function check(premature)
    if premature then
        return
    end
    if _M.has_begun() then
        closing.begin()  -- in each round, since it lasts for some seconds
    end
    local seconds = first_line(leaving)
    if seconds then
        if not resign_at then
            state:set("leaving", true)
            resign_at = clock.now_ms() + (tonumber(seconds) or 0) * 1000
        end
        if clock.now_ms() >= resign_at and renewal.resign() then
            os.remove(leaving)
        end
    elseif first_line(stopping) then
        if not refuses_since then
            listeners.end_connecting()
            refuses_since = clock.now_ms()
        elseif clock.now_ms() > refuses_since + ACCEPTING_MS then
            os.remove(stopping)
        end
    end
end


-- In init_worker_by_lua: the worker that renews the lease also gives it up.
function _M.start()
    if ngx.worker.id() == 0 then
        ngx.timer.every(CHECK_INTERVAL_S, check)
    end
end


return _M
