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

local _M = {}

local apps = {}   -- as configured: { name, port }, without a port at a Unix socket
local peers = {}  -- the present addresses: { address, port, down }
local turn = 0


-- Update the peers. A peer that stays keeps its state.
local function update_peers()
    local old, new = {}, {}
    for _, peer in ipairs(peers) do
        old[peer.address .. ":" .. (peer.port or "")] = peer
    end
    for _, app in ipairs(apps) do
        for _, address in ipairs(app.name.addresses) do
            new[#new + 1] = old[address .. ":" .. (app.port or "")]
                or { address = address, port = app.port, down = false }
        end
    end
    peers = new
end


-- In init_by_lua, where an error stops the start.
function _M.configure(list)
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


-- Return whether an instance answers and stays. A write is sent once, so it cannot find out by itself that an instance
-- is gone: if one of two were gone, every second write would fail. An instance that is about to stop answers 503 to
-- this header (velikiy/http/health.py).
function _M.is_alive(peer)
    local socket = ngx.socket.tcp()
    socket:settimeouts(CHECK_TIMEOUT_MS, CHECK_TIMEOUT_MS, CHECK_TIMEOUT_MS)
    local line
    if _M.connect(socket, peer) and socket:send("GET /livez HTTP/1.0\r\nEdge-Check: 1\r\n\r\n") then
        line = socket:receiveany(64)  -- once: an app that sends byte by byte must not keep this timer
    end
    socket:close()
    return line ~= nil and line:find(" 200 ", 1, true) ~= nil
end


local function check_peers(premature)
    if premature or #peers < 2 then  -- a single instance gets every request in any case
        return
    end
    local checks = {}
    for i, peer in ipairs(peers) do
        checks[i] = { peer = peer, thread = ngx.thread.spawn(_M.is_alive, peer) }
    end
    for _, check in ipairs(checks) do
        local _, alive = ngx.thread.wait(check.thread)
        check.peer.down = not alive
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


-- In balancer_by_lua, once for each try.
function _M.balance()
    local ctx = ngx.ctx
    local failed = ctx.peer
    if failed then
        failed.down = true  -- until the next check
    elseif ngx.req.get_method() == "GET" or ngx.req.get_method() == "HEAD" then
        balancer.set_more_tries(1)
    end
    local peer = _M.choose(failed)
    if not peer then
        return ngx.exit(ngx.HTTP_BAD_GATEWAY)
    end
    ctx.peer = peer
    balancer.set_current_peer(peer.address, peer.port)
end


return _M
