-- Chooses the app instance for a request, among the addresses behind EDGE_APPS, which are followed as they change.
--
-- Gains: keepalive, retries and changing addresses at once. Nginx resolves the names of an upstream only at its start,
-- and with a variable in proxy_pass it gives up keepalive and retries.
-- Relies on: balancer_by_lua and resolver.lua.
-- Remove when: Debian's Nginx has `server ... resolve` in an upstream (1.27.3), and health checks.

local balancer = require "ngx.balancer"
local resolver = require "resolver"

local CHECK_INTERVAL_S = 1
local CHECK_TIMEOUT_MS = 500

-- The first try of a read is short where there is another app, because an app or a worker may be stopped or cut off.
-- Under overload every first try would be too short, and each read would be sent twice: so only as many tries may fail
-- as a tenth of the reads.
local SHORT_TRY_S = 0.3
local SHARE_OF_SHORT_TRIES = 0.1
local MAX_SHORT_TRIES = 10  -- at once, of each worker
local PATIENT_S = 5         -- after a 503: PostgreSQL is away, and a second try would find the same
local MARGIN_S = 3          -- for an app that is busy, and where no stored response can be sent instead

local _M = {}

local apps = {}   -- as configured: { name, port }, without a port at a Unix socket
local peers = {}  -- the present addresses: { address, port, down, hangs }
local turn = 0
local database_timeout_s
local short_tries = MAX_SHORT_TRIES  -- that are left
local patient_until = 0  -- (ngx.now)


-- Update the peers. A peer that stays keeps its state.
local function update_peers()
    local old, new = {}, {}
    for _, peer in ipairs(peers) do
        old[peer.address .. ":" .. (peer.port or "")] = peer
    end
    for _, app in ipairs(apps) do
        for _, address in ipairs(app.name.addresses) do
            new[#new + 1] = old[address .. ":" .. (app.port or "")]
                or { address = address, port = app.port, down = false, hangs = false }
        end
    end
    peers = new
end


-- In init_by_lua, where an error stops the start. timeout: DATABASE_TIMEOUT, in which an app answers a read.
function _M.configure(list, timeout)
    database_timeout_s = tonumber(timeout)
    for item in list:gmatch("[^,%s]+") do
        local host, port = item:match("^(.+):(%d+)$")
        if item:find("^unix:.") then
            apps[#apps + 1] = { name = { addresses = { item } } }
        elseif host then
            apps[#apps + 1] = { name = resolver.follow(host), port = tonumber(port) }
        else
            error("EDGE_APPS='" .. list .. "' is not allowed: it must be host:port or unix:path, several separated by "
                  .. "commas", 0)
        end
    end
end


-- Connect to an app.
function _M.connect(socket, peer)
    if peer.port then
        return socket:connect(peer.address, peer.port)
    end
    return socket:connect(peer.address)
end


-- Return whether an instance answers and stays, and whether it answers. A write is sent once, so it cannot find out by
-- itself that an instance is gone: if one of two were gone, every second write would fail. An instance that is about to
-- stop answers 503 to this header (velikiy/http/health.py).
function _M.is_alive(peer)
    local socket = ngx.socket.tcp()
    socket:settimeouts(CHECK_TIMEOUT_MS, CHECK_TIMEOUT_MS, CHECK_TIMEOUT_MS)
    local line
    if _M.connect(socket, peer) and socket:send("GET /livez HTTP/1.0\r\nEdge-Check: 1\r\n\r\n") then
        line = socket:receiveany(64)  -- once: an app that sends byte by byte must not keep this timer
    end
    socket:close()
    return line ~= nil and line:find(" 200 ", 1, true) ~= nil, line ~= nil
end


local function check(peer)
    local alive, answers = _M.is_alive(peer)
    peer.down, peer.hangs = not alive, not answers
end


local function check_peers(premature)
    if premature or #peers < 2 then  -- a single instance gets every request in any case
        return
    end
    for _, peer in ipairs(peers) do
        ngx.thread.spawn(check, peer)
    end
end


-- Leave a peer alone until a check has ended, which begins now.
local function doubt(peer)
    if not peer.down and #peers > 1 then
        peer.down = true
        ngx.timer.at(0, function(premature)
            if not premature then
                check(peer)
            end
        end)
    end
end


-- In init_worker_by_lua: each worker follows the apps for itself.
function _M.start()
    resolver.start(update_peers)
    ngx.timer.every(CHECK_INTERVAL_S, check_peers)
end


-- Return how many peers may be chosen and how many are down, for the metrics.
function _M.count()
    local down = 0
    for _, peer in ipairs(peers) do
        down = down + (peer.down and 1 or 0)
    end
    return #peers - down, down
end


-- Return all peers.
function _M.all()
    return peers
end


-- Return the next peer in turn. A peer that is down, or failed in this request, is chosen only if there is no other.
function _M.choose(failed)
    local any
    for i = 1, #peers do
        local peer = peers[(turn + i - 1) % #peers + 1]
        if peer ~= failed then
            any = any or peer
            if not peer.down then
                turn = turn + i
                return peer
            end
        end
    end
    turn = turn + 1
    return any or failed
end


-- An app has answered 503.
function _M.be_patient()
    patient_until = ngx.now() + PATIENT_S
end


-- Return the seconds that this try of a read may take.
-- tries: the number of the try; has_fallback: a stored response can be sent instead, with the mark STALE.
local function time_of(peer, tries, has_fallback, ctx)
    if tries == 1 then
        short_tries = math.min(MAX_SHORT_TRIES, short_tries + SHARE_OF_SHORT_TRIES)
        if #peers > 1 and (peer.hangs or short_tries >= 1 and ngx.now() > patient_until) then
            return SHORT_TRY_S
        end
        ctx.was_long = true
    elseif has_fallback and (ctx.was_long or peer.hangs) then
        return SHORT_TRY_S
    end
    return database_timeout_s + (has_fallback and 0 or peer.hangs and 0 or MARGIN_S)
end


-- End the request without a further try. Nginx makes 500 of the status here: edge/conf/failed.conf and origin.lua
-- restore it.
local function give_up(ctx, status)
    ctx.gave_up = status
    return ngx.exit(status)
end


-- In balancer_by_lua, once for each try. A read is tried at most three times, and twice if it takes too long: the
-- second connection may lead to the same stopped worker, whose end shows while the read waits. $fallback is "none" or
-- "stale" where the tries of a read are short, else empty.
function _M.balance()
    local ctx, fallback = ngx.ctx, ngx.var.fallback
    local failed, tries = ctx.peer, (ctx.tries or 0) + 1
    local is_read = ngx.req.get_method() == "GET" or ngx.req.get_method() == "HEAD"
    local is_short = is_read and fallback and fallback ~= ""
    ctx.tries = tries
    if failed then
        doubt(failed)
        local _, status = balancer.get_last_failure()
        if is_short and status == ngx.HTTP_GATEWAY_TIMEOUT then
            if tries > 2 then
                return give_up(ctx, ngx.HTTP_GATEWAY_TIMEOUT)
            end
            short_tries = failed.hangs and short_tries or math.max(0, short_tries - 1)
        end
    elseif is_read then
        balancer.set_more_tries(is_short and 2 or 1)
    end
    local peer = _M.choose(failed)
    if not peer then
        return give_up(ctx, ngx.HTTP_BAD_GATEWAY)
    end
    ctx.peer = peer
    if is_short then
        local seconds = time_of(peer, tries, fallback == "stale", ctx)
        balancer.set_timeouts(math.min(seconds, 1), nil, seconds)
    end
    balancer.set_current_peer(peer.address, peer.port)
end


return _M
