-- Replaces a worker that is stopped (SIGSTOP): its clients would wait, and without worker 0 the edge would accept no
-- drops and lose its cache lease. Each worker looks after the next one, so the work does not grow with their number.
-- The master starts a worker with the same number in place of one that is killed.
--
-- Relies on: the state of a process in /proc/<pid>/stat of proc(5), and that workers run as one user.
-- Remove when: Nginx's master replaces workers that are stopped.

local clock = require "clock"
local ffi = require "ffi"

ffi.cdef[[
    int kill(int pid, int signal);
    int getppid(void);
]]
local CHECK_INTERVAL_S = 0.1
local STOPPED_MS = 500   -- for which a worker may be stopped: a snapshot of a debugger takes less
local MAX_PAUSE_MS = 300 -- between two looks; after a longer one this worker was stopped itself, with the whole edge
local SIGKILL = 9

local state = ngx.shared.state

local _M = {}

local looked_at, stopped_since, watched = 0, nil, nil


-- Return whether the process is stopped, and is a worker of this edge: its number may be another process's by now.
local function is_stopped(pid)
    local file = io.open("/proc/" .. pid .. "/stat")
    if not file then
        return false
    end
    local status, parent = (file:read("*l") or ""):match("%) (%a) (%d+) ")
    file:close()
    return status == "T" and tonumber(parent) == ffi.C.getppid()
end


local function check(premature)
    if premature then
        return
    end
    local before = looked_at
    looked_at = clock.now_ms()
    local pid = state:get("worker " .. (ngx.worker.id() + 1) % ngx.worker.count())
    if not pid or pid == ngx.worker.pid() or not is_stopped(pid) then
        stopped_since = nil
    elseif pid ~= watched or not stopped_since or looked_at - before > MAX_PAUSE_MS then
        stopped_since = looked_at
    elseif looked_at - stopped_since > STOPPED_MS then
        ngx.log(ngx.EMERG, "a stopped worker is killed, and another one takes its place (pid ", pid, ")")
        ffi.C.kill(pid, SIGKILL)
        stopped_since = nil
    end
    watched = pid
end


-- In init_worker_by_lua. After a reload the new workers look after each other.
function _M.start()
    state:set("worker " .. ngx.worker.id(), ngx.worker.pid())
    ngx.timer.every(CHECK_INTERVAL_S, check)
end


return _M
