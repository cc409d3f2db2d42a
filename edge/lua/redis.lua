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
local BREAKER_MS = 1000           -- the time for which Redis is left alone after it did not reply
local MAX_REPLY_BYTES = 2 ^ 26    -- no entry is as large, so a larger length is no reply of the script
local KEEP_MS = 30000             -- an idle connection is kept so long
local MAX_KEPT_CONNECTIONS = 64   -- of each worker

local now_ms, sleep = clock.now_ms, ngx.sleep
local concat = table.concat
local sub, byte, find, match = string.sub, string.byte, string.find, string.match

local _M = {}

-- Tells the app: the edge has tried Redis and got no fill lease. Another reader fills, or Redis timed out.
_M.NO_LEASE = "-"

local server             -- { name, port, greeting }, without a port at a Unix socket; nil: apps read Redis for the edge
local script             -- the text of velikiy/coherence/scripts/read.lua
local evalsha            -- the beginning of each request
local timeout_ms
local breaker_until = 0  -- until then this worker leaves Redis alone
local last_reply_at = 0  -- the moment of the last reply to this worker

_M.reaches_another = false  -- the newest connection of this worker led to another server than the registered one


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


-- Return the user with the password, the name, the port and the database of a URL; no name if it is not supported.
local function parse(url)
    local scheme, login, address = url:match("^(%a+)://([^@/]*)@(.*)$")
    if not scheme then
        scheme, address = url:match("^(%a+)://(.*)$")
        login = ""
    end
    if scheme == "redis" then
        local host, port, database = address:match("^([%w._-]+):?(%d*)/?(%d*)$")
        return login, host and resolver.follow(host), tonumber(port) or 6379, database
    elseif scheme == "unix" then
        local path, options = address:match("^(/[^?]*)%??(.*)$")
        local database = (options or ""):match("^db=(%d+)$")
        local is_supported = path and (options == "" or database)
        return login, is_supported and { addresses = { "unix:" .. percent_decoded(path) } }, nil, database
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
    evalsha = command(5, "EVALSHA", digest)
    local login, name, port, database = parse(url)
    local user, password = (login or ""):match("^([^:]*):(.*)$")
    if not name or (login ~= "" and not user) then
        return
    end
    database = tonumber(database) or 0
    local greeting = {}
    if user == "" then
        greeting[1] = command(0, "AUTH", percent_decoded(password))
    elseif user then
        greeting[1] = command(0, "AUTH", percent_decoded(user), percent_decoded(password))
    end
    if database ~= 0 then
        greeting[#greeting + 1] = command(0, "SELECT", tostring(database))
    end
    greeting[#greeting + 1] = command(0, "INFO", "server", "replication")
    server = { name = name, port = port, greeting = greeting, database = database }
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


-- Return a connection to the server with this id, and whether it was kept from an earlier request; or nil and an error.
-- A pool has connections to one server, because each connection leads to the same server as long as it lives.
local function connect(id)
    local address = server.name.addresses[1]
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
        _M.reaches_another = false
        return socket, true
    end
    local reply
    for _, greeting in ipairs(server.greeting) do
        ok, err = socket:send(greeting)
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
    local found = run .. "." .. sub(data_set, 1, 12) .. "/" .. server.database
    _M.reaches_another = found ~= id
    if found ~= id then
        socket:close()
        return nil, "another server"
    end
    return socket, false
end


-- Run the script for this key in the server with this id. Return its reply and the token that is the fill lease if the
-- reply grants one; or nil and an error.
local function run_script(id, key)
    local begin = evalsha
    while true do
        -- A new token for each attempt: a request whose reply was lost may reach Redis late, and would grant a fill
        -- lease again that a write has taken away meanwhile.
        local token = ids.fresh()
        local arguments = concat({ "$1\r\n1\r\n$", #key, "\r\n", key, "\r\n$0\r\n\r\n$", #token, "\r\n", token,
                                   "\r\n$", #FILL_LEASE_MS, "\r\n", FILL_LEASE_MS, "\r\n" })
        local socket, kept = connect(id)
        if not socket then
            return nil, kept
        end
        local reply
        local ok, err = socket:send({ begin, arguments })
        if ok then
            reply, err = receive(socket)
        end
        if reply ~= nil then
            last_reply_at = now_ms()
        end
        if type(reply) == "table" then
            socket:setkeepalive(KEEP_MS)
            return reply, token
        elseif err and sub(err, 1, 9) == "-NOSCRIPT" and begin == evalsha then
            socket:setkeepalive(KEEP_MS)
            begin = command(5, "EVAL", script)
        else
            socket:close()
            -- A kept connection to a Redis that was restarted is broken; a new one shows the present state.
            if reply ~= nil or not kept or err == "timeout" or sub(err, 1, 1) == "-" then
                return nil, err or "no reply of this script"
            end
        end
    end
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
    local key = server and now_ms() >= breaker_until and key_of(path)
    if not key then
        return nil
    end
    local waited_s = 0
    local id = lease.redis(epoch)
    _M.reaches_another = _M.reaches_another and id ~= nil
    while id do
        local began = now_ms()
        local reply, token_or_error = run_script(id, key)
        -- After the reply: whatever the edge knew before, a write may have skipped a fenced Redis meanwhile.
        if lease.redis(epoch) ~= id then
            return nil
        elseif not reply then
            -- A Redis that has sent other replies meanwhile is busy, and not away. An open breaker would send all reads
            -- of a second to the apps, which carry a tenth of them.
            if sub(token_or_error, 1, 1) ~= "-" and last_reply_at < began then
                breaker_until = now_ms() + BREAKER_MS
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
