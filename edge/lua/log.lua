-- Lets no request wait for the reader of the log: if the pipe to supervisor or Docker is full, lines are lost. A
-- message reports it when there is room again, unless the pipe was full for less than LOOK_INTERVAL_S.
--
-- Gains: a reader that was stopped for 5 s stopped every hit for as long, once its pipe was full.
-- Relies on: fcntl(2) and poll(2). Nginx opens /dev/stdout itself; stderr is shared with edge/start and edge/container,
-- which print nothing while Nginx runs. A terminal or a file stays as it is.
-- Remove when: Nginx has a parameter of access_log for it.

local bit = require "bit"
local ffi = require "ffi"

ffi.cdef[[
    struct velikiy_pollfd { int fd; short events; short revents; };
    int fcntl(int fd, int command, ...);
    int poll(struct velikiy_pollfd *descriptors, unsigned long number, int timeout);
    long readlink(const char *path, char *target, size_t size);
    long write(int fd, const char *text, size_t size);
]]
local F_GETFL, F_SETFL, F_SETPIPE_SZ, O_NONBLOCK, POLLOUT = 3, 4, 1031, 2048, 4
local PIPE_BYTES = 1024 * 1024 -- the most that Linux lets an ordinary user have: 35 ms of a busy edge
local LINUX_PIPE_BYTES = 64 * 1024
local MAX_DESCRIPTOR = 1023    -- in a reload, the logs are opened after the channels to the workers
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
        ffi.C.write(1, "\n", 1) -- the last line may have been cut off
        ngx.log(ngx.EMERG, "lines of this log are lost: its reader (supervisor or Docker) was stopped, or too slow")
    end
    was_full = is_full
end


-- Make the pipe as large as this account may.
local function enlarge(fd)
    local size = PIPE_BYTES
    while size > LINUX_PIPE_BYTES and ffi.C.fcntl(fd, F_SETPIPE_SZ, ffi.cast("int", size)) == -1 do
        size = size / 2
    end
end


-- In init_worker_by_lua, when the log is open. The workers share the open file description (open(2)), and so its flags.
function _M.start()
    if ngx.worker.id() ~= 0 then
        return
    end
    local out, err = pipe_of(1), pipe_of(2)
    for fd = 1, MAX_DESCRIPTOR do
        local pipe = pipe_of(fd)
        if pipe and (pipe == out or pipe == err) then
            ffi.C.fcntl(fd, F_SETFL, ffi.cast("int", bit.bor(ffi.C.fcntl(fd, F_GETFL), O_NONBLOCK)))
            enlarge(fd)
        end
    end
    if out then
        ngx.timer.every(LOOK_INTERVAL_S, look)
    end
end


return _M
