-- Limits the requests of each client: a step of entrance.lua, because hits count too. The number is exact across the
-- workers: `incr` counts and begins the time of a window in one step, in memory that the workers share.
--
-- A client is a valid API key, whatever its address is. Otherwise it is an IPv4 address, or a network of IPv6 of which
-- one customer usually has all addresses (/64). Behind a trusted proxy the proxy's client counts
-- (edge/conf/proxies.conf).
--
-- Each request counts once. A request whose key is not in memory counts only after the key was checked
-- (keys.lua:admit): for the key if it is valid, and else for the address. So neither made-up keys nor other clients at
-- one address use up what belongs to a key. Checks of unknown keys have a number of their own for each address.

local clients = ngx.shared.clients
local sub = string.sub

local MAPPED = ("\0"):rep(10) .. "\255\255"  -- an IPv4 address in IPv6 (::ffff:0:0/96)

-- The routes whose locations check unknown keys (edge/conf/site.conf, edge/conf/write.conf).
local CHECKS_KEYS = { ["@read"] = true, ["@write"] = true, ["@bypass"] = true }

local CHECK = "check "  -- before an address: its checks of unknown keys

local _M = {}

local max_requests, window_s  -- max_requests is nil: no limit
local max_connections


-- In init_by_lua. Each is 0 for no limit.
-- requests: in each window of so many seconds; connections: on which requests are in progress.
function _M.configure(requests, seconds, connections)
    max_requests = requests > 0 and requests or nil
    max_connections = connections > 0 and connections or nil
    window_s = seconds
end


function _M.are_on()
    return max_requests ~= nil or max_connections ~= nil
end


-- Return the client that has this address of 4 or 16 bytes.
function _M.name_of(address)
    if #address == 16 then
        return sub(address, 1, 12) == MAPPED and sub(address, 13) or sub(address, 1, 8)
    end
    return address
end


-- Count the request for this client, and return 429 if it is above the limit.
local function count_for(client)
    local count = clients:incr(client, 1, 0, window_s)
    if not count then
        return nil  -- no memory, even after eviction
    end
    local var = ngx.var
    local left_s = math.ceil(math.max(clients:ttl(client) or 0, 0.001))
    var.rate_limit = '"client";r=' .. math.max(0, max_requests - count) .. ";t=" .. left_s
    if count > max_requests then
        var.rate_reset = left_s
        return 429
    end
end


-- A step of entrance.lua. It also sets the variable by which limit_conn (edge/conf/limits.conf) knows the client.
-- route: of the request; key: the path of its API key if it is in memory and valid; may_have_key: whether another key
-- of the request is still to be checked.
function _M.refuse(route, key, may_have_key)
    if not _M.are_on() then
        return nil
    end
    local var = ngx.var
    local client = key or _M.name_of(var.binary_remote_addr)
    var.limited_client = client
    if not max_requests then
        return nil
    end
    if may_have_key and CHECKS_KEYS[route] then
        var.uncounted = "1"
        return count_for(CHECK .. client)
    end
    return count_for(client)
end


-- Count a request that `refuse` has not counted, for its API key or its address.
-- key: the path of the valid API key, or nil.
function _M.count(key)
    local var = ngx.var
    var.uncounted = ""
    local address = _M.name_of(var.binary_remote_addr)
    if not key then
        return count_for(address)
    end
    clients:incr(CHECK .. address, -1)  -- only checks of keys that are not valid count
    return count_for(key)
end


return _M
