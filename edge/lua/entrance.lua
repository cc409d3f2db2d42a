-- The steps that every request of a client passes once, before anything answers it: a hit, any other cached read, a
-- write, or an app. A check that must also hold for a hit belongs here, as the check of API keys does.

local closing = require "closing"
local hosts = require "hosts"
local keys = require "keys"
local lease = require "lease"
local limits = require "limits"
local metrics = require "metrics"
local read = require "read"
local routes = require "routes"
local shedding = require "shedding"
local traces = require "traces"

-- A step is a function of the route (`@read`, `@write`, `@bypass`, ...), the path of the valid API key if it is in
-- memory, and whether the request may have another key. It returns nothing, or the status of a refusal. It runs in
-- set_by_lua, so it must not wait for anything. Hits end in Nginx's rewrite phase: no later phase, such as access, sees
-- them.
local STEPS = { limits.refuse, hosts.refuse }

local is_internal = ngx.req.is_internal

local _M = {}


-- Return the header Accept, whose lines are one list (RFC 9110, 5.3).
local function accept(var)
    local first = var.http_accept
    if not first then
        return ""
    end
    local lines = ngx.req.get_headers(0).accept
    return type(lines) == "table" and table.concat(lines, ", ") or first
end


-- In set_by_lua. Return the body of a hit, or "" if another location has to answer. (Without a
-- tail call, which LuaJIT does not compile here.)
function _M.enter()
    local var = ngx.var
    if is_internal() then  -- a subrequest or the error page of a request that has entered
        var.refusal = ""
        return ""
    end
    if traces.is_on then
        traces.begin(var)
    end
    local route = var.route
    local epoch, key
    if keys.are_known then
        epoch = lease.held()
        key = epoch and keys.valid(epoch)
    end
    local may_have_key = keys.are_known and not key and keys.is_sent()
    for i = 1, #STEPS do
        local status = STEPS[i](route, key and key.path, may_have_key)
        if status then
            var.refusal = status
            return ""
        end
    end
    if route ~= "@read" then
        var.accept = accept(var)
    end
    if closing.is_closing then
        var.closing = "1"
        return ""
    end
    -- Not a step: an unknown key has to be fetched, for which the location @read can wait.
    if route ~= "@read" or (keys.are_needed and not keys.admits(key)) or var.uncounted == "1" then
        return ""
    end
    epoch = epoch or lease.held()
    if not epoch then
        return ""
    end
    local body = read.hit(epoch)
    if traces.is_on and body ~= "" then
        traces.add_hit(var)
    end
    return body
end


-- In log_by_lua of every answer but hits, which must not pay for this phase: they end above.
function _M.leave()
    shedding.leave()
    routes.note_path()
    metrics.count_answer()
    if traces.is_on then
        traces.add_answer()
    end
end


return _M
