-- The edge's cache lease: the edge may serve from its cache and store in it only while it holds the lease. An app
-- grants the lease and renews it each second (renewal.lua).
--
-- An epoch is a span in which the edge is registered without a break. Generations belong to one epoch, so an entry of
-- an earlier epoch is never found again, whichever worker looks for it, and however long the worker was stopped
-- meanwhile.

local clock = require "clock"

local state = ngx.shared.state
local exiting = ngx.worker.exiting
local now_ms = clock.now_ms
local find, sub = string.find, string.sub

local _M = {}


-- In init_by_lua, which runs again on each reload: the dictionary is kept, and its content is still true.
function _M.configure()
    state:add("epoch", 0)
end


-- Return the newest epoch. A lease is stored under the number of its epoch, so a lease that arrives late, because a
-- worker was stopped or is about to exit, never counts as the lease of the newest epoch.
function _M.epoch()
    return state:get("epoch")
end


-- Return the epoch while the edge holds its lease, else nil. The result counts for the whole request that asks for it,
-- however long that takes: the request began under the lease.
function _M.held()
    local epoch = state:get("epoch")
    local valid_until = state:get(epoch)
    -- A worker that is about to exit must not use the cache: the control listener may be closed, and an edge with a
    -- closed listener counts as down.
    if valid_until and now_ms() < valid_until and not exiting() then
        return epoch
    end
end


-- Return the servers that the edge may use as Redis, as text (velikiy/coherence/shards.py:ShardMap); nil while it may
-- use none. The app granted them with the lease of this epoch. A reply counts only if the same text is returned after
-- the reply, because a worker may be stopped for any time in between.
function _M.redis(epoch)
    -- One value: with two, a worker that is stopped between storing them would give one server the time of another.
    local granted = state:get(epoch .. " redis")
    if not granted or state:get("epoch") ~= epoch then
        return nil
    end
    local blank = find(granted, " ", 1, true)
    if now_ms() < tonumber(sub(granted, 1, blank - 1)) then
        return sub(granted, blank + 1)
    end
end


-- Return the milliseconds that are left of the lease, or 0, for people.
function _M.left_ms()
    return math.max(0, math.floor((state:get(state:get("epoch")) or 0) - now_ms()))
end


-- Store a lease that was requested at `requested_at`: the edge counts the time from before the request.
function _M.grant(epoch, requested_at, lease)
    local valid_until = requested_at + lease.milliseconds
    state:set(epoch .. " redis", lease.redis and valid_until .. " " .. lease.redis or nil)
    state:set(epoch, valid_until)
    state:set("lost_at", ngx.now() + lease.milliseconds / 1000)
end


-- Return the moment (Unix time) at which the last lease ended, for people; nil if there was none.
function _M.lost_at()
    return state:get("lost_at")
end


-- Begin an epoch, for which there is no lease and no generation yet, and return it.
function _M.begin_epoch()
    local epoch = state:incr("epoch", 1)
    state:delete(epoch - 1)
    state:delete(epoch - 1 .. " redis")
    return epoch
end


return _M
