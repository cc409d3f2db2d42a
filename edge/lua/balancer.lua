-- Chooses the app instance for a request, among the addresses behind EDGE_APPS, which are followed as they change.
--
-- Gains: keepalive, retries and changing addresses at once. Nginx resolves the names of an upstream only at its start,
-- and with a variable in proxy_pass it gives up keepalive and retries.
-- Relies on: balancer_by_lua and resolver.lua.
-- Remove when: Debian's Nginx has `server ... resolve` in an upstream (1.27.3), and health checks.

local clock = require "clock"
local balancer = require "ngx.balancer"
local resolver = require "resolver"

local CHECK_INTERVAL_MS = 1000
local CHECK_AGAIN_S = 0.25      -- between two checks of an app that is down
local CHECK_TIMEOUT_MS = 500
local SILENT_MS = 1000          -- an app that is down for so long is reported (control.lua:account)

-- The first try of a read is short where there is another app, because an app or a worker may be stopped or cut off.
-- Under overload every first try would be too short, and each read would be sent twice: so only a few are short at the
-- same time, and only as many may fail as a tenth of the reads.
local SHORT_TRY_S = 0.3
local SHARE_OF_SHORT_TRIES = 0.1
local MAX_SHORT_TRIES = 16  -- at once, of each worker
local PATIENT_S = 1         -- after a 503: PostgreSQL is away, or the apps are overloaded. A second try does not help
local MAX_TRIES = 3
local NO_PEER = -3          -- NGX_BUSY: Nginx answers 502. After any other code it answers 500
local MARGIN_S = 3          -- for an app that is busy, and where no stored response can be sent instead

local _M = {}

local apps = {}   -- as configured: { name, port }, without a port at a Unix socket
local peers = {}  -- the present addresses: { address, port, down, hangs, lacks_postgres, is_checked, ... }
local turn = 0
local database_timeout_s
local short_tries = MAX_SHORT_TRIES  -- that may begin now
local patient_until = 0  -- (clock.now_ms)


