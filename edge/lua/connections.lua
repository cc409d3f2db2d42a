-- Ends connections of a client that has too many open, whatever they do. limit_conn (edge/conf/limits.conf) counts a
-- connection only once the header of a request has arrived, so half a header would be free.
--
-- Gains: one client cannot hold the connections of a worker for longer than a client_header_timeout.
-- Relies on: Nginx treats a connection that shutdown(2) has ended like one that its client has ended.
-- Remove when: Nginx limits connections when it accepts them.

local ffi = require "ffi"
local limits = require "limits"
local listeners = require "listeners"

ffi.cdef[[
    int getpeername(int descriptor, unsigned char *address, unsigned int *size);
    int shutdown(int descriptor, int how);
]]
local CHECK_INTERVAL_S = 1
local MAX_DESCRIPTOR = 16383  -- worker_rlimit_nofile (edge/nginx.conf)
local AF_INET, AF_INET6 = 2, 10
local SHUT_RDWR = 2

-- Open connections for each connection that may have a request in progress: clients keep idle connections, and an
-- office shares one address.
local OPEN_FACTOR = 10

local _M = {}

local max_open  -- nil: no limit


-- In init_by_lua.
-- connections: RATE_CONNECTIONS, 0 for no limit; proxies: TRUSTED_PROXIES, whose connections have many clients.
function _M.configure(connections, proxies)
    max_open = connections > 0 and proxies == "" and connections * OPEN_FACTOR or nil
end


local address, size = ffi.new("unsigned char[128]"), ffi.new("unsigned int[1]")
local family = ffi.cast("unsigned short *", address)


-- Return the client of a connection as in limits.lua; nil if the descriptor is no connection of a client.
local function client_of(descriptor)
    size[0] = 128
    if ffi.C.getpeername(descriptor, address, size) ~= 0 or not (family[0] == AF_INET or family[0] == AF_INET6) then
        return nil
    end
    local client = limits.name_of(family[0] == AF_INET and ffi.string(address + 4, 4) or ffi.string(address + 8, 16))
    return listeners.serves_clients_at(descriptor) and client or nil
end


local function check(premature)
    local open = {}
    for descriptor = 0, premature and -1 or MAX_DESCRIPTOR do
        local client = client_of(descriptor)
        if client then
            open[client] = (open[client] or 0) + 1
            if open[client] > max_open then
                ffi.C.shutdown(descriptor, SHUT_RDWR)
            end
        end
    end
end


-- In init_worker_by_lua. Each worker counts its own connections.
function _M.start()
    if max_open then
        ngx.timer.every(CHECK_INTERVAL_S, check)
    end
end


return _M
