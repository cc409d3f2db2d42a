-- Refuses a request at once (503) if it would wait too long for an app. Under overload every request would otherwise
-- wait until its client gives up, and the apps would work for clients that are gone: no request would be served.
--
-- The wait is the number of requests that wait, divided by the number that the apps answer in a second (Little's law).
-- Both are of one worker of this edge: its requests and those of all others are in the same queues and wait equally.
-- Reads and writes count apart, because writes wait for disks, locks and caches. Searches, batches, the console's own
-- requests and health checks do not count: the apps bound them (velikiy/server/shares.py).

local balancer = require "balancer"
local clock = require "clock"

local OVERLOAD_S = 0.3   -- the wait must be too long for so long: a burst, or a short stop, is no overload
local DECAY_S = 0.5      -- in this time the weight of a response in the rate of the apps shrinks by a factor e

local HEALTH = { ["/health"] = true, ["/livez"] = true }

local exp = math.exp

local _M = {}

-- max_wait_s: the wait that is too long.
-- min_queue: a worker lets so many requests wait, however slow the apps are.
-- A commit takes long, so the writes of 64 clients that each wait for their response are a queue, and no overload.
local queues = {
    reads = { max_wait_s = 0.2, min_queue = 16, waiting = 0, rate = 0, at = 0 },
    writes = { max_wait_s = 0.4, min_queue = 32, waiting = 0, rate = 0, at = 0 },
}


local function now_s()
    return clock.now_ms() / 1000
end


local function rate(queue, now)
    return queue.rate * exp((queue.at - now) / DECAY_S)
end


-- Return whether the request may wait for an app. If so, `leave` has to follow.
-- kind: "reads" or "writes". Any other kind waits without a limit of this edge.
function _M.enter(kind)
    local queue = queues[kind]
    if not queue then
        return true
    end
    local now = queue.waiting >= queue.min_queue and now_s()
    if now and queue.waiting > queue.max_wait_s * rate(queue, now) then
        queue.full_since = queue.full_since or now
        if now - queue.full_since > OVERLOAD_S then
            if kind == "reads" then
                balancer.be_patient()
            end
            return false
        end
    else
        queue.full_since = nil
    end
    queue.waiting = queue.waiting + 1
    ngx.var.waits_in = kind
    return true
end


-- Return the kind of a read by its path, or its route, and its query.
function _M.kind_of_read(path, query)
    local is_costly = HEALTH[path] or path:find("/console/", 1, true) == 1 or ("&" .. query):find("[?&]q=")
    return is_costly and "costly" or "reads"
end


-- In access_by_lua: refuse a read that is not cached. path: as for kind_of_read.
function _M.admit(path)
    if not _M.enter(_M.kind_of_read(path, ngx.var.args or "")) then
        return ngx.exit(ngx.HTTP_SERVICE_UNAVAILABLE)
    end
end


-- In header_filter_by_lua: the app has answered, so a client that reads its response slowly does not count. Also in
-- log_by_lua, for a request that has ended in another way.
function _M.leave()
    local kind = ngx.var.waits_in
    if not kind or kind == "" then
        return
    end
    ngx.var.waits_in = ""
    local queue, now = queues[kind], now_s()
    queue.waiting = queue.waiting - 1
    queue.rate, queue.at = rate(queue, now) + 1 / DECAY_S, now
end


return _M