-- Update the peers. A peer that stays keeps its state.
local function update_peers()
    local old, new = {}, {}
    for _, peer in ipairs(peers) do
        old[peer.address .. ":" .. (peer.port or "")] = peer
    end
    for _, app in ipairs(apps) do
        for _, address in ipairs(app.name.addresses) do
            new[#new + 1] = old[address .. ":" .. (app.port or "")]
                or { address = address, port = app.port, down = false, hangs = false, lacks_postgres = false }
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


-- Return whether an instance answers and stays, whether it answers at all, and whether PostgreSQL answers it. A write
-- is sent once, so it cannot find out by itself that an instance is gone: if one of two were gone, every second write
-- would fail. To this header, an instance that is about to stop answers 503, and one without PostgreSQL 424
-- (velikiy/http/health.py).
function _M.examine(peer)
    local socket = ngx.socket.tcp()
    socket:settimeouts(CHECK_TIMEOUT_MS, CHECK_TIMEOUT_MS, CHECK_TIMEOUT_MS)
    local line
    if _M.connect(socket, peer) and socket:send("GET /livez HTTP/1.0\r\nEdge-Check: 1\r\n\r\n") then
        line = socket:receiveany(64)  -- once: an app that sends byte by byte must not keep this timer
    end
    socket:close()
    local status = line and line:match("^HTTP/1%.%d (%d%d%d) ")
    return status == "200" or status == "424", status ~= nil, status ~= "424"
end


local function set_down(peer, down)
    peer.down_since = down and (peer.down_since or clock.now_ms()) or nil
    peer.down = down
end


local function check(peer)
    if peer.is_checked then
        return
    end
    peer.is_checked = true
    local ok, alive, answers, has_postgres = pcall(_M.examine, peer)
    peer.is_checked = false
    if ok then
        set_down(peer, not alive)
        peer.hangs, peer.lacks_postgres = not answers, not has_postgres
        peer.checked_at = clock.now_ms()
    end
end


local function check_peers(premature)
    if premature or #peers < 2 then  -- a single instance gets every request in any case
        return
    end
    for _, peer in ipairs(peers) do
        if peer.down or clock.now_ms() - (peer.checked_at or 0) >= CHECK_INTERVAL_MS then
            ngx.thread.spawn(check, peer)
        end
    end
end


-- Leave a peer alone until a check has ended, which begins now.
local function set_down_until_checked(peer)
    if not peer.down and #peers > 1 then
        set_down(peer, true)
        ngx.timer.at(0, function(premature)
            if not premature then
                check(peer)
            end
        end)
    end
end


local function name_of(peer)
    return peer.port and peer.address .. ":" .. peer.port or peer.address
end


-- Note that an app has answered a read with 503 because PostgreSQL does not answer it, and return whether another app
-- may reach PostgreSQL, which has not been tried. addresses: those of all tries, as in $upstream_addr; the last has
-- answered.
function _M.note_without_postgres(addresses)
    local tried, last, other = {}, nil, false
    for name in addresses:gmatch("[^ ,]+") do
        tried[name], last = true, name
    end
    for _, peer in ipairs(peers) do
        local name = name_of(peer)
        peer.lacks_postgres = peer.lacks_postgres or name == last
        other = other or not tried[name] and not peer.down and not peer.lacks_postgres
    end
    return other
end


local function named(name)
    for _, peer in ipairs(peers) do
        if name_of(peer) == name then
            return peer
        end
    end
end


-- Return the addresses of the apps that have not answered this worker for some time.
function _M.silent()
    local found = {}
    for _, peer in ipairs(peers) do
        if peer.down_since and peer.hangs and clock.now_ms() - peer.down_since > SILENT_MS then
            found[#found + 1] = name_of(peer)
        end
    end
    return found
end


-- In init_worker_by_lua: each worker follows the apps for itself.
function _M.start()
    resolver.start(update_peers)
    ngx.timer.every(CHECK_AGAIN_S, check_peers)
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


-- Return the next peer in turn. A peer that lacks PostgreSQL, is down, or failed in this request is chosen only if
-- there is no other, in this order.
function _M.choose(failed)
    local second, any
    for i = 1, #peers do
        local peer = peers[(turn + i - 1) % #peers + 1]
        if peer ~= failed then
            any = any or peer
            if not peer.down and not peer.lacks_postgres then
                turn = turn + i
                return peer
            elseif not peer.down then
                second = second or peer
            end
        end
    end
    turn = turn + 1
    return second or any or failed
end


-- An app has answered a read with 503, or this edge has, because the apps are overloaded.
function _M.be_patient()
    patient_until = clock.now_ms() + PATIENT_S * 1000
end


-- Return whether the first try of a read, at this peer, is short. If so it counts, unless the peer is known to hang.
local function is_first_try_short(peer, ctx)
    short_tries = math.min(MAX_SHORT_TRIES, short_tries + SHARE_OF_SHORT_TRIES)
    if #peers < 2 or peer.hangs then
        return #peers > 1
    elseif short_tries < 1 or clock.now_ms() <= patient_until then
        return false
    end
    short_tries, ctx.is_short = short_tries - 1, true
    return true
end


-- Return the seconds that this try of a read may take.
-- tries: the number of the try; fallback: "stale" if a stored response can be sent instead, with the mark STALE, and
-- the tries at two apps together take DATABASE_TIMEOUT; "answered" if only PostgreSQL can be in the way, and it answers
-- soon or not at all; "file" if the response comes in many parts, each of which may take so long; else "none".
local function timeout_of(peer, tries, fallback, ctx)
    local has_others, has_fallback = #peers > 1, fallback == "stale"
    local rest_s = math.max(SHORT_TRY_S, database_timeout_s - SHORT_TRY_S)
    if fallback == "file" then
        return database_timeout_s + MARGIN_S
    elseif fallback == "answered" or tries == 1 and is_first_try_short(peer, ctx) then
        return SHORT_TRY_S
    elseif tries > 1 and has_fallback then
        return (ctx.was_long or peer.hangs) and SHORT_TRY_S or rest_s
    elseif tries > 1 then
        return database_timeout_s + (peer.hangs and 0 or MARGIN_S)
    end
    ctx.was_long = true
    if not has_others then
        return database_timeout_s + ((has_fallback or peer.hangs) and 0 or MARGIN_S)
    end
    -- Without a stored response the app has time to say that PostgreSQL does not answer.
    return has_fallback and rest_s or database_timeout_s + SHORT_TRY_S
end


-- In header_filter_by_lua: a short try that did not fail counts no more. ctx: of the request that has passed `balance`.
function _M.note_answer(ctx)
    if ctx.is_short then
        short_tries, ctx.is_short = math.min(MAX_SHORT_TRIES, short_tries + 1), nil
    end
end


-- End the request with 504. Nginx makes 500 of the status here: edge/conf/failed.conf and app_response.lua restore it.
local function give_up(ctx)
    ctx.gave_up = true
    return ngx.exit(ngx.HTTP_GATEWAY_TIMEOUT)
end


-- In balancer_by_lua, once for each try. A write is tried again only if no byte of it was sent, because the app could
-- not be reached. A read is tried at most three times, and twice if it takes too long: the second connection may lead
-- to the same stopped worker, whose end shows while the read waits. $fallback is as for `timeout_of` where the time of
-- each try is bounded here, else empty. $avoided: the address of the app that a second request for the same read leaves
-- out.
function _M.balance()
    local ctx, fallback, avoided = ngx.ctx, ngx.var.fallback, ngx.var.avoided
    local failed, tries = ctx.peer, (ctx.tries or 0) + 1
    local is_read = ngx.req.get_method() == "GET" or ngx.req.get_method() == "HEAD"
    local is_bounded = is_read and fallback and fallback ~= ""
    ctx.tries = tries
    if failed then
        set_down_until_checked(failed)
        local _, status = balancer.get_last_failure()
        -- A number for each try. A try on a kept connection that was broken does not count for Nginx, so the number of
        -- tries bounds nothing.
        if not is_read and ngx.var.upstream_bytes_sent:find("[1-9]") or tries > MAX_TRIES then
            return ngx.exit(NO_PEER)
        elseif is_bounded and status == ngx.HTTP_GATEWAY_TIMEOUT then
            if tries > 2 or fallback == "answered" then
                return give_up(ctx)
            end
            ctx.is_short = nil
        else  -- the app did not let the read wait
            _M.note_answer(ctx)
            ctx.was_long = nil
        end
    else
        balancer.set_more_tries(is_bounded and 2 or 1)
    end
    local peer = _M.choose(failed or avoided and avoided ~= "" and named(avoided))
    if not peer then
        return ngx.exit(NO_PEER)
    end
    ctx.peer = peer
    if is_bounded then
        local seconds = timeout_of(peer, tries, fallback, ctx)
        balancer.set_timeouts(math.min(seconds, 1), nil, seconds)
    end
    balancer.set_current_peer(peer.address, peer.port)
end


return _M
