-- The control listener: writers drop paths there, and operators look at entries. Clients do not reach it, and a request
-- counts only if it is signed (signature.lua).

local addresses = require "addresses"
local balancer = require "balancer"
local certificate = require "certificate"
local closing = require "closing"
local generations = require "generations"
local leaving = require "leaving"
local lease = require "lease"
local metrics = require "metrics"
local redis = require "redis"
local renewal = require "renewal"
local signature = require "signature"
local store = require "store"

local _M = {}


-- Return the MAC of the request, or end a request that is not signed.
local function signed(body)
    return signature.request_mac(body) or ngx.exit(ngx.HTTP_UNAUTHORIZED)
end


-- Drop the paths in the body, one a line, or every path for `*`. The epoch is not checked, because an additional drop
-- is harmless. The instance id is checked: the drop may be meant for an edge that had this address before, and that
-- runs elsewhere now.
function _M.drop()
    ngx.req.read_body()
    local body = ngx.req.get_body_data()
    if not body then
        return ngx.exit(ngx.HTTP_BAD_REQUEST)
    end
    local request = signed(body)
    if ngx.var.http_x_edge ~= renewal.instance_id() then
        return ngx.exit(ngx.HTTP_CONFLICT)
    end
    if body == "*" then
        generations.drop_all()
    else
        for path in body:gmatch("[^\n]+") do
            generations.drop(path)
        end
    end
    metrics.count("drops_total")
    return signature.respond(request, ngx.HTTP_NO_CONTENT, "")
end


-- Send one `name value` a line: the lease, and the entry of the address in ?uri=.
function _M.show()
    local request = signed("")
    local lines = { "instance_id " .. renewal.instance_id(), "lease " .. lease.left_ms() }
    local uri = ngx.var.arg_uri and ngx.unescape_uri(ngx.var.arg_uri)
    local path, query = addresses.split(uri or "")
    local generation = generations.known(lease.epoch(), path)
    if generation then
        lines[#lines + 1] = "generation " .. generation
        local entry, _, stored_at = store.get(generation .. (query ~= "" and addresses.canonical(query) or query))
        if entry then
            lines[#lines + 1] = "size " .. #entry
            lines[#lines + 1] = "age " .. ngx.time() - stored_at
        end
    end
    return signature.respond(request, ngx.HTTP_OK, table.concat(lines, "\n"))
end


-- Close the connections of clients before a reload (closing.lua).
function _M.close_connections()
    local request = signed("")
    closing.begin()
    return signature.respond(request, ngx.HTTP_NO_CONTENT, "")
end


-- Tell balancers whether to send clients here (docs/operations.md). An edge without a cache lease answers nothing from
-- its cache, and may be cut off. While PostgreSQL is away no edge has a lease, and an edge that had one goes on: its
-- answers, marked STALE, are better than none.
function _M.ready()
    local reason = leaving.has_begun() and "leaving"
        or not lease.held() and not renewal.waits_for_postgres() and "no cache lease"
    ngx.status = reason and ngx.HTTP_SERVICE_UNAVAILABLE or ngx.HTTP_OK
    return ngx.print(reason or lease.held() and "ready" or "ready, without PostgreSQL")
end


-- The edge's own account for /readyz, which an app turns into sentences (velikiy/findings/caches.py:edge). `refused` is
-- the status with which an app refuses a lease, `lost` the moment at which the last lease ended, `clock` the wall
-- clock.
function _M.account()
    local held = lease.held()
    local parts = { leaving.has_begun() and "leaving" or held and "held" or "none" }
    if not held then
        local lost_at = lease.lost_at()
        parts[#parts + 1] = lost_at and "lost=" .. lost_at
        local status = renewal.refusal()
        parts[#parts + 1] = status and "refused=" .. status
    end
    if redis.reaches_another() then
        parts[#parts + 1] = "redis=another"
    elseif redis.is_silent() then
        parts[#parts + 1] = "redis=silent"
    end
    local silent = balancer.silent()
    if #silent > 0 then
        parts[#parts + 1] = "apps=" .. table.concat(silent, ",")
    end
    local days = certificate.last_days()
    if days then
        parts[#parts + 1] = "certificate=" .. days
    end
    ngx.update_time()
    parts[#parts + 1] = "clock=" .. ngx.now()
    return table.concat(parts, "; ")
end


-- At the listener for clients: send the launcher the name of this edge (EDGE_ID) and the milliseconds of its lease,
-- because another program may have taken the port first. For other clients the address does not exist.
function _M.identify(id)
    local request = signature.request_mac("")
    if not request then
        return ngx.exit(ngx.HTTP_NOT_FOUND)
    end
    return signature.respond(request, ngx.HTTP_OK, id .. " " .. lease.left_ms())
end


return _M
