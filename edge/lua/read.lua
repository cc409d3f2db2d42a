-- A cached read, tier by tier: the memory of this edge, Redis, an app. If no app can answer, the last entry is served
-- with a mark.

local addresses = require "addresses"
local app_response = require "app_response"
local balancer = require "balancer"
local generations = require "generations"
local lease = require "lease"
local metrics = require "metrics"
local redis = require "redis"
local shedding = require "shedding"
local store = require "store"

local POLL_S = 0.002
local FILL_WAIT_S = 0.05  -- a read waits so long for the fill of another read, then it fetches the response itself

local fills = ngx.shared.fills
local concat = table.concat

local _M = {}

-- Headers of an app's response that are for Nginx, or that Nginx sends itself (edge/conf/site.conf).
local NOT_FORWARDED = { ["App"] = true, ["App-Seconds"] = true, ["Cache-Control"] = true,
                        ["Cache-Status"] = true, ["Connection"] = true, ["Date"] = true,
                        ["Keep-Alive"] = true, ["Server"] = true, ["Transfer-Encoding"] = true,
                        ["Postgres"] = true, ["X-Accel-Expires"] = true,
                        ["X-Content-Type-Options"] = true, ["X-Request-Id"] = true }


-- Remove the conditions that Nginx would misjudge. It would compare If-Modified-Since and If-Unmodified-Since with
-- Last-Modified, and report two writes within one second as no change; HTTP allows a cache to ignore them. The
-- directive `if_modified_since off` would also ignore If-None-Match beside them. If-Match of a read is for the origin
-- server alone (RFC 9111, 4.3.2): to refuse because of it, Nginx would abort what Lua is sending, and its worker would
-- crash.
local function clear_conditions()
    ngx.req.clear_header("If-Modified-Since")
    ngx.req.clear_header("If-Unmodified-Since")
    ngx.req.clear_header("If-Match")
end


-- Set the result for the response and the log. Without this call it is a hit (edge/conf/site.conf).
local function set_cache_status(result, status)
    ngx.var.cache_result = result
    ngx.var.cache_status = status
end


-- A person who has opened the address in a browser gets an error as a page, which an app makes: the app fetches again
-- what was missing here, so this response is as current as any other. Return whether the request has gone there.
local function show_as_page(status)
    local var = ngx.var
    if status < 400 or var.wants_page == "" then
        return false
    end
    set_cache_status("BYPASS", "nginx; fwd=bypass")
    var.passed_gate = ""
    var.app, var.app_status, var.app_seconds = "", "", ""  -- the log shows the app that makes the page
    var.accept = var.http_accept
    return ngx.exec("@bypass")
end


-- Send an entry of a cache.
local function send(entry)
    if store.is_missing(entry) and show_as_page(404) then
        return nil
    end
    return store.send(entry)
end


