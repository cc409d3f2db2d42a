-- Limits the requests of each client: a step of entrance.lua, because hits count too. The number is exact across the
-- workers: `incr` counts and begins the time of a window in one step, in memory that the workers share.
--
-- A client is an IPv4 address, or a network of IPv6 of which one customer usually has all addresses (/64). Behind a
-- trusted proxy the proxy's client counts (edge/conf/proxies.conf).

local clients = ngx.shared.clients
local sub = string.sub

local MAPPED = ("\0"):rep(10) .. "\255\255"  -- an IPv4 address in IPv6 (::ffff:0:0/96)

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


-- Return the client that has this address of 4 or 16 bytes.
function _M.name_of(address)
    if #address == 16 then
        return sub(address, 1, 12) == MAPPED and sub(address, 13) or sub(address, 1, 8)
    end
    return address
end


-- A step of entrance.lua. It also sets the variable by which limit_conn (edge/conf/limits.conf) knows the client.
function _M.refuse()
    if not (max_requests or max_connections) then
        return nil
    end
    local var = ngx.var
    local client = _M.name_of(var.binary_remote_addr)
    var.limited_client = client
    if not max_requests then
        return nil
    end
    local count = clients:incr(client, 1, 0, window_s)
    if not count then
        return nil  -- no memory, even after eviction
    end
    local left_s = math.ceil(math.max(clients:ttl(client) or 0, 0.001))
    var.rate_limit = '"client";r=' .. math.max(0, max_requests - count) .. ";t=" .. left_s
    if count > max_requests then
        var.rate_reset = left_s
        return 429
    end
end


return _M
