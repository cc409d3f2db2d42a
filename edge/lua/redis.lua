-- Tier 2, read without entering Python. The rules are those of velikiy/coherence/redis_tier.py, by which apps read;
-- what is missing is filled by an app, which alone can ask PostgreSQL whether a writer is in flight.
--
-- Debian's client for Redis (lua-nginx-redis) comes with twenty modules of Nginx; needed of it is what `reply` does.

local lease = require "lease"
local resolver = require "resolver"

local POLL = 0.002      -- seconds
local PATIENCE = 0.02   -- seconds that somebody else's fill is waited for
local LEASE = "3000"    -- milliseconds after which a lease to fill is void; only speed depends on it
local REST = 1000       -- milliseconds that Redis is left alone after it did not answer
local LARGEST = 2 ^ 26  -- bytes; no entry is as large, and what says that it is speaks of something else
local IDLE = 30000      -- milliseconds that a connection is kept
local CONNECTIONS = 64  -- that each worker keeps

local now, sleep = lease.now, ngx.sleep
local concat = table.concat
local sub, byte, find, match = string.sub, string.byte, string.find, string.match

local _M = {}

_M.NO_LEASE = "-"  -- for the app: Redis was asked; somebody else fills it, or it did not answer in time

local server        -- { name, port, greeting }; nil: apps ask for us
local script        -- read.lua
local ask, digest   -- the beginning of each question
local timeout
local resting = 0   -- until when this worker leaves Redis alone
local heard = 0     -- when it answered this worker last


