-- The open loop: requests are due at fixed times, whether or not the earlier ones were answered.
--     wrk -t N -c N -s open.lua URL -- N MAKER ... RATE WARMUP
--
-- During a pause of the server a closed loop sends less, and so measures the pause once instead of for every request
-- that was due meanwhile (coordinated omission). Here each latency counts from the moment at which its request was due.
-- A request without a response at the end of the run is not counted.
--
-- wrk passes a script neither the connection nor the time of a response. So each connection has a thread of its own:
-- then wrk asks for the next request right after the last response, and a thread may sleep until its request is due,
-- exactly and without wrk's timers, which count whole milliseconds. The price is a switch of threads for each request,
-- some microseconds; bench/rows/mixed.py measures its effect against `return 200`.

local ffi = require "ffi"
ffi.cdef [[
    typedef struct { long seconds; long nanoseconds; } moment;
    int clock_gettime(int clock, moment *now);
    int clock_nanosleep(int clock, int flags, const moment *until, moment *left);
    int prctl(int option, unsigned long value);
]]
local C = ffi.C
local MONOTONIC, ABSOLUTE, PR_SET_TIMERSLACK = 1, 1, 29
local STEPS = 100  -- of the histogram, per factor of e: 1 % each

local here = debug.getinfo(1, "S").source:match("^@(.*/)")
local moment = ffi.new("moment")
local all = {}

local function now()
    C.clock_gettime(MONOTONIC, moment)
    return tonumber(moment.seconds) + tonumber(moment.nanoseconds) / 1e9
end

local function sleep_until(when)
    moment.seconds = math.floor(when)
    moment.nanoseconds = (when - math.floor(when)) * 1e9
    C.clock_nanosleep(MONOTONIC, ABSOLUTE, moment, nil)
end

function setup(thread)
    thread:set("number", #all)
    all[#all + 1] = thread
end

function init(arguments)
    local warmup = tonumber(table.remove(arguments))
    local rate = tonumber(table.remove(arguments))
    local make = dofile(here .. "requests.lua")(number, arguments)
    local every = tonumber(arguments[1]) / rate  -- seconds between two requests of one connection
    local count, begin, due = 0, nil, nil
    counts, recorded, late = {}, 0, 0

    -- Record the time since the last request was due.
    local function waited(at)
        late = at - due
        if due >= begin + warmup then
            local step = math.max(0, math.floor(math.log((at - due) * 1e6) * STEPS))
            counts[step] = (counts[step] or 0) + 1
            recorded = recorded + 1
        end
    end

    function request()
        count = count + 1
        local at = now()
        if count == 1 then
            -- wrk calls the first thread once before the load, to see the form of a request. The requests that become
            -- due meanwhile are sent during the warm-up.
            C.prctl(PR_SET_TIMERSLACK, 1)
            begin = at + every * number / tonumber(arguments[1])
        else
            waited(at)
        end
        due = begin + (count - 1) * every
        if at < due then
            sleep_until(due)
        end
        return make()
    end
end

function done(summary, _)
    local counts, recorded, last, latest = {}, 0, 0, 0
    for _, thread in ipairs(all) do
        recorded = recorded + thread:get("recorded")
        latest = math.max(latest, thread:get("late"))
        for step, count in pairs(thread:get("counts")) do
            counts[step] = (counts[step] or 0) + count
            last = math.max(last, step)
        end
    end
    local function percentile(share)
        if recorded == 0 then
            return latest * 1e3  -- no request after the warm-up was sent: each waits longer than this
        end
        local left = share * recorded
        for step = 0, last do
            left = left - (counts[step] or 0)
            if left <= 0 then
                return math.exp((step + 0.5) / STEPS) / 1e3
            end
        end
        return math.exp((last + 0.5) / STEPS) / 1e3
    end
    local errors = summary.errors
    io.write(string.format(
        '{"requests":%d,"seconds":%.6f,"failed":%d,"recorded":%d,'
        .. '"p50":%.4f,"p90":%.4f,"p99":%.4f,"p999":%.4f,"max":%.4f}\n',
        summary.requests, summary.duration / 1e6,
        errors.connect + errors.read + errors.write + errors.status + errors.timeout, recorded,
        percentile(0.5), percentile(0.9), percentile(0.99), percentile(0.999), percentile(1)))
end
