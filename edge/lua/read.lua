-- A cached read, tier by tier: what this edge keeps, Redis, an app; where none of them can tell, what was true last.

local store = require "store"
local generations = require "generations"
local lease = require "lease"
local redis = require "redis"

local POLL = 0.002     -- seconds
local PATIENCE = 0.05  -- seconds that a read waits for another one's fill; then it asks for itself

local fills = ngx.shared.fills
local find, sub = string.find, string.sub  -- these are compiled; match is not
local concat = table.concat

local _M = {}

-- Of the app's header what is for Nginx, and what Nginx says itself (nginx.conf).
local OURS = { ["Cache-Control"] = true, ["Cache-Status"] = true, ["Connection"] = true, ["Date"] = true,
               ["Keep-Alive"] = true, ["Server"] = true, ["Transfer-Encoding"] = true, ["X-Accel-Expires"] = true,
               ["X-Content-Type-Options"] = true, ["X-Request-Id"] = true }


-- Nginx would compare these dates with Last-Modified, and say of what two writes did within a second that nothing has
-- changed. HTTP leaves a cache free to ignore them; `if_modified_since off` would ignore If-None-Match beside them.
-- If-Match of a read is for the origin alone (RFC 9111, 4.3.2): to refuse for it, Nginx would break off what Lua is
-- sending, and its worker would crash.
local function forget_conditions()
    ngx.req.clear_header("If-Modified-Since")
    ngx.req.clear_header("If-Unmodified-Since")
    ngx.req.clear_header("If-Match")
end


-- What came of it; unsaid, it is a hit (nginx.conf).
local function say(result, status)
    ngx.var.cache_result = result
    ngx.var.cache_status = status
end


-- The app's answer as it is.
local function pass_on(answer)
    ngx.status = answer.status
    for name, value in pairs(answer.header) do
        if not OURS[name] then
            ngx.header[name] = value
        end
    end
    ngx.print(answer.body)
end


-- Under which an answer is found now; a path that has lost its name has none.
local function key_of(path, query)
    return (generations.known(lease.epoch(), path) or "") .. query
end


-- Nobody could tell what is true: better what was true, and marked, than nothing. Under the name that is the last one,
-- whether there is a lease for it or not: what is known to be outdated has lost its name.
local function stale(path, query, status)
    local entry, _, stored = store.get(key_of(path, query))
    if not entry then
        say("BYPASS", "nginx; fwd=bypass")
        return ngx.exit(status)
    end
    say("STALE", "nginx; hit; detail=stale")
    ngx.var.fenced = 1
    ngx.header["Age"] = math.max(0, ngx.time() - stored)
    return store.send(entry)
end


-- Whether it is kept. Not where a write has taken the name away meanwhile: nobody asks for that one again, and it would
-- have its place until others need it. Looked at afterwards: a drop that comes later finds the entry and forgets it.
local function keep(path, query, key, entry)
    local kept = store.put(key, entry)
    if key_of(path, query) ~= key then
        store.forget(key)
        return false
    end
    return kept
end


-- From an app. key: where to keep it, or nil; lease_to_fill: as redis_tier.read gives it.
local function ask(path, query, key, result, why, lease_to_fill)
    local var, told = ngx.var, {}
    local answer = ngx.location.capture("/.app", { vars = { fill_lease = lease_to_fill or "" }, ctx = told })
    var.app, var.app_status, var.app_seconds = told.app or "", answer.status, told.seconds or ""
    local failed = answer.status >= 502 and answer.status <= 504 or answer.truncated
    local entry = not failed and store.pack(answer, var.id)
    local stored = key and entry and keep(path, query, key, entry)
    if key then
        fills:delete(key)
    end
    local tier2 = answer.header["Cache-Status"]
    if type(tier2) == "table" then  -- what stands between us and the app has said something too
        tier2 = concat(tier2, ", ")
    end
    var.fenced = tier2 and "1" or ""
    if failed then
        return stale(path, query, answer.truncated and 502 or answer.status)
    end
    say(result, (tier2 and tier2 .. ", " or "") .. "nginx; fwd=" .. why .. (stored and "; stored" or ""))
    if entry then
        return store.send(entry)
    end
    return pass_on(answer)
end


-- An address' path, and the rest from its "?" on.
local function split(uri)
    local cut = find(uri, "?", 1, true)
    if cut then
        return sub(uri, 1, cut - 1), sub(uri, cut)
    end
    return uri, ""
end


-- In set_by_lua, so without waiting for anything: the body of a hit, if it is one that Nginx can send by itself, and in
-- variables what goes into its header; else nothing. (No `return f()` here: LuaJIT would not compile it.)
function _M.hit()
    local var = ngx.var
    -- Two Nginx looks at even where they are empty, which a map does not tell from absent.
    if var.conditional ~= "0" or var.http_if_unmodified_since or var.http_if_match then
        return ""
    end
    local path, query = split(var.request_uri)
    local epoch = lease.held()
    local generation = epoch and generations.known(epoch, path)
    local entry = generation and store.at_hand(generation .. query)
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
        var.link = link
    end
    return body
end


-- In content_by_lua: any other.
function _M.answer()
    local var = ngx.var
    local path, query = split(var.request_uri)
    if var.http_if_modified_since or var.http_if_unmodified_since or var.http_if_match then
        forget_conditions()
    end
    local epoch, key, result, why
    local waited = 0
    while true do
        epoch = lease.held()
        -- The name that is part of the key, for once and before anything is asked of anybody: an answer that a write
        -- overtakes is then stored under a name that nobody asks for any more.
        local generation = epoch and generations.current(epoch, path)
        if not generation then
            return ask(path, query, nil, "BYPASS", "bypass")
        end
        key = generation .. query
        local entry, outdated = store.get(key)
        if entry and not outdated then
            return store.send(entry)
        end
        result, why = "MISS", "uri-miss"
        if entry then
            result, why = "EXPIRED", "stale"
        end
        -- Of many that miss at once one asks; and again from the lease on: this read has asked for nothing yet, so it
        -- may as well begin now.
        if fills:add(key, true, PATIENCE) or waited >= PATIENCE then
            break
        end
        ngx.sleep(POLL)
        waited = waited + POLL
    end
    local entry, more
    if query == "" then
        entry, more = redis.read(epoch, path)
    end
    if not entry then
        return ask(path, query, key, result, why, more)
    end
    local stored = keep(path, query, key, entry)
    fills:delete(key)
    say(result, "redis; hit; ttl=" .. more .. ", nginx; fwd=" .. why .. (stored and "; stored" or ""))
    return store.send(entry)
end


return _M
