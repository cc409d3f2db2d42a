-- The clock of the protocol, as in velikiy/coherence/timing.py. ngx.now is wall time, which can be set; this clock goes
-- on while the machine sleeps.

local ffi = require "ffi"

ffi.cdef[[
    struct velikiy_timespec { long seconds; long nanoseconds; };
    int clock_gettime(int clock, struct velikiy_timespec *now);
]]
local CLOCK_BOOTTIME = 7

local timespec = ffi.new("struct velikiy_timespec")

local _M = {}


-- Return the milliseconds since the machine was booted.
function _M.now_ms()
    ffi.C.clock_gettime(CLOCK_BOOTTIME, timespec)
    return tonumber(timespec.seconds) * 1000 + tonumber(timespec.nanoseconds) / 1e6
end


return _M
