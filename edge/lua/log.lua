-- Lets no request wait for the reader of the log: if the pipe to supervisor or Docker is full, lines are lost, and a
-- message says so as soon as there is room.
--
-- Gains: a reader that was stopped for 5 s stopped every hit for as long, once its pipe was full.
-- Relies on: fcntl(2) and poll(2); Nginx opens /dev/stdout, so no other process shares the flag with this edge.
-- Remove when: Nginx has a parameter of access_log for it.

local bit = require "bit"
local ffi = require "ffi"

ffi.cdef[[
    struct velikiy_pollfd { int fd; short events; short revents; };
    int fcntl(int fd, int command, ...);
    int poll(struct velikiy_pollfd *descriptors, unsigned long number, int timeout);
    long readlink(const char *path, char *target, size_t size);
]]
local F_GETFL, F_SETFL, F_SETPIPE_SZ, O_NONBLOCK, POLLOUT = 3, 4, 1031, 2048, 4
local PIPE_BYTES = 1024 * 1024 -- the most that Linux lets an ordinary user have: 35 ms of a busy edge
local MAX_DESCRIPTOR = 63      -- Nginx opens its logs before it opens connections
local TARGET_BYTES = 64
local LOOK_INTERVAL_S = 0.5

local _M = {}

local stdout = ffi.new("struct velikiy_pollfd", 1, POLLOUT)
local was_full = false


-- Return "pipe:[NUMBER]" if the descriptor is one of a pipe, else nil.
local function pipe_of(fd)
    local target = ffi.new("char[?]", TARGET_BYTES)
    local length = tonumber(ffi.C.readlink("/proc/self/fd/" .. fd, target, TARGET_BYTES))
    return length > 0 and ffi.string(target, length):match("^pipe:.*") or nil
end


local function look()
    local is_full = ffi.C.poll(stdout, 1, 0) == 0
    if was_full and not is_full then
        ngx.log(ngx.ALERT, "lines of this log are lost: its reader (supervisor or Docker) was stopped, or too slow")
    end
    was_full = is_full
end


-- In init_worker_by_lua, when the log is open. The flag belongs to the description that all workers share.
function _M.start()
    if ngx.worker.id() ~= 0 then
        return
    end
    local out, err = pipe_of(1), pipe_of(2)
    for fd = 1, MAX_DESCRIPTOR do
        local pipe = pipe_of(fd)
        if pipe and (pipe == out or pipe == err) then
            ffi.C.fcntl(fd, F_SETFL, ffi.cast("int", bit.bor(ffi.C.fcntl(fd, F_GETFL), O_NONBLOCK)))
            ffi.C.fcntl(fd, F_SETPIPE_SZ, ffi.cast("int", PIPE_BYTES))
        end
    end
    if out then
        ngx.timer.every(LOOK_INTERVAL_S, look)
    end
end


return _M