-- A command with so many more words to come; or all of it.
local function command(more, ...)
    local words = { ... }
    local lines = { "*" .. #words + more .. "\r\n" }
    for i, word in ipairs(words) do
        lines[i + 1] = "$" .. #word .. "\r\n" .. word .. "\r\n"
    end
    return concat(lines)
end


local function decoded(text)
    return (text:gsub("%%(%x%x)", function(hex) return string.char(tonumber(hex, 16)) end))
end


-- In init_by_lua. An address that cannot be read here (TLS, a socket, options) is left to the apps.
-- file: the script that apps use as well; seconds: that Redis has to connect, and to answer.
function _M.configure(url, file, seconds)
    timeout = tonumber(seconds) * 1000
    local source = assert(io.open(file))
    script = source:read("*a")
    source:close()
    digest = ngx.sha1_bin(script):gsub(".", function(char) return string.format("%02x", byte(char)) end)
    ask = command(5, "EVALSHA", digest)
    local login, host, port, database = url:match("^redis://([^@/]*)@([%w._-]+):?(%d*)/?(%d*)$")
    if not host then
        login, host, port, database = "", url:match("^redis://([%w._-]+):?(%d*)/?(%d*)$")
    end
    local user, password = login:match("^([^:]*):(.*)$")
    if not host or (login ~= "" and not user) then
        return
    end
    local greeting = {}
    if user == "" then
        greeting[1] = command(0, "AUTH", decoded(password))
    elseif user then
        greeting[1] = command(0, "AUTH", decoded(user), decoded(password))
    end
    if database ~= "" and database ~= "0" then
        greeting[#greeting + 1] = command(0, "SELECT", database)
    end
    server = { name = resolver.follow(host), port = tonumber(port) or 6379, greeting = greeting }
end


-- What Redis says (RESP 2): a string, a number, an array, false for nothing; or nil and why not, from "-" on if Redis
-- says so itself. After any other why not, what comes next on this connection is nobody's answer.
local function reply(socket)
    local line, err = socket:receive("*l")
    if not line then
        return nil, err
    end
    local kind, rest = sub(line, 1, 1), sub(line, 2)
    if kind == "+" then
        return rest
    end
    local size = find(rest, "^-?%d+$") and tonumber(rest)
    if not size or size > LARGEST then
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
            array[i], err = reply(socket)
            if array[i] == nil then
                return nil, err
            end
        end
        return array
    end
    return nil, line
end


local function connect()
    local address = server.name.addresses[1]
    if not address then
        return nil, "no address"
    end
    local socket = ngx.socket.tcp()
    socket:settimeouts(timeout, timeout, timeout)
    local ok, err = socket:connect(address, server.port, { pool_size = CONNECTIONS })
    if not ok then
        return nil, err
    end
    local kept = socket:getreusedtimes() > 0
    for _, words in ipairs(kept and {} or server.greeting) do
        ok, err = socket:send(words)
        if ok then
            ok, err = reply(socket)
        end
        if not ok then
            socket:close()
            return nil, "not let in: " .. tostring(err)
        end
    end
    return socket, kept
end


-- read.lua's answer, and the token that is the lease if it gives one; or nil and why not.
local function question(key)
    local begin = ask
    while true do
        -- Another one for each attempt: one whose reply was lost may come to Redis late, and would give a lease again
        -- that a write has taken away meanwhile.
        local token = lease.fresh()
        local words = concat({ "$1\r\n1\r\n$", #key, "\r\n", key, "\r\n$0\r\n\r\n$", #token, "\r\n", token,
                               "\r\n$", #LEASE, "\r\n", LEASE, "\r\n" })
        local socket, kept = connect()
        if not socket then
            return nil, kept
        end
        local answer
        local ok, err = socket:send({ begin, words })
        if ok then
            answer, err = reply(socket)
        end
        if answer ~= nil then
            heard = now()
        end
        if type(answer) == "table" then
            socket:setkeepalive(IDLE)
            return answer, token
        elseif err and sub(err, 1, 9) == "-NOSCRIPT" and begin == ask then
            socket:setkeepalive(IDLE)
            begin = command(5, "EVAL", script)
        else
            socket:close()
            -- A kept connection to a Redis that was restarted is broken; a new one tells what is there now.
            if answer ~= nil or not kept or err == "timeout" or sub(err, 1, 1) == "-" then
                return nil, err or "no answer of this script's"
            end
        end
    end
end


local LARGEST_ID = "9223372036854775807"  -- what is above it, is none, and leaves nothing in Redis


-- Of a path as clients spell it, its hash; nil where apps have named no such resource.
local function key_of(path)
    local name, rest = path:match("^/([^/]+)/?(.*)$")
    local one = lease.rows(name)
    if not one then
        return nil
    elseif rest == "" then
        return "all_" .. name
    elseif rest == "count" then
        return "count_" .. name
    elseif #rest >= #LARGEST_ID and (#rest > #LARGEST_ID or rest > LARGEST_ID) then
        return nil
    end
    return one .. ":" .. rest
end


-- As velikiy/coherence/entry.py looks at it.
local function is_entry(text)
    if type(text) ~= "string" or byte(text, -1) == 10 then
        return false
    end
    local status, etag = match(text, "^([24]0[04])\t([!-~]*)\t[ -~]*\t[ -~]*\n")
    return (status == "200" or status == "404") and (etag == "" or find(etag, '^"[!#-~]+"$') ~= nil)
end


-- The entry and the seconds that Redis keeps it; or nil and what to tell the app that is to fill it: a lease, or that
-- there is none, or nothing, where Redis was not asked or did not answer.
function _M.read(epoch, path)
    local key = server and now() >= resting and key_of(path)
    if not key then
        return nil
    end
    local waited = 0
    while lease.trusts_redis(epoch) do
        local asked = now()
        local found, more = question(key)
        -- After the answer: whatever was believed before, a write may have passed a fenced Redis by meanwhile.
        if not lease.trusts_redis(epoch) then
            return nil
        elseif not found then
            -- One that has answered others meanwhile is busy and not away: to rest would be to send all reads of a
            -- second to the apps, which carry a tenth of them.
            if sub(more, 1, 1) ~= "-" and heard < asked then
                resting = now() + REST
            end
            return nil, more == "timeout" and _M.NO_LEASE or nil  -- an app need not wait as long once more
        elseif found[1] == 1 then
            if not is_entry(found[2]) then
                return nil  -- somebody else's, under our key; the app clears up
            end
            return found[2], math.max(0, math.floor(found[3] / 1000))
        elseif found[1] == 2 then
            return nil, more
        elseif waited >= PATIENCE then
            return nil, _M.NO_LEASE
        end
        sleep(POLL)
        waited = waited + POLL
    end
    return nil
end


return _M
