-- A cached read: what happens before Nginx looks into its cache, and after the answer.

local lease = require "lease"
local generations = require "generations"

local POLL = 0.002     -- seconds
local PATIENCE = 0.05  -- seconds that a read waits for another one's fill; then it asks for itself

local fills = ngx.shared.fills
local sleep = ngx.sleep
local now = ngx.now
local find, sub = string.find, string.sub  -- these are compiled; match is not

local _M = {}

local warm, count = {}, 0  -- until when this worker knows a key to be filled; it saves a look into the dictionary
local ttl


function _M.configure(edge_ttl)
    ttl = tonumber(edge_ttl)
end


local function remember(key, till)
    if count >= 10000 then
        warm, count = {}, 0
    end
    warm[key] = till
    count = count + 1
end


local function path_of(uri)
    local query = find(uri, "?", 1, true)
    return query and sub(uri, 1, query - 1) or uri
end


-- Nginx would compare these dates with Last-Modified, and say of what two writes did within a second that nothing has
-- changed. HTTP leaves a cache free to ignore them.
local function forget_dates()
    ngx.req.clear_header("If-Modified-Since")
    ngx.req.clear_header("If-Unmodified-Since")
end


-- In rewrite_by_lua. Sets $generation, which is part of the key, for once and before anything is asked of an app: an
-- answer that a write overtakes is then stored under a name that nobody asks for any more. Without a lease it stays
-- empty, and with it the cache is left alone.
function _M.begin()
    local var = ngx.var
    local uri = var.request_uri
    local path = path_of(uri)
    if var.dated ~= "" then
        forget_dates()
    end
    local waited = 0
    while true do
        local epoch = lease.held()
        local generation = epoch and generations.current(epoch, path)
        if not generation then
            return
        end
        local key = generation .. uri
        local till = warm[key]
        if till and now() < till then
            var.generation = generation
            return
        end
        -- Of many that miss at once one asks. Nginx' own proxy_cache_lock looks again only each 500 ms.
        local state = fills:get(key)
        if state then
            remember(key, state)
            var.generation = generation
            return
        end
        if waited >= PATIENCE or (state == nil and fills:add(key, false, PATIENCE)) then
            var.generation = generation
            var.fill = key
            return
        end
        sleep(POLL)
        waited = waited + POLL
        -- And again from the lease on: this read has asked for nothing yet, so it may as well begin now.
    end
end


-- In rewrite_by_lua of @stale: whatever there is under the name that was the last one.
function _M.stale()
    local var = ngx.var
    var.failed = var.upstream_status or ""
    var.generation = generations.known(lease.epoch(), path_of(var.request_uri)) or ""
end


-- In log_by_lua, for the one that fills: the others may look, or the next one has to ask.
function _M.finish()
    local var = ngx.var
    local key = var.fill
    if key == "" then
        return
    end
    if var.stored ~= "" and var.failed == "" then
        fills:set(key, now() + ttl, ttl)  -- the entry runs out then, and again one has to ask
    elseif var.upstream_cache_status == "HIT" then
        fills:set(key, now() + 1, 1)  -- the mark was lost; how long the entry still has is not known
    else
        fills:delete(key)
    end
end


return _M
