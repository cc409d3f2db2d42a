-- The page Live: what the service did in the last 15 minutes, as server-sent events.
--
-- The relay sums up all edges and apps (velikiy/relay/live.py). Each 2 seconds it sends each edge the newest sample and
-- the state of every part, and receives the account of that edge in the response. The edges keep the samples in memory
-- that their workers share, so a page that is opened now shows the past, whatever was restarted meanwhile. A page costs
-- a look at that memory each second: no thread and no connection of an app or of PostgreSQL. Samples and state are text
-- that an edge does not read.

local balancer = require "balancer"
local closing = require "closing"
local control = require "control"
local lease = require "lease"
local leaving = require "leaving"
local metrics = require "metrics"
local renewal = require "renewal"
local signature = require "signature"
local signed_client = require "signed_client"

local SAMPLES = 450            -- 15 minutes
local SAMPLE_S = 2             -- as in velikiy/relay/live.py
local KEPT_S = SAMPLES * SAMPLE_S + 60
local EDGES_KEPT_S = 10
local LOOK_INTERVAL_S = 1
local SILENT_S = 7             -- without anything from the relay
local KEEP_ALIVE_S = 15        -- a proxy in between must not take a quiet stream for a dead one
local MAX_STREAM_S = 300       -- then the page requests the next stream, with a key that is checked again
local APP_TIMEOUT_MS = 400
local MEMORY_INTERVAL_S = 10

local shared = ngx.shared.live
local exiting = ngx.worker.exiting

local _M = {}

local listen


-- In init_by_lua. address: EDGE_LISTEN.
function _M.configure(address)
    listen = address
    shared:add("version", 0)
end


-- ---- the memory of this worker ----


local function measure_memory()
    local file = io.open("/proc/self/smaps_rollup")
    local text = file and file:read("*a") or ""
    if file then
        file:close()
    end
    shared:set("memory " .. ngx.worker.id(), (tonumber(text:match("Pss:%s+(%d+)")) or 0) * 1024)
end


local function memory()
    local bytes = 0
    for id = 0, ngx.worker.count() - 1 do
        bytes = bytes + (shared:get("memory " .. id) or 0)
    end
    return bytes
end


-- In init_worker_by_lua.
function _M.start()
    ngx.timer.at(0, measure_memory)
    ngx.timer.every(MEMORY_INTERVAL_S, measure_memory)
end


-- ---- the exchange with the relay ----


local function keep(body)
    for line in body:gmatch("[^\n]+") do
        local kind, name, rest = line:match("^(%S+) (%S+) ?(.*)$")
        if kind == "sample" then
            local slot = tonumber(name)
            shared:set(slot, rest, KEPT_S)
            if slot > (shared:get("newest") or 0) then
                shared:set("newest", slot)
            end
        elseif kind == "state" then
            shared:set("state", line:sub(7))
        elseif kind == "edges" then
            shared:set("edges", line:sub(7), EDGES_KEPT_S)
        elseif kind == "address" then  -- of the control listener of an edge: <id> <instance id> <address>
            shared:set("address " .. name, rest, EDGES_KEPT_S)
            if rest:find(renewal.instance_id() .. " ", 1, true) == 1 then
                shared:set("this", name)
            end
        end
    end
    shared:set("received_at", ngx.now())
    shared:incr("version", 1)
end


