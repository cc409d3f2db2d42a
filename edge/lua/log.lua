-- Lets no request wait for the reader of the log. While supervisor or Docker is stopped, or is slower than this edge
-- writes, lines are lost; Nginx reports once a minute that it could not write.
--
-- Gains: a reader that is stopped for 5 s stopped every hit for as long once its pipe was full.
-- Relies on: fcntl(2); Nginx opens /dev/stdout, so no other process shares the flag with this edge.
-- Remove when: Nginx has a parameter of access_log for it.

local ffi = require "ffi"

ffi.cdef[[
    int fcntl(int fd, int command, ...);
    long readlink(const char *path, char *target, size_t size);
]]
local F_GETFL, F_SETFL, F_SETPIPE_SZ, O_NONBLOCK = 3, 4, 1031, 2048
local PIPE_BYTES = 1024 * 1024 -- the most that Linux lets an ordinary user have: 35 ms of a busy edge
local TARGET_BYTES = 64

local _M = {}


-- Return "pipe:[NUMBER]" for a descriptor of a pipe, else nil.
local function pipe_of(fd)
    local target = ffi.new("char[?]", TARGET_BYTES)
    local length = ffi.C.readlink("/proc/self/fd/" .. fd, target, TARGET_BYTES)
    return length > 0 and ffi.string(target, length):match("^pipe:.*")
end


-- In init_worker_by_lua: by then the log is open. The workers share its description, so one of them would do.
function _M.start()
    local stdout, stderr = pipe_of(1), pipe_of(2)
    for fd = 1, 63 do
        local pipe = pipe_of(fd)
        if pipe and (pipe == stdout or pipe == stderr) then
            local flags = ffi.C.fcntl(fd, F_GETFL)
            ffi.C.fcntl(fd, F_SETFL, ffi.cast("int", bit.bor(flags, O_NONBLOCK)))
            ffi.C.fcntl(fd, F_SETPIPE_SZ, ffi.cast("int", PIPE_BYTES))
        end
    end
end


return _M
