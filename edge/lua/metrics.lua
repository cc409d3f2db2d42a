-- Counts the requests of this edge, and reports its metrics in the format of Prometheus at the control listener. Each
-- metric is explained in docs/monitoring.md.
--
-- A worker counts in tables of its own and adds them to shared memory each second, so a hit costs one addition and no
-- lock. A hit is counted where it is found (read.lua), because to enter Lua once more in the log phase costs more than
-- that. Nginx sends a hit at once, in the pass of its event loop in which it has read the request, and logs 0.000
-- seconds for it. So a hit counts as a request of 0 seconds.

local balancer = require "balancer"
local certificate = require "certificate"
local lease = require "lease"
local routes = require "routes"

local FLUSH_INTERVAL_S = 1
local BUCKETS_S = { 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5 }  -- as in velikiy/metrics.py
local STORES = { "generations", "large", "small" }
local METHODS = { GET = "GET", HEAD = "GET", POST = "POST", PUT = "PUT", PATCH = "PATCH", DELETE = "DELETE",
                  OPTIONS = "OPTIONS" }
local LIVE_TIERS = { edge = "nginx", redis = "redis", app = "postgres" }
local HELP = {
    requests_total = "Requests that the edge has answered.",
    request_duration_seconds = "Time of a request from its first byte to the last byte of the response.",
    drops_total = "Drops that the edge has acknowledged.",
    evictions_total = "Entries that were evicted to make room.",
    lost_spans_total = "Spans of traces that the collector did not accept.",
    fences_total = "Times that the edge learned that it was fenced.",
    worker_starts_total = "Workers of the edge that have started.",
}

local shared = ngx.shared.metrics
local byte, find, match, sub = string.byte, string.find, string.match, string.sub

local _M = {}

local is_on = false

-- The counts of this worker since it last added to shared memory: a number by the key of a series. The hits are apart,
-- by path or by resource, because a string that is made for each hit would cost more than the addition.
local counted = {}
local list_hits, count_hits, row_hits, history_hits = {}, {}, {}, {}


-- In init_by_lua. setting: METRICS.
function _M.configure(setting)
    is_on = setting == "on"
end


-- Count an event: `drops_total`, or with labels `evictions_total{store="small"}`.
function _M.count(series, number)
    counted[series] = (counted[series] or 0) + (number or 1)
end


-- Count a hit that Nginx sends by itself. Its path is that of a resource. query: what follows the path.
function _M.count_hit(path, query)
    if not is_on then
        return
    end
    local slash = find(path, "/", 2, true)
    local hits, name = list_hits, path
    if slash then
        hits, name = row_hits, sub(path, 1, slash - 1)
        if byte(path, slash + 1) == 99 then  -- "c" of "count"; ids begin with a digit
            hits = count_hits
        elseif byte(query) == 47 then  -- "/" of "/history"
            hits = history_hits
        end
    end
    hits[name] = (hits[name] or 0) + 1
end


local function bucket_of(seconds)
    for i = 1, #BUCKETS_S do
        if seconds <= BUCKETS_S[i] then
            return i
        end
    end
    return #BUCKETS_S + 1
end


-- The key of a duration: its labels, the number of its bucket, or "sum".
local function observe(route, tier, seconds, number)
    local labels = '{route="' .. route .. '",tier="' .. tier .. '"}'
    _M.count("duration " .. labels .. " " .. bucket_of(seconds), number)
    _M.count("duration " .. labels .. " sum", seconds * number)
end


-- Return the class of a request for the page Live: the tier that answered a cached read, a write, a failure, or another
-- request.
local function class_of(method, route, code, cache, tier)
    if cache == "stale" then
        return "stale"
    elseif code >= "500" then
        return "failed"
    elseif method ~= "GET" then
        return (method == "OPTIONS" or code >= "400") and "other" or "write"
    elseif cache == "bypass" and not routes.is_cached(route) then
        return "other"
    end
    return LIVE_TIERS[tier]
end


local function count_request(method, route, code, cache, tier, seconds, number)
    local class = class_of(method, route, code, cache, tier)
    _M.count("live " .. class .. " " .. bucket_of(seconds), number)
    _M.count('requests_total{method="' .. method .. '",route="' .. route .. '",code="' .. code .. '",cache="' .. cache
             .. '",tier="' .. tier .. '"}', number)
    observe(route, tier, seconds, number)
end


-- Return the method of a request, of which there are few.
function _M.method_of(var)
    return METHODS[var.sent_method] or "(other)"
end


-- In log_by_lua: count a request that is not a hit, or a hit that edge/lua/read.lua:answer has sent.
function _M.count_answer()
    if not is_on then
        return
    end
    local var = ngx.var
    local cache, app = var.cache_result:lower(), (var.app_status or "") .. (var.upstream_status or "")
    local tier = "edge"
    if cache ~= "hit" and cache ~= "stale" then
        if find(var.cache_status or "", "redis; hit", 1, true) then
            tier = "redis"
        elseif app ~= "" then
            tier = "app"
        end
    end
    count_request(_M.method_of(var), routes.route_of(var), var.status, cache, tier,
                  ngx.now() - ngx.req.start_time(), 1)
end


