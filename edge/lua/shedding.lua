-- Refuses a request at once (503) if it would wait too long for an app. Under overload every request would otherwise
-- wait until its client gives up, and the apps would work for clients that are gone: nobody would be served.
--
-- The wait is the number of requests that wait, divided by the number that the apps answer in a second (Little's law).
-- Both are of one worker of this edge: its requests and those of all others are in the same queues and wait equally.
-- Reads and writes count apart, because writes wait for disks, locks and caches. Searches, batches and health checks do
-- not count: the apps bound them (velikiy/server/shares.py).

local MAX_WAIT_S = 0.4
local ALWAYS = 8         -- requests that a worker lets wait, however slow the apps are
local PROOF_S = 0.3      -- more must have waited for so long: a burst after silence, or a short stop, is no overload
local MEMORY_S = 0.5     -- the weight of a response in the rate of the apps shrinks by a factor e in this time

local HEALTH = { ["/health"] = true, ["/livez"] = true }

local exp = math.exp

local _M = {}

local queues = {
    reads = { waiting = 0, rate = 0, at = 0 },
    writes = { waiting = 0, rate = 0, at = 0 },
}


local function rate(queue, now)
    return queue.rate * exp((queue.at - now) / MEMORY_S)
end


-- Return whether the request may wait for an app. If so, `leave` has to follow.
-- kind: "reads" or "writes". Any other kind waits without a limit of this edge.
function _M.enter(kind)
    local queue = queues[kind]
    if not queue then
        return true
    end
    if queue.waiting >= ALWAYS then
        local now = ngx.now()
        queue.full_since = queue.full_since or now
        if now - queue.full_since > PROOF_S and queue.waiting > MAX_WAIT_S * rate(queue, now) then
            return false
        end
    end
    queue.waiting = queue.waiting + 1
    ngx.var.waits_in = kind
    return true
end


-- In access_by_lua: refuse a read that is not cached. own_path: its path, if it is one of the service itself.
function _M.admit(own_path)
    if not HEALTH[own_path] and not _M.enter("reads") then
        return ngx.exit(ngx.HTTP_SERVICE_UNAVAILABLE)
    end
end


-- The app has answered, or the request has ended in another way.
function _M.leave()
    local kind = ngx.var.waits_in
    if not kind or kind == "" then
        return
    end
    ngx.var.waits_in = ""
    local queue, now = queues[kind], ngx.now()
    queue.waiting = queue.waiting - 1
    queue.rate, queue.at = rate(queue, now) + 1 / MEMORY_S, now
    if queue.waiting < ALWAYS then
        queue.full_since = nil
    end
end


return _M
