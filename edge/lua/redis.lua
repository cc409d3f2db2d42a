-- Tier 2, read by the edge itself, with the rules by which apps read (velikiy/coherence/redis_tier.py). An app fills
-- what is missing, because only an app can probe the lock of a path.
--
-- Gains: a request that enters Python costs as much as ten that do not, and most misses at the edge are hits in Redis.
-- Relies on: the script of the apps, and replies in RESP 2.
-- Remove when: a client for Redis is packaged without further modules of Nginx (lua-nginx-redis brings twenty).

local clock = require "clock"
local ids = require "ids"
local lease = require "lease"
local resolver = require "resolver"
local constants = require "constants"

local POLL_S = 0.002
local FILL_WAIT_S = 0.02          -- a read waits so long for the fill of another reader
local FILL_LEASE_MS = tostring(constants.FILL_LEASE_MS)
local BREAKER_MS = 1000           -- the time for which a server is left alone after it did not reply
local MAX_REPLY_BYTES = 2 ^ 26    -- no entry is as large, so a larger length is no reply of the script
local KEEP_MS = 30000             -- an idle connection is kept so long
local MAX_KEPT_CONNECTIONS = 64   -- of each worker
local SILENT_MS = 900             -- without a reply for so long, Redis is reported (control.lua:account)

local SLOTS = 16384               -- of a cluster

local shared = ngx.shared.state
local now_ms, sleep = clock.now_ms, ngx.sleep
local concat = table.concat
local sub, byte, find, match = string.sub, string.byte, string.find, string.match
local band, bxor, lshift, rshift = bit.band, bit.bxor, bit.lshift, bit.rshift

local _M = {}

-- Tells the app: the edge has tried Redis and got no fill lease. Another reader fills, or Redis timed out.
_M.NO_LEASE = "-"

local greeting           -- the commands that a new connection sends first; nil: apps read Redis for the edge
local database           -- the number of the database
local fixed              -- { name, port } of the server that REDIS_URL names, without a port at a Unix socket; nil: the
                         -- lease contains where the servers are
local script             -- the text of velikiy/coherence/scripts/read.lua
local evalsha            -- the beginning of each request
local timeout_ms

local missed = nil  -- the id of the registered server, if the newest connection of this worker led elsewhere


-- Return whether this worker reaches another server than the one that is registered. After Redis was restarted, a
-- worker may have met the new one before it was registered, and may have needed no connection since.
function _M.reaches_another()
    local epoch = missed and lease.held()
    local map = epoch and lease.redis(epoch)
    return map and find(map, missed, 1, true) ~= nil
end


