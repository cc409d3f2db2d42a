-- The open loop: requests are due at fixed times, whether or not those before were answered.
--     wrk -t N -c N -s open.lua URL -- N MAKER ... RATE WARMUP
--
-- A closed loop that meets a pause sends less, and so measures the pause once instead of for all who would have come
-- (coordinated omission). Here each latency counts from when its request was due; what has no answer when the run ends
-- is not counted.
--
-- wrk tells a script neither which connection it is about nor when an answer came. So each connection has a thread of
-- its own: then the next request is asked for right after the answer to the last one, and a thread may sleep until its
-- request is due, exactly and without wrk's timers, which know whole milliseconds. The price is a change of threads
-- for each request, some microseconds; what it does to the figures bench/rows/mixed.py shows against `return 200`.

local ffi = require "ffi"
ffi.cdef [[
    typedef struct { long seconds; long nanoseconds; } moment;
    int clock_gettime(int clock, moment *now);
    int clock_nanosleep(int clock, int flags, const moment *until, moment *left);
    int prctl(int option, unsigned long value);
]]
local C = ffi.C
local MONOTONIC, ABSOLUTE, PR_SET_TIMERSLACK = 1, 1, 29
local STEPS = 100  -- of the histogram, for each factor of e: 1 %

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
    counts, recorded = {}, 0

    -- Since the request before was due.
    local function waited(at)
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
            -- Of the first thread wrk asks once before the load, to see what a request looks like; the times that are
            -- due meanwhile are made up for during the warm-up.
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
    local counts, recorded, last = {}, 0, 0
    for _, thread in ipairs(all) do
        recorded = recorded + thread:get("recorded")
        for step, count in pairs(thread:get("counts")) do
            counts[step] = (counts[step] or 0) + count
            last = math.max(last, step)
        end
    end
    local function percentile(share)
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
