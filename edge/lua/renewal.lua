-- Registers this edge with an app and renews its cache lease (velikiy/http/edge_leases.py). An edge that does not
-- acknowledge an invalidation is fenced in PostgreSQL (velikiy/coherence/membership.py), and learns it here.

local balancer = require "balancer"
local clock = require "clock"
local ids = require "ids"
local lease = require "lease"
local constants = require "constants"
local metrics = require "metrics"
local signature = require "signature"

local RETRY_S = 0.1             -- after a renewal that failed
local HANG_S = 5                -- after this time a renewal that has not ended no longer delays the next
local MAX_RESPONSE_BYTES = 16384 -- more than a shard map for edges (velikiy/coherence/shards.py)
local CONNECT_TIMEOUT_MS = 200
local RESPONSE_TIMEOUT_MS = 800 -- after a renewal that failed, a second one still succeeds in time

local state = ngx.shared.state
local exiting = ngx.worker.exiting
local now_ms = clock.now_ms

local _M = {}

local instance_id, host, port
local logged  -- the last message: each state is logged once, and not each second

-- A writer that does not reach this edge waits for its exclusion. If only some of the apps reach the edge (another host
-- with the same database, whose apps do not reach this loopback), or the edge is slow, each registration costs such a
-- writer time. So the apps refuse it for a while (velikiy/coherence/membership.py:Record).
local register_at = 0

local is_renewing = false


-- In init_by_lua.
-- id: no two running edges share it; address: the host under which apps reach this edge, or empty (both: edge/start).
function _M.configure(id, address, control_port)
    if os.getenv("NGINX") then
        error("an upgrade in place (SIGUSR2) is not supported: it would run two edges on one port, and each would miss "
              .. "invalidations that are sent to the other. Restart the edge instead", 0)
    end
    instance_id, host, port = id, address, tonumber(control_port)
end


function _M.instance_id()
    return instance_id
end


-- Log on the only level that is kept (edge/conf/logging.conf): messages on the other levels quote requests.
local function log_once(message)
    if message ~= logged then
        ngx.log(ngx.EMERG, message)
        logged = message
    end
end


-- Return everything until the other side closes; nil if that takes until `deadline`, or is too long. With a timeout for
-- each piece alone, an app that sends byte by byte could delay the renewal for ever.
local function receive_all(socket, deadline)
    local response = ""
    while now_ms() < deadline and #response < MAX_RESPONSE_BYTES do
        local piece, err = socket:receiveany(MAX_RESPONSE_BYTES)
        if not piece then
            return err == "closed" and response or nil
        end
        response = response .. piece
    end
end