local function take_hits(hits, suffix)
    for name, number in pairs(hits) do
        count_request("GET", name .. suffix, "200", "hit", "edge", 0, number)
    end
end


local function flush()
    take_hits(list_hits, "")
    take_hits(count_hits, "/count")
    take_hits(row_hits, "/{id}")
    take_hits(history_hits, "/{id}/history")
    list_hits, count_hits, row_hits, history_hits = {}, {}, {}, {}
    local ready = counted
    counted = {}
    for key, number in pairs(ready) do
        shared:incr(key, number, 0)
    end
end


-- In init_worker_by_lua. The timer also runs once when the worker exits.
function _M.start()
    shared:add("started", ngx.time())
    if is_on then
        _M.count("worker_starts_total")
        ngx.timer.every(FLUSH_INTERVAL_S, flush)
    end
end


-- ---- the report ----


local function full_name(name)
    return "velikiy_edge_" .. name
end


local function head(lines, name, kind, help)
    lines[#lines + 1] = "# HELP " .. full_name(name) .. " " .. help
    lines[#lines + 1] = "# TYPE " .. full_name(name) .. " " .. kind
end


local function gauge(lines, name, help, samples)
    head(lines, name, "gauge", help)
    for labels, value in pairs(samples) do
        lines[#lines + 1] = full_name(name) .. labels .. " " .. value
    end
end


local function report_counters(lines, counters)
    table.sort(counters)
    local last
    for _, series in ipairs(counters) do
        local name = match(series, "^[^{]+")
        if name ~= last then
            head(lines, name, "counter", HELP[name])
            last = name
        end
        lines[#lines + 1] = full_name(series) .. " " .. shared:get(series)
    end
end


local function report_durations(lines, durations)
    local name = "request_duration_seconds"
    head(lines, name, "histogram", HELP[name])
    for labels, counts in pairs(durations) do
        local number, inner = 0, sub(labels, 1, -2)
        for i = 1, #BUCKETS_S + 1 do
            number = number + (counts[tostring(i)] or 0)
            lines[#lines + 1] = full_name(name) .. "_bucket" .. inner .. ',le="' .. (BUCKETS_S[i] or "+Inf") .. '"} '
                                .. number
        end
        lines[#lines + 1] = full_name(name) .. "_sum" .. labels .. " " .. (counts.sum or 0)
        lines[#lines + 1] = full_name(name) .. "_count" .. labels .. " " .. number
    end
end


local function report_state(lines)
    local size, free = {}, {}
    for _, store in ipairs(STORES) do
        local labels = '{store="' .. store .. '"}'
        size[labels], free[labels] = ngx.shared[store]:capacity(), ngx.shared[store]:free_space()
    end
    local usable, unavailable = balancer.count()
    gauge(lines, "memory_bytes", "Memory for entries.", size)
    gauge(lines, "free_memory_bytes", "Memory for entries in pages that are empty.", free)
    gauge(lines, "lease_held", "1 if the edge holds its cache lease.", { [""] = lease.held() and 1 or 0 })
    gauge(lines, "lease_seconds", "Time that is left of the cache lease.", { [""] = lease.left_ms() / 1000 })
    gauge(lines, "epoch", "Number of the present epoch.", { [""] = lease.epoch() })
    gauge(lines, "start_time_seconds", "When the edge was started.", { [""] = shared:get("started") })
    gauge(lines, "apps", "Apps that the edge may choose.",
          { ['{state="usable"}'] = usable, ['{state="unavailable"}'] = unavailable })
    gauge(lines, "connections", "Connections to the edge.",
          { ['{state="active"}'] = ngx.var.connections_active, ['{state="waiting"}'] = ngx.var.connections_waiting })
    local days = certificate.last_days()
    if days then
        gauge(lines, "certificate_expires_in_seconds", "Time that is left of a certificate that expires soon.",
              { [""] = days * 86400 })
    end
end


-- Add the counts for the page Live (live.lua) to these lines.
function _M.report_for_live(lines)
    lines[#lines + 1] = "metrics " .. (is_on and "on" or "off")
    lines[#lines + 1] = "started " .. shared:get("started")
    flush()
    for _, key in ipairs(shared:get_keys(0)) do
        if match(key, "^live ") then
            lines[#lines + 1] = key .. " " .. shared:get(key)
        end
    end
end


-- At the control listener. The request is not signed, because Prometheus cannot sign, and the metrics contain no data
-- of clients.
function _M.report()
    if not is_on then
        return ngx.exit(ngx.HTTP_NOT_FOUND)
    end
    flush()
    local counters, durations = {}, {}
    for _, key in ipairs(shared:get_keys(0)) do
        local labels, part = match(key, "^duration (%b{}) (%w+)$")
        if labels then
            durations[labels] = durations[labels] or {}
            durations[labels][part] = shared:get(key)
        elseif key ~= "started" and not match(key, "^live ") then
            counters[#counters + 1] = key
        end
    end
    local lines = {}
    report_counters(lines, counters)
    report_durations(lines, durations)
    report_state(lines)
    ngx.header["Content-Type"] = "text/plain; version=0.0.4; charset=utf-8"
    ngx.say(table.concat(lines, "\n"))
end


return _M