-- Return a command in RESP. more: the number of further arguments that the caller sends behind it.
local function command(more, ...)
    local arguments = { ... }
    local lines = { "*" .. #arguments + more .. "\r\n" }
    for i, argument in ipairs(arguments) do
        lines[i + 1] = "$" .. #argument .. "\r\n" .. argument .. "\r\n"
    end
    return concat(lines)
end


local function percent_decoded(text)
    return (text:gsub("%%(%x%x)", function(hex) return string.char(tonumber(hex, 16)) end))
end


-- Return { name, port } for host:port.
local function address_of(place)
    local host, port = match(place, "^(%[.*%]):?(%d*)$")
    if not host then
        host, port = match(place, "^([^:]*):?(%d*)$")
    end
    return { name = resolver.follow(host or place), port = tonumber(port) or 6379 }
end


-- Return the user with the password, and the database, as text; nil if the URL is not supported. Set `fixed`.
local function parse(url)
    local scheme, address = url:match("^([%a+]+)://(.*)$")
    if not scheme then
        return nil
    end
    local login, rest = address:match("^([^@/]*)@(.*)$")
    login, rest = login or "", rest or address
    local path, options = rest:match("^([^?#]*)%??(.*)$")
    if scheme == "unix" then
        local number = options == "" and "0" or options:match("^db=(%d+)$")
        if sub(path, 1, 1) ~= "/" or not number then
            return nil
        end
        fixed = { name = { addresses = { "unix:" .. percent_decoded(path) } } }
        return login, number
    end
    local hosts, number = path:match("^([%w._,:%[%]-]+)/?(%d*)$")
    if scheme == "redis" and hosts and options == "" then
        fixed = not find(hosts, ",", 1, true) and address_of(hosts) or nil
        return login, number
    elseif scheme == "redis+sentinel" then
        hosts, number = path:match("^([%w._,:%[%]-]+)/[^/]+/?(%d*)$")
        -- The options of Sentinels are for apps only: an edge gets the address of the server with its lease.
        local others = ("&" .. options):gsub("&sentinel_%w+=[^&]*", "")
        if hosts and (others == "" or others == "&") then
            return login, number
        end
    end
end


-- In init_by_lua. A URL that this client does not support (TLS, options) leaves Redis to the apps.
-- file: the script that apps use as well; timeout_s: the time to connect, and the time for a reply.
function _M.configure(url, file, timeout_s)
    timeout_ms = tonumber(timeout_s) * 1000
    local source = assert(io.open(file))
    script = source:read("*a")
    source:close()
    local digest = ngx.sha1_bin(script):gsub(".", function(char) return string.format("%02x", byte(char)) end)
    evalsha = command(6, "EVALSHA", digest)
    local login, number = parse(url)
    local user, password = (login or ""):match("^([^:]*):(.*)$")
    if not login or (login ~= "" and not user) then
        return
    end
    database = tonumber(number) or 0
    greeting = {}
    if user == "" then
        greeting[1] = command(0, "AUTH", percent_decoded(password))
    elseif user then
        greeting[1] = command(0, "AUTH", percent_decoded(user), percent_decoded(password))
    end
    if database ~= 0 then
        greeting[#greeting + 1] = command(0, "SELECT", tostring(database))
    end
    greeting[#greeting + 1] = command(0, "INFO", "server", "replication")
end


-- Return a reply (RESP 2): a string, a number, an array, or false for null. Or return nil and an error, which begins
-- with "-" if Redis sent it. After any other error the next bytes on this connection are the reply to no request.
local function receive(socket)
    local line, err = socket:receive("*l")
    if not line then
        return nil, err
    end
    local kind, rest = sub(line, 1, 1), sub(line, 2)
    if kind == "+" then
        return rest
    end
    local size = find(rest, "^-?%d+$") and tonumber(rest)
    if not size or size > MAX_REPLY_BYTES then
        return nil, line
    elseif kind == ":" then
        return size
    elseif size < 0 then
        return false
    elseif kind == "$" then
        local text
        text, err = socket:receive(size + 2)
        return text and sub(text, 1, -3), err
    elseif kind == "*" then
        local array = {}
        for i = 1, size do
            array[i], err = receive(socket)
            if array[i] == nil then
                return nil, err
            end
        end
        return array
    end
    return nil, line
end


local crc16 = {}  -- by the byte that is shifted out (CRC-16/XMODEM)
for value = 0, 255 do
    local crc = lshift(value, 8)
    for _ = 1, 8 do
        crc = band(crc, 0x8000) ~= 0 and bxor(lshift(crc, 1), 0x1021) or lshift(crc, 1)
    end
    crc16[value] = band(crc, 0xffff)
end


-- Return the hash slot of a key. If the key has a part in braces, only that part counts.
local function slot_of(key)
    local tag = match(key, "^[^{]*{([^}]+)}") or key
    local crc = 0
    for i = 1, #tag do
        crc = bxor(band(lshift(crc, 8), 0xffff), crc16[bxor(rshift(crc, 8), byte(tag, i))])
    end
    return crc % SLOTS
end


local function new_server(id, place, is_node)
    local address = fixed and not is_node and fixed or place ~= "" and address_of(place)
    return address and {
        id = id, data_set = match(id, "%.(%w*)/") or "", name = address.name, port = address.port,
        failing_since = nil,  -- the moment since which it has sent no reply; nil if the last one had success
        breaker_until = 0,  -- until then this worker leaves the server alone
        last_reply_at = 0,  -- the moment of the last reply to this worker
    }
end


local granted, only, first_slots, owners  -- the map that was parsed last


-- Return the server that holds a key (new_server); nil if the map does not say where it is.
-- map: what the lease contains (velikiy/coherence/shards.py:ShardMap). The edge never follows a cluster's redirection.
local function server_of(map, key)
    if map ~= granted then
        granted, only, first_slots, owners = map, nil, {}, {}
        if match(map, "^[%d,-]+=") then
            local ranges = {}
            for slots, id, place in map:gmatch("([%d,-]+)=([^@;]+)@([^;]+)") do
                local server = new_server(id, place, true)
                for first in slots:gmatch("(%d+)%-?%d*") do
                    ranges[#ranges + 1] = { tonumber(first), server }
                end
            end
            table.sort(ranges, function(one, other) return one[1] < other[1] end)
            for i, range in ipairs(ranges) do
                first_slots[i], owners[i] = range[1], range[2]
            end
        else
            only = new_server(match(map, "^([^@]*)@?(.*)$"))
        end
    end
    if #owners == 0 then
        return only
    end
    local slot, low, high = slot_of(key), 1, #owners
    while low < high do
        local middle = math.ceil((low + high) / 2)
        if first_slots[middle] <= slot then
            low = middle
        else
            high = middle - 1
        end
    end
    return owners[low]
end


-- Return a connection to a server, and whether it was kept from an earlier request; or nil and an error. A pool has
-- connections to one server, because each connection leads to the same server as long as it lives.
local function connect(server)
    local address, id = server.name.addresses[1], server.id
    if not address then
        return nil, "no address"
    end
    local socket = ngx.socket.tcp()
    socket:settimeouts(timeout_ms, timeout_ms, timeout_ms)
    local options = { pool = concat({ address, server.port or "", id }, " "), pool_size = MAX_KEPT_CONNECTIONS }
    local ok, err
    if server.port then
        ok, err = socket:connect(address, server.port, options)
    else
        ok, err = socket:connect(address, options)
    end
    if not ok then
        return nil, err
    elseif socket:getreusedtimes() > 0 then
        missed = nil
        return socket, true
    end
    local reply
    for _, first in ipairs(greeting) do
        ok, err = socket:send(first)
        if ok then
            reply, err = receive(socket)
        end
        if not reply then
            socket:close()
            return nil, "not let in: " .. tostring(err)
        end
    end
    reply = type(reply) == "string" and reply or ""
    local run, data_set = match(reply, "\nrun_id:(%w+)") or "", match(reply, "\nmaster_replid:(%w+)") or ""
    local found = run .. "." .. sub(data_set, 1, 12) .. "/" .. database
    -- A node of a cluster that has restarted, or was demoted, is no mistake in a setting.
    missed = found ~= id and server.name == (fixed or {}).name and id or nil
    if found ~= id then
        socket:close()
        return nil, "another server"
    end
    return socket, false
end


-- Run the script for this key in this server. Return its reply and the token that is the fill lease if the
-- reply grants one; or nil and an error.
local function run_script(server, key)
    local begin, data_set = evalsha, server.data_set
    while true do
        -- A new token for each attempt: a request whose reply was lost may reach Redis late, and would grant a fill
        -- lease again that a write has taken away meanwhile.
        local token = ids.fresh()
        local arguments = concat({ "$1\r\n1\r\n$", #key, "\r\n", key, "\r\n$0\r\n\r\n$", #token, "\r\n", token,
                                   "\r\n$", #FILL_LEASE_MS, "\r\n", FILL_LEASE_MS,
                                   "\r\n$", #data_set, "\r\n", data_set, "\r\n" })
        local socket, kept = connect(server)
        if not socket then
            return nil, kept
        end
        local reply
        local ok, err = socket:send({ begin, arguments })
        if ok then
            reply, err = receive(socket)
        end
        if reply ~= nil then
            server.last_reply_at, server.failing_since = now_ms(), nil
        end
        if type(reply) == "table" then
            socket:setkeepalive(KEEP_MS)
            return reply, token
        elseif err and sub(err, 1, 9) == "-NOSCRIPT" and begin == evalsha then
            socket:setkeepalive(KEEP_MS)
            begin = command(6, "EVAL", script)
        else
            socket:close()
            -- A kept connection to a Redis that was restarted is broken; a new one shows the present state.
            if reply ~= nil or not kept or err == "timeout" or sub(err, 1, 1) == "-" then
                return nil, err or "no reply of this script"
            end
        end
    end
end


-- Return whether Redis does not answer this edge, although the edge may use it. Only reads show it.
function _M.is_silent()
    return lease.redis(lease.epoch()) and now_ms() < (shared:get("redis_silent_until") or 0)
end


local singulars, parsed = {}, nil


-- Return the singular of a resource, which is part of the keys of its rows; nil if the apps have no such resource. The
-- apps send the names with each lease (renewal.lua).
local function singular_of(name)
    local resources = ngx.shared.state:get("resources")
    if resources ~= parsed then
        singulars, parsed = {}, resources
        for plural, singular in (resources or ""):gmatch("(%S+):(%S+)") do
            singulars[plural] = ngx.unescape_uri(singular)
        end
    end
    return singulars[name]
end


-- Return the key of the hash of a path; nil for a path that no resource has, or whose id is too large. Such a path is
-- never stored in Redis.
local function key_of(path)
    local name, rest = path:match("^/([^/]+)/?(.*)$")
    local singular = singular_of(name)
    local max_id = constants.MAX_ID
    if not singular then
        return nil
    elseif rest == "" then
        return "all_" .. name
    elseif rest == "count" then
        return "count_" .. name
    elseif #rest >= #max_id and (#rest > #max_id or rest > max_id) then
        return nil
    end
    return singular .. ":" .. rest
end


-- Return whether a value is an entry, by the rules of velikiy/coherence/entry.py.
local function is_entry(text)
    if type(text) ~= "string" or byte(text, -1) == 10 then
        return false
    end
    local status, etag = match(text, "^([24]0[04])\t([!-~]*)\t[ -~]*\t[ -~]*\n")
    return (status == "200" or status == "404") and (etag == "" or find(etag, '^"[!#-~]+"$') ~= nil)
end


-- Return an entry and the seconds for which Redis keeps it. Or return nil, nil and the fill lease for the app: a token,
-- NO_LEASE, or nil if Redis was not tried or failed in another way than a timeout.
function _M.read(epoch, path)
    local key = greeting and key_of(path)
    if not key then
        return nil
    end
    local waited_s = 0
    local map = lease.redis(epoch)
    local server = map and server_of(map, key)
    if server and now_ms() < server.breaker_until then
        return nil
    end
    while server do
        local began = now_ms()
        local reply, token_or_error = run_script(server, key)
        -- After the reply: whatever the edge knew before, a write may have skipped a fenced Redis meanwhile.
        if lease.redis(epoch) ~= map then
            return nil
        elseif not reply then
            -- A server that has sent other replies meanwhile is busy, and not away. An open breaker would send all its
            -- reads of a second to the apps, which carry a tenth of them.
            if sub(token_or_error, 1, 1) ~= "-" and server.last_reply_at < began then
                server.breaker_until = now_ms() + BREAKER_MS
                server.failing_since = server.failing_since or began
                if began - server.failing_since >= SILENT_MS then
                    shared:set("redis_silent_until", now_ms() + 2 * SILENT_MS)
                end
            end
            return nil, nil, token_or_error == "timeout" and _M.NO_LEASE or nil  -- the app need not wait as long again
        elseif reply[1] == 1 then
            if not is_entry(reply[2]) then
                return nil  -- another program's value under our key; the app removes it
            end
            return reply[2], math.max(0, math.floor(reply[3] / 1000))
        elseif reply[1] == 2 then
            return nil, nil, token_or_error
        elseif waited_s >= FILL_WAIT_S then
            return nil, nil, _M.NO_LEASE
        end
        sleep(POLL_S)
        waited_s = waited_s + POLL_S
    end
    return nil
end


return _M