local function samples_since(slot)
    local newest = shared:get("newest") or 0
    local found = {}
    for each = math.max(slot + 1, newest - SAMPLES + 1), newest do
        local sample = shared:get(each)
        if sample then
            found[#found + 1] = sample
        end
    end
    return found, newest
end


-- Return what each app reports of itself (velikiy/http/live.py), one JSON object a line.
local function ask_apps(lines)
    local threads = {}
    for _, peer in ipairs(balancer.all()) do
        threads[#threads + 1] = ngx.thread.spawn(signed_client.get, function(socket)
            return balancer.connect(socket, peer)
        end, "/.live", "", APP_TIMEOUT_MS)
    end
    local silent = 0
    for _, thread in ipairs(threads) do
        local _, status, body = ngx.thread.wait(thread)
        if status == "200" then
            lines[#lines + 1] = "app " .. body
        else
            silent = silent + 1
        end
    end
    lines[#lines + 1] = "silent_apps " .. silent
end


-- At the control listener: store what the relay sends, and return the account of this edge. The instance id is checked
-- as in control.lua:drop.
function _M.exchange()
    ngx.req.read_body()
    local body = ngx.req.get_body_data() or ""
    local request = signature.request_mac(body) or ngx.exit(ngx.HTTP_UNAUTHORIZED)
    if ngx.var.http_x_edge ~= renewal.instance_id() then
        return ngx.exit(ngx.HTTP_CONFLICT)
    end
    local lines = { "newest " .. (shared:get("newest") or 0), "lease " .. lease.left_ms(), "epoch " .. lease.epoch(),
                    "account " .. control.account(), "memory " .. memory(), "listen " .. listen }
    if body:find("\nwants_history") then  -- of a relay that has just started
        for _, sample in ipairs(samples_since(0)) do
            lines[#lines + 1] = "sample " .. sample
        end
        lines[#lines + 1] = "state " .. (shared:get("state") or "null")
    end
    keep(body)
    metrics.report_for_live(lines)
    if body:find("\nwants_apps") then
        ask_apps(lines)
    end
    return signature.respond(request, ngx.HTTP_OK, table.concat(lines, "\n"))
end


-- ---- for clients ----


-- Return the edges that can be read through this edge (through.lua), as JSON, and the id of this edge.
function _M.edges()
    return '{"edges":' .. (shared:get("edges") or "[]") .. ',"this":"' .. (shared:get("this") or "") .. '"}'
end


-- Return the instance id of an edge and the address of its control listener; nil if the relay does not name it.
function _M.address_of(id)
    return (shared:get("address " .. id) or ""):match("^(%S+) (%S+)$")
end


local function event(samples, newest, state, silent_s)
    return "id: " .. newest .. '\ndata: {"samples":[' .. table.concat(samples, ",") .. '],"state":' .. state
           .. ',"silent_s":' .. silent_s .. "}\n\n"
end


local function silence()
    local received_at = shared:get("received_at")
    local seconds = received_at and ngx.now() - received_at or -1
    return (seconds < 0 or seconds > SILENT_S) and string.format("%.0f", seconds) or "0"
end


-- The stream of events. The first event has all samples after the one of the header Last-Event-ID.
function _M.stream()
    ngx.header["Content-Type"] = "text/event-stream; charset=utf-8"
    ngx.header["Cache-Control"] = "private, no-store"
    ngx.header["X-Accel-Buffering"] = "no"  -- a proxy in front passes each event on at once
    ngx.header["X-Content-Type-Options"] = "nosniff"
    if ngx.req.get_method() == "HEAD" then
        return ngx.exit(ngx.HTTP_OK)
    end
    local slot = tonumber((ngx.var.http_last_event_id or ""):match("^%d%d?%d?%d?%d?%d?%d?%d?%d?%d?%d?%d?$")) or 0
    local version, was_silent, sent_at, ends_at = -1, nil, 0, ngx.now() + MAX_STREAM_S
    ngx.print("retry: 2000\n\n")
    -- A stream must not delay a reload or a stop.
    while not (exiting() or closing.is_closing or leaving.has_begun()) and ngx.now() < ends_at do
        local current, silent_s = shared:get("version"), silence()
        local text
        if current ~= version or (silent_s ~= "0") ~= was_silent then
            local samples
            samples, slot = samples_since(slot)
            text = event(samples, slot, shared:get("state") or "null", silent_s)
            version, was_silent = current, silent_s ~= "0"
        elseif ngx.now() - sent_at > KEEP_ALIVE_S then
            text = ":\n\n"
        end
        if text then
            sent_at = ngx.now()
            if not ngx.print(text) or not ngx.flush(true) then
                return
            end
        end
        ngx.sleep(LOOK_INTERVAL_S)
    end
end


return _M