-- Send the app's response unchanged.
local function forward(response)
    if show_as_page(response.status) then
        return nil
    end
    ngx.status = response.status
    local prefix = ngx.var.path_prefix
    for name, value in pairs(response.header) do
        if name == "Link" and type(value) == "string" then
            value = store.prefixed_links(value, prefix)
        end
        if not NOT_FORWARDED[name] then
            ngx.header[name] = value
        end
    end
    local etag = response.header["ETag"]
    if type(etag) == "string" then
        ngx.header["ETag"] = store.etag_for_client(etag, #response.body)
    end
    local body = store.prefixed_problem(response.body, prefix)
    ngx.header["Content-Length"] = #body
    ngx.print(body)
end


-- Serve the last entry with a mark, because neither an app nor PostgreSQL can confirm it. The generation is the last
-- one, with or without a lease: a drop would have removed it.
local function serve_stale(path, query, status)
    local entry, _, stored_at = store.get(generations.key_of(path, query))
    if not entry then
        set_cache_status("BYPASS", "nginx; fwd=bypass")
        return ngx.exit(status)
    end
    set_cache_status("STALE", "nginx; hit; detail=stale")
    ngx.var.passed_gate = 1
    ngx.header["Age"] = math.max(0, ngx.time() - stored_at)
    return store.send(entry)
end


-- Return the response of an app. A second request may have success if the response broke off, or was noise, or if
-- PostgreSQL does not answer this app but perhaps another. After an error before any response, Nginx has tried another
-- app already.
local function fetch(fill_lease, fallback)
    local response, app, seconds = app_response.fetch(fill_lease, fallback, "")
    local last = app and app:match("[^ ,]+$") or ""
    -- Without the fill lease, which the first app may have used.
    if response.truncated and response.status < 500 or response.is_noise then
        return app_response.fetch("", fallback, last)
    elseif response.status == 503 and response.header["Postgres"] and balancer.note_without_postgres(app or "") then
        local other, other_app, other_seconds = app_response.fetch("", "answered", last)
        if other.status < 500 then
            return other, other_app, other_seconds
        end
    end
    return response, app, seconds
end


-- Fetch the response from an app and send it.
-- key: where to store the response, or nil; reason: the reason of the miss (RFC 9211); fill_lease: as from redis.read.
local function fetch_from_app(path, query, key, result, reason, fill_lease)
    local var = ngx.var
    if not shedding.enter(shedding.kind_of_read(path, query)) then
        if key then
            fills:delete(key)
        end
        return serve_stale(path, query, ngx.HTTP_SERVICE_UNAVAILABLE)
    end
    local fallback = store.get(generations.key_of(path, query)) and "stale" or "none"
    local response, app, seconds = fetch(fill_lease or "", fallback)
    shedding.leave()
    var.app, var.app_status, var.app_seconds = app or "", response.status, seconds or ""
    if response.status == 503 then
        balancer.be_patient()
    end
    local failed = response.status >= 502 and response.status <= 504 or response.truncated
    local entry = not failed and store.pack(response, var.id)
    local stored = key and entry and generations.store_if_current(path, query, key, entry)
    if key then
        fills:delete(key)
    end
    local redis_status = response.header["Cache-Status"]
    if type(redis_status) == "table" then  -- a proxy between the edge and the app has added its own
        redis_status = concat(redis_status, ", ")
    end
    var.passed_gate = redis_status and "1" or ""
    if failed then
        return serve_stale(path, query, response.truncated and 502 or response.status)
    end
    set_cache_status(result, (redis_status and redis_status .. ", " or "")
                             .. "nginx; fwd=" .. reason .. (stored and "; stored" or ""))
    if entry then
        return send(entry)
    end
    return forward(response)
end


-- In set_by_lua, so without waiting. Return the body of a hit that Nginx can send by itself, and set variables for its
-- headers; else return "". epoch: of the lease that the edge holds.
function _M.hit(epoch)
    local var = ngx.var
    -- Nginx evaluates If-Unmodified-Since and If-Match even if they are empty. A map does not tell empty from absent.
    if var.conditional ~= "0" or var.http_if_unmodified_since or var.http_if_match then
        return ""
    end
    local path, query = addresses.split(var.request_uri)
    local generation = generations.known(epoch, path)
    if not generation then
        return ""
    end
    local entry = store.get_small_fresh(generation .. query)
    if not entry and query ~= "" then  -- second, so that the spelling of the app's links costs nothing
        local spelled = addresses.canonical(query)
        entry = spelled and store.get_small_fresh(generation .. spelled)
    end
    if not entry then
        return ""
    end
    local is_missing, etag, modified, link, body = store.parts(entry)
    if is_missing then
        return ""
    end
    var.etag = etag
    var.last_modified = modified
    if link ~= "" then
        var.link = store.prefixed_links(link, var.path_prefix)
    end
    metrics.count_hit(path, query)
    return body
end


-- In content_by_lua: answer any other cached read.
function _M.answer()
    local var = ngx.var
    local path, query = addresses.split(var.request_uri)
    if var.http_if_modified_since or var.http_if_unmodified_since or var.http_if_match then
        clear_conditions()
    end
    if query ~= "" then
        local spelled = addresses.canonical(query)
        if not spelled then
            return fetch_from_app(path, query, nil, "BYPASS", "bypass")
        end
        query = spelled
    end
    local epoch, key, result, reason
    local waited_s = 0
    while true do
        epoch = lease.held()
        -- The generation is part of the key, and is noted before any request to another tier: a response that a write
        -- overtakes is then stored under a generation that no read uses again.
        local generation = epoch and generations.current(epoch, path)
        if not generation then
            return fetch_from_app(path, query, nil, "BYPASS", "bypass")
        end
        key = generation .. query
        local entry, outdated = store.get(key)
        if entry and not outdated then
            return send(entry)
        end
        result, reason = "MISS", "uri-miss"
        if entry then
            result, reason = "EXPIRED", "stale"
        end
        -- If many reads miss at once, one goes on. The others begin again with the check of the lease: they have sent
        -- no request yet, so they may as well begin now.
        if fills:add(key, true, FILL_WAIT_S) or waited_s >= FILL_WAIT_S then
            break
        end
        ngx.sleep(POLL_S)
        waited_s = waited_s + POLL_S
    end
    local entry, ttl_s, fill_lease
    if query == "" then
        entry, ttl_s, fill_lease = redis.read(epoch, path)
    end
    if not entry then
        return fetch_from_app(path, query, key, result, reason, fill_lease)
    end
    local stored = generations.store_if_current(path, query, key, entry)
    fills:delete(key)
    set_cache_status(result, "redis; hit; ttl=" .. ttl_s .. ", nginx; fwd=" .. reason .. (stored and "; stored" or ""))
    return send(entry)
end


return _M
