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
local on_change


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


-- In init_by_lua. Return a table whose `addresses` are always the present ones.
function _M.follow(host)
    if not nameservers then
        read_files()
    end
    local fixed = host:match("^%d+%.%d+%.%d+%.%d+$") or host:match("^%[.*%]$") or hosts[host]
    if fixed then
        return { host = host, addresses = { fixed } }
    end
    local name = { host = host, addresses = {} }
    followed[#followed + 1] = name
    local addresses = {}
    for known_host, address in (os.getenv("EDGE_KNOWN_ADDRESSES") or ""):gmatch("(%S+) (%S+)") do
        if known_host == host then
            addresses[#addresses + 1] = address
        end
    end
    known:add(host, table.concat(addresses, " "))  -- after a reload it is there already, and newer
    return name
end


-- Look a name up. While the DNS does not answer, the last addresses stay.
local function look_up(name)
    local dns, err = dns_resolver:new { nameservers = nameservers, timeout = QUERY_TIMEOUT_MS, retrans = 2 }
    local answers
    if dns then
        answers, err = dns:query(name.host, { qtype = dns.TYPE_A })
    end
    if not answers or answers.errcode then
        if not name.lost then
            ngx.log(ngx.ALERT, "cannot resolve ", name.host, ": ", err or answers.errstr, "; going on with ",
                    #name.addresses, " known addresses")
        end
        name.lost = true
        return
    end
    name.lost = false
    local addresses = {}
    for _, answer in ipairs(answers) do
        if answer.address then
            addresses[#addresses + 1] = answer.address
        end
    end
    name.addresses = addresses
    known:set(name.host, table.concat(addresses, " "))
end


local function refresh(premature)
    if premature then
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
        ngx.timer.every(INTERVAL_S, refresh)
    end
end


return _M
