-- What host names stand for, followed as it changes: Nginx itself resolves once, at its start, and then asks a
-- container that is gone.

local dns_client = require "nginx.dns.resolver"

local LOOK_UP = 2  -- seconds between two look-ups

local known = ngx.shared.names

local _M = {}

local servers    -- of the DNS
local files = {} -- /etc/hosts
local followed = {}
local tell


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
    servers = {}
    for _, line in ipairs(lines_of("/etc/resolv.conf")) do
        local address = line:match("^%s*nameserver%s+(%S+)")
        if address then
            servers[#servers + 1] = address:find(":", 1, true) and "[" .. address .. "]" or address
        end
    end
    for _, line in ipairs(lines_of("/etc/hosts")) do
        local address, names = line:match("^%s*(%d+%.%d+%.%d+%.%d+)%s+(.*)$")
        for name in (names or ""):gmatch("%S+") do
            files[name] = files[name] or address
        end
    end
end


-- In init_by_lua. Returns a table whose `addresses` are those of the moment.
function _M.follow(host)
    if not servers then
        read_files()
    end
    local fixed = host:match("^%d+%.%d+%.%d+%.%d+$") or host:match("^%[.*%]$") or files[host]
    if fixed then
        return { host = host, addresses = { fixed } }
    end
    local name = { host = host, addresses = {} }
    followed[#followed + 1] = name
    return name
end


-- What was found last stays when the DNS does not answer.
local function look_up(name)
    local dns, err = dns_client:new { nameservers = servers, timeout = 500, retrans = 2 }
    local answers
    if dns then
        answers, err = dns:query(name.host, { qtype = dns.TYPE_A })
    end
    if not answers or answers.errcode then
        if not name.lost then
            ngx.log(ngx.WARN, "cannot resolve ", name.host, ": ", err or answers.errstr, "; going on with ",
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
    tell()
end


-- In init_worker_by_lua: each worker follows for itself, and `whom` is called after each round.
function _M.start(whom)
    tell = whom
    -- After a reload, or as the successor of a worker that was killed: with what was known, and not with nobody.
    for _, name in ipairs(followed) do
        for address in (known:get(name.host) or ""):gmatch("%S+") do
            name.addresses[#name.addresses + 1] = address
        end
    end
    tell()
    if #followed > 0 then
        ngx.timer.at(0, refresh)
        ngx.timer.every(LOOK_UP, refresh)
    end
end


return _M