-- Send a request to an app. Return the lease: its milliseconds, the servers that the edge may use as Redis as long (nil
-- for none), and `users:user` for each resource, percent-encoded. Or return nil, the status and the content; the status
-- is 0 without a signed response.
local function request(action, epoch)
    local peer = balancer.choose()
    if not peer then
        return nil, 0
    end
    local target = "/.lease/" .. action
    local body = ngx.encode_args({ instance_id = instance_id, epoch = ids.run() .. "." .. epoch,
                                   host = host, port = port })
    local signed, request_mac = signature.sign_request("POST", target, body)
    local socket = ngx.socket.tcp()
    socket:settimeouts(CONNECT_TIMEOUT_MS, CONNECT_TIMEOUT_MS, RESPONSE_TIMEOUT_MS)
    local status, content, milliseconds, redis, resources
    if balancer.connect(socket, peer)
        and socket:send("POST " .. target .. " HTTP/1.0\r\nContent-Type: application/x-www-form-urlencoded\r\n"
                        .. signature.HEADER .. ": " .. signed .. "\r\n"
                        .. "Content-Length: " .. #body .. "\r\n\r\n" .. body) then
        local response = receive_all(socket, now_ms() + RESPONSE_TIMEOUT_MS) or ""
        local head
        head, content = response:match("^(.-\r\n)\r\n(.*)$")
        status = head and head:match("^HTTP/1%.%d (%d%d%d) ")
        -- A response that is not signed has another sender: another program listens on the port of an app that ended.
        if not status or not signature.is_response(request_mac, status, content,
                                                   head:match("\r\n" .. signature.HEADER .. ": (%x+)\r\n")) then
            status = nil
        elseif status == "200" then
            milliseconds, redis, resources = content:match("^(%d+) ?(%S*) ?([!-~ ]*)$")
        end
    end
    socket:close()
    if milliseconds then
        return { milliseconds = tonumber(milliseconds), redis = redis:match("^[^-].*"), resources = resources }
    end
    return nil, tonumber(status or 0), content
end


local function grant(epoch, requested_at, granted)
    state:set("resources", granted.resources)
    lease.grant(epoch, requested_at, granted)
end


-- Return the status with which an app refused to register this edge last, for people; nil if it did not.
function _M.refusal()
    return state:get("refusal")
end


-- Return whether the lease is lost for a reason that this edge shares with all others: the edge is still registered,
-- and an app answers that cannot renew the lease, because PostgreSQL is away.
function _M.waits_for_postgres()
    local peer = state:get("registered") and balancer.choose()
    return peer and balancer.examine(peer)
end


-- Give the lease up for good, and return whether an app has deleted the row of this edge; until then, call it again.
-- From then on no writer waits for this edge, so no worker may use the cache: the new epoch has no lease, as in a new
-- registration.
function _M.resign()
    if not state:get("resigned") then
        state:set("resigned", true)
        lease.begin_epoch()
    end
    if is_renewing then
        return false  -- a registration that is on its way would insert the row again
    end
    local epoch = state:get("registered")
    if epoch and not request("resign", epoch) then
        return false
    end
    state:delete("registered")
    return true
end


-- Return whether the edge holds a lease now.
local function renew()
    local epoch = state:get("registered")
    -- The epochs differ if a worker that was about to exit got its response late, after its successor had begun a newer
    -- epoch. Renewing that registration would renew for ever a lease that no read looks for.
    if epoch and epoch == lease.epoch() then
        local requested_at = now_ms()  -- before the request: its response may arrive late
        local granted, status = request("renew", epoch)
        if granted then
            grant(epoch, requested_at, granted)
            logged = nil
            return true
        end
        if status ~= 409 then
            return false  -- the lease that was granted before expires by itself
        end
        log_once("this edge was fenced, because writers could not reach it: it empties its cache and registers again")
        metrics.count("fences_total")
        state:delete("registered")
    end
    if now_ms() < register_at then
        return false
    end
    -- In this order: writers may learn of this edge again only once it has a new epoch.
    epoch = lease.begin_epoch()
    local requested_at = now_ms()
    local granted, status, content = request("register", epoch)
    state:set("refusal", status)
    if granted then
        state:set("registered", epoch)
        grant(epoch, requested_at, granted)
        logged = nil
    elseif status == 424 then
        log_once("an app cannot reach this edge's control listener (EDGE_CONTROL, EDGE_ADDRESS; port "
                 .. port .. "): the cache is not used")
    elseif status == 429 then
        local pause_s = tonumber(content) or 1
        register_at = now_ms() + pause_s * 1000
        log_once("writers have fenced this edge again and again: the cache is not used for seconds")
    elseif status == 403 then
        log_once("MAX_EDGES edges are registered already: the cache is not used")
    end
    return granted ~= nil
end


local next_at = 0  -- the moment (now_ms) of the next renewal


local function run(premature)
    local began = now_ms()
    if premature or exiting() or began < next_at or state:get("resigned") then
        return
    end
    next_at = began + HANG_S * 1000  -- until this renewal has ended
    is_renewing = true
    local ok, held = pcall(renew)
    is_renewing = false
    if not ok then
        log_once("cannot renew the lease: " .. tostring(held))
    end
    if not held and lease.lost_at() and lease.left_ms() == 0 and logged == nil then
        log_once("this edge has lost its cache lease, because no app renews it: every read goes to an app")
    end
    next_at = ok and held and began + constants.RENEWAL_S * 1000 or now_ms() + RETRY_S * 1000
end


-- In init_worker_by_lua: the worker that accepts no clients (listeners.lua) renews the lease, and all workers use it. A
-- worker that is killed leaves its number to its successor.
--
-- The timer is periodic. A timer that its own handler starts again would end for good the first time that Nginx has no
-- free connection to run the handler with, and the edge would never get a lease again.
function _M.start()
    if ngx.worker.id() == 0 then
        ngx.timer.at(0, run)
        ngx.timer.every(RETRY_S, run)
    end
end


return _M
