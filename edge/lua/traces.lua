-- Traces: this edge chooses the requests that are traced, and reports its own span of each to a collector, as
-- OpenTelemetry's protocol OTLP over HTTP in JSON. Apps report the spans below it (velikiy/traces.py).
--
-- The edge decides alone, by TRACES_RATIO. Only a trusted proxy may ask for a trace: otherwise every client could make
-- each of its requests an expensive one.
--
-- Gains: no module of Nginx for OpenTelemetry is packaged for Debian 12, and a hit that is not traced pays for one
-- random number.
-- Relies on: names and values that need no escaping in JSON: routes, ids of our own, numbers.
-- Remove when: Debian's Nginx has a module that reports spans of hits, too.

local ids = require "ids"
local metrics = require "metrics"
local resolver = require "resolver"
local routes = require "routes"

local INTERVAL_S = 1  -- between two reports
local MAX_WAITING = 512  -- spans of one worker; further ones are lost
local TIMEOUT_MS = 1000
local KEEP_MS = 30000  -- an idle connection is kept so long

local SERVER, INTEGER, ERROR = 2, "intValue", 2
local random, sub, format = math.random, string.sub, string.format

local _M = { is_on = false }

local collector  -- { name, port, head }
local head  -- the beginning of each report
local share
local waiting = {}


local function attribute(name, kind, value)
    return '{"key":"' .. name .. '","value":{"' .. kind .. '":"' .. value .. '"}}'
end


-- In init_by_lua. url: TRACES_URL, which edge/start has checked, or ""; ratio: TRACES_RATIO; instance_id: of this edge.
function _M.configure(url, ratio, instance_id)
    local host, port = url:match("^http://(.-):?(%d*)$")
    if not host or host == "" then
        return
    end
    port = tonumber(port) or 80
    collector = { name = resolver.follow(host), port = port,
                  head = "POST /v1/traces HTTP/1.1\r\nHost: " .. host .. ":" .. port
                         .. "\r\nContent-Type: application/json\r\nContent-Length: " }
    head = '{"resourceSpans":[{"resource":{"attributes":[' .. attribute("service.name", "stringValue", "velikiy-edge")
           .. "," .. attribute("service.instance.id", "stringValue", instance_id)
           .. ']},"scopeSpans":[{"scope":{"name":"velikiy"},"spans":['
    share = tonumber(ratio)
    _M.is_on = true
end


-- Return random bytes as so many hexadecimal digits, a multiple of 4.
local function fresh_id(digits)
    local id = ""
    while #id < digits do
        id = id .. format("%04x", random(0, 65535))
    end
    return id
end


-- In entrance.lua: choose whether the request is traced. `$traced` is what apps receive as Traceparent: with the flag
-- 01 only if this edge has chosen the request.
function _M.begin(var)
    local parent = var.traceparent  -- "", or "?" for a value of another form (edge/conf/generated/client_ids.conf)
    local trace = #parent > 1 and sub(parent, 4, 35)
    local is_asked = trace and var.is_trusted_proxy == "1" and tonumber(sub(parent, 54, 55), 16) % 2 == 1
    if is_asked or random() < share then
        var.traced = "00-" .. (trace or fresh_id(32)) .. "-" .. fresh_id(16) .. "-01"
    else
        var.traced = trace and "00-" .. trace .. "-" .. sub(parent, 37, 52) .. "-00" or parent
    end
end


local function nanoseconds(seconds)
    return format("%.0f000000", seconds * 1000)
end


-- Return what apps receive as Traceparent.
function _M.for_apps(var)
    return _M.is_on and var.traced or var.traceparent
end


-- Keep the span of this request until the next report.
local function add(var, method, route, status, cache)
    local traced = var.traced
    if not traced or sub(traced, -2) ~= "01" then
        return
    end
    if #waiting >= MAX_WAITING then
        metrics.count("lost_spans_total")
        return
    end
    local parent = var.traceparent
    waiting[#waiting + 1] = '{"traceId":"' .. sub(traced, 4, 35) .. '","spanId":"' .. sub(traced, 37, 52)
        .. (#parent > 1 and '","parentSpanId":"' .. sub(parent, 37, 52) or "")
        .. '","name":"' .. method .. " " .. route .. '","kind":' .. SERVER
        .. ',"startTimeUnixNano":"' .. nanoseconds(ngx.req.start_time())
        .. '","endTimeUnixNano":"' .. nanoseconds(ngx.now()) .. '","attributes":['
        .. attribute("http.request.method", "stringValue", method) .. ","
        .. attribute("http.route", "stringValue", route) .. ","
        .. attribute("http.response.status_code", INTEGER, status) .. ","
        .. attribute("velikiy.cache", "stringValue", cache) .. ","
        .. attribute("velikiy.request_id", "stringValue", var.id) .. "]"
        .. (tonumber(status) >= 500 and ',"status":{"code":' .. ERROR .. "}}" or "}")
end


-- In entrance.lua, where a hit ends for Lua. Nginx sends it at once, so the span ends here.
function _M.add_hit(var)
    add(var, "GET", routes.route_of(var), "200", "HIT")
end


-- In log_by_lua: any other answer.
function _M.add_answer()
    local var = ngx.var
    add(var, metrics.method_of(var), routes.route_of(var), var.status, var.cache_result)
end


local function send(body)
    local address = collector.name.addresses[1]
    if not address then
        return nil
    end
    local socket = ngx.socket.tcp()
    socket:settimeouts(TIMEOUT_MS, TIMEOUT_MS, TIMEOUT_MS)
    local ok = socket:connect(address, collector.port) and socket:send(collector.head .. #body .. "\r\n\r\n" .. body)
    local status = ok and socket:receive("*l")
    local is_accepted = status and status:find("^HTTP/1%.%d 2") ~= nil
    local length
    while ok do
        local line = socket:receive("*l")
        if not line then
            ok = nil
        elseif line == "" then
            break
        else
            length = length or tonumber(line:lower():match("^content%-length:%s*(%d+)"))
        end
    end
    if ok and length and socket:receive(length) then
        socket:setkeepalive(KEEP_MS, 1)
    else
        socket:close()
    end
    return is_accepted
end


-- Report the spans that wait. Those of a report that the collector does not accept are lost: they must not use up the
-- memory of an edge.
local function report()
    if #waiting == 0 then
        return
    end
    local spans = waiting
    waiting = {}
    if not send(head .. table.concat(spans, ",") .. "]}]}]}") then
        metrics.count("lost_spans_total", #spans)
    end
end


-- In init_worker_by_lua. All workers are forks of one process, so each needs random numbers of its own. The timer also
-- runs once when the worker exits.
function _M.start()
    if _M.is_on then
        math.randomseed(tonumber(sub(ids.run(), 1, 12), 16) + ngx.worker.pid())
        ngx.timer.every(INTERVAL_S, report)
    end
end


return _M
