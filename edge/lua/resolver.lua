-- The addresses of host names, followed as they change.
--
-- Gains: Nginx resolves a name once, at its start, and then sends requests to a container that is gone.
-- Relies on: lua-nginx-dns, /etc/resolv.conf and /etc/hosts, which are read once.
-- Remove when: Debian's Nginx has `server ... resolve` in an upstream (1.27.3), and Redis is not read from Lua.

local dns_resolver = require "nginx.dns.resolver"

local INTERVAL_S = 2  -- between two look-ups of a name
local QUERY_TIMEOUT_MS = 500

local known = ngx.shared.addresses

local _M = {}

local nameservers
local hosts = {}  -- address by name, from /etc/hosts
local followed = {}
local by_host = {}  -- what `follow` has returned, by host
local on_change     -- nil until the worker has started


local function lines_of(name)
    local file = io.open(name)
    local lines = {}
    if file then
        for line in file:lines() do
            lines[#lines + 1] = line:match("^[^#]*")
        end
        file:close()
    end
    return lines
end


local function read_files()
    nameservers = {}
    for _, line in ipairs(lines_of("/etc/resolv.conf")) do
        local address = line:match("^%s*nameserver%s+(%S+)")
        if address then
            nameservers[#nameservers + 1] = address:find(":", 1, true) and "[" .. address .. "]" or address
        end
    end
    for _, line in ipairs(lines_of("/etc/hosts")) do
        local address, names = line:match("^%s*(%d+%.%d+%.%d+%.%d+)%s+(.*)$")
        for name in (names or ""):gmatch("%S+") do
            hosts[name] = hosts[name] or address
        end
    end
end


-- Look a name up. While the DNS does not answer, the last addresses stay. They also stay when the name has no address
-- left: an orchestrator removes every instance that is not ready, all of them when PostgreSQL is away, and the
-- instances may still answer.
local function look_up(name)
    local dns, err = dns_resolver:new { nameservers = nameservers, timeout = QUERY_TIMEOUT_MS, retrans = 2 }
    local answers
    if dns then
        answers, err = dns:query(name.host, { qtype = dns.TYPE_A })
    end
    local addresses = {}
    for _, answer in ipairs(answers or {}) do
        if answer.address then
            addresses[#addresses + 1] = answer.address
        end
    end
    if #addresses == 0 then
        if not name.lost then
            ngx.log(ngx.EMERG, "cannot resolve ", name.host, ": ", err or answers.errstr or "no address",
                    "; going on with ", #name.addresses, " known addresses")
        end
        name.lost = true
        return
    end
    name.lost = false
    name.addresses = addresses
    known:set(name.host, table.concat(addresses, " "))
end


-- Return a table whose `addresses` are always the present ones: in init_by_lua, or later for a host that has become
-- known, such as a node of a cluster.
function _M.follow(host)
    local name = by_host[host]
    if name then
        return name
    end
    if not nameservers then
        read_files()
    end
    local fixed = host:match("^%d+%.%d+%.%d+%.%d+$") or host:match("^%[.*%]$") or hosts[host]
    name = { host = host, addresses = { fixed } }
    by_host[host] = name
    if not fixed then
        local addresses = {}
        for known_host, address in (os.getenv("EDGE_KNOWN_ADDRESSES") or ""):gmatch("(%S+) (%S+)") do
            if known_host == host then
                addresses[#addresses + 1] = address
            end
        end
        known:add(host, table.concat(addresses, " "))  -- after a reload it is there already, and newer
        followed[#followed + 1] = name
        if on_change then
            ngx.timer.at(0, function() look_up(name) end)
        end
    end
    return name
end


local function refresh(premature)
    if premature or #followed == 0 then
        return
    end
    for _, name in ipairs(followed) do
        look_up(name)
    end
    on_change()
end


-- In init_worker_by_lua: each worker follows the names for itself and calls `callback` after each round.
function _M.start(callback)
    on_change = callback
    -- After a reload, and in the successor of a worker that was killed, the last addresses are known already.
    for _, name in ipairs(followed) do
        for address in (known:get(name.host) or ""):gmatch("%S+") do
            name.addresses[#name.addresses + 1] = address
        end
    end
    on_change()
    if #followed > 0 then
        ngx.timer.at(0, refresh)
    end
    ngx.timer.every(INTERVAL_S, refresh)
end


return _M
