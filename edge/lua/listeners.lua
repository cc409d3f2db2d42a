-- Gives the control listener a worker of its own. Worker 0 accepts no clients: it accepts drops and renews the lease,
-- with connections and CPU time that no client can take. The other workers accept clients only.
--
-- Gains: clients that hold every connection of the other workers do not cost the edge its cache, and a drop does not
-- wait behind their requests.
-- An edge that is about to stop refuses connections here first: Nginx closes its listeners with all connections that
-- wait to be accepted, so requests of clients that have just connected would be lost.
--
-- Relies on: epoll(7), IP_MINTTL of ip(7), and that Nginx watches the listeners of a worker
-- before init_worker_by_lua.
-- Remove when: Nginx can assign a listener to a worker, or Debian's Nginx has OpenResty's privileged agent.

local bit = require "bit"
local ffi = require "ffi"

ffi.cdef[[
    int epoll_ctl(int epoll, int operation, int descriptor, void *event);
    int setsockopt(int descriptor, int level, int option, const void *value, unsigned int size);
    int getsockopt(int descriptor, int level, int option, int *value, unsigned int *size);
    int getsockname(int descriptor, unsigned char *address, unsigned int *size);
    long readlink(const char *path, char *target, size_t size);
]]
local EPOLL_CTL_ADD, EPOLL_CTL_DEL = 1, 2
local SOL_SOCKET, SO_ACCEPTCONN = 1, 30
local IPPROTO_IP, IP_MINTTL, MAX_TTL = 0, 21, 255
local AF_UNIX = 1
local UNIX = "0"  -- in place of the port of a Unix socket
local MAX_DESCRIPTOR = 255  -- a new worker has a few descriptors: listeners, logs, its channel to the master

local _M = {}

local client_ports = {}
local client_listeners = {}  -- descriptors
local control_port  -- nil: every worker accepts both


-- In init_by_lua. listen, control: the addresses of both listeners.
function _M.configure(listen, control)
    local port = control:find("^unix:") and UNIX or control:match(":(%d+)$")
    -- The port identifies a listener, so two listeners with one port, at two addresses, stay together.
    control_port = port ~= listen:match(":(%d+)$") and tonumber(port) or nil
end


local function is_epoll(descriptor)
    local target = ffi.new("char[64]")
    local length = ffi.C.readlink("/proc/self/fd/" .. descriptor, target, 64)
    return length > 0 and ffi.string(target, length) == "anon_inode:[eventpoll]"
end


local function is_listener(descriptor)
    local value, size = ffi.new("int[1]"), ffi.new("unsigned int[1]", 4)
    return ffi.C.getsockopt(descriptor, SOL_SOCKET, SO_ACCEPTCONN, value, size) == 0 and value[0] == 1
end


-- Return this edge's port of a socket, 0 for a Unix socket.
local function port_of(descriptor)
    local address, size = ffi.new("unsigned char[128]"), ffi.new("unsigned int[1]", 128)
    ffi.C.getsockname(descriptor, address, size)
    if ffi.cast("unsigned short *", address)[0] == AF_UNIX then
        return 0
    end
    return bit.bor(bit.lshift(address[2], 8), address[3])
end


-- Report no further connection of this listener to this worker. The descriptor stays registered, because Nginx removes
-- it when the worker exits.
local function ignore(epoll, descriptor)
    local nothing = ffi.new("char[16]")
    ffi.C.epoll_ctl(epoll, EPOLL_CTL_DEL, descriptor, nothing)
    ffi.C.epoll_ctl(epoll, EPOLL_CTL_ADD, descriptor, nothing)
end


-- In init_worker_by_lua.
function _M.divide()
    if not control_port then
        return
    end
    local epoll, listeners = nil, {}
    for descriptor = 0, MAX_DESCRIPTOR do
        if is_listener(descriptor) then
            local port = port_of(descriptor)
            local is_control = port == control_port
            listeners[descriptor] = is_control
            client_ports[port] = not is_control
            if not is_control and port > 0 then
                client_listeners[#client_listeners + 1] = descriptor
            end
        elseif is_epoll(descriptor) then
            epoll = descriptor
        end
    end
    local has_control = ngx.worker.id() == 0
    for descriptor, is_control in pairs(listeners) do
        if epoll and is_control ~= has_control then
            ignore(epoll, descriptor)
        end
    end
end


-- Let the kernel drop the first packet of each further connection of a client, for all workers: no client is so near
-- that its packets have the largest TTL. (A filter of the socket would need rights on some kernels.) The connections
-- that wait are still accepted. The client sends the packet again after a second, and is refused if Nginx has stopped
-- by then.
function _M.end_connecting()
    local least = ffi.new("int[1]", MAX_TTL)
    for _, descriptor in ipairs(client_listeners) do
        ffi.C.setsockopt(descriptor, IPPROTO_IP, IP_MINTTL, least, 4)
    end
end


-- Return whether a connection was accepted by a listener for clients.
function _M.serves_clients_at(descriptor)
    return client_ports[port_of(descriptor)]
end


return _M
