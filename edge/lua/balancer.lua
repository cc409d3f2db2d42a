-- Which app instance answers a request: the addresses behind EDGE_APPS, followed as they change.
--
-- The names of an upstream Nginx resolves once, at its start; with a variable in proxy_pass it asks again, but gives up
-- keepalive and retries. A balancer has all three.

local balancer = require "ngx.balancer"
local resolver = require "resolver"

local CHECK = 1    -- seconds between two questions to each instance: do you live?
local PATIENCE = 500  -- milliseconds for its answer

local _M = {}

local apps = {}   -- as configured: { name, port }
local peers = {}  -- what their names stand for now: { address, port, down }
local turn = 0


-- Keeps the peers that stay, with what is known of them.
local function gather()
    local old, new = {}, {}
    for _, peer in ipairs(peers) do
        old[peer.address .. ":" .. peer.port] = peer
    end
    for _, app in ipairs(apps) do
        for _, address in ipairs(app.name.addresses) do
            new[#new + 1] = old[address .. ":" .. app.port]
                or { address = address, port = app.port, down = false }
        end
    end
    peers = new
end


-- In init_by_lua, where an error stops the start.
function _M.configure(list)
    for item in list:gmatch("[^,%s]+") do
        local host, port = item:match("^(.+):(%d+)$")
        if not host then
            error("EDGE_APPS='" .. list .. "' is not allowed: it must be host:port, several separated by commas", 0)
        end
        apps[#apps + 1] = { name = resolver.follow(host), port = tonumber(port) }
    end
end


-- Writes are sent once, so they cannot find out for themselves that an instance is gone: of two, one of which is
-- gone, it would cost every second write.
local function lives(peer)
    local socket = ngx.socket.tcp()
    socket:settimeouts(PATIENCE, PATIENCE, PATIENCE)
    local line
    if socket:connect(peer.address, peer.port) and socket:send("GET /livez HTTP/1.0\r\n\r\n") then
        line = socket:receiveany(64)  -- once: an app that sends byte by byte must not keep this timer
    end
    socket:close()
    return line ~= nil and line:find(" 200 ", 1, true) ~= nil
end


local function check(premature)
    if premature or #peers < 2 then  -- an only one is asked in any case
        return
    end
    local questions = {}
    for i, peer in ipairs(peers) do
        questions[i] = { peer, ngx.thread.spawn(lives, peer) }
    end
    for _, question in ipairs(questions) do
        local _, alive = ngx.thread.wait(question[2])
        question[1].down = not alive
    end
end


-- In init_worker_by_lua: each worker follows for itself.
function _M.follow()
    resolver.start(gather)
    ngx.timer.every(CHECK, check)
end


-- By turns; one that is down, or failed this very request, only where there is no other.
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
