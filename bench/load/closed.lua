-- The closed loop: each connection sends its next request as soon as the response arrives.
--     wrk -s closed.lua URL -- THREADS MAKER ...
-- wrk corrects the latencies: it adds the waits of requests that it would have sent during a pause, at its mean rate.

local here = debug.getinfo(1, "S").source:match("^@(.*/)")
local threads = 0

function setup(thread)
    thread:set("number", threads)
    threads = threads + 1
end

function init(arguments)
    request = dofile(here .. "requests.lua")(number, arguments)
end

function done(summary, latency)
    local errors = summary.errors
    io.write(string.format(
        '{"requests":%d,"seconds":%.6f,"failed":%d,"p50":%.4f,"p90":%.4f,"p99":%.4f,"p999":%.4f,"max":%.4f}\n',
        summary.requests, summary.duration / 1e6,
        errors.connect + errors.read + errors.write + errors.status + errors.timeout,
        latency:percentile(50) / 1e3, latency:percentile(90) / 1e3, latency:percentile(99) / 1e3,
        latency:percentile(99.9) / 1e3, latency.max / 1e3))
end
