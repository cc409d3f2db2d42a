-- The API keys that the edge itself checks: of cached reads with AUTH=all, and of every request that counts against the
-- limit of its key (limits.lua). A key is an entry of the path `/.keys/<digest>`, under a generation like any other
-- entry: revoking a key drops its path, and without a cache lease the edge decides nothing from its memory. Apps check
-- the keys of all other requests (velikiy/http/auth.py).
--
-- The body of an entry: <scope> <second at which the key expires, or never> <id> <name> (velikiy/keys/store.py)

local app_response = require "app_response"
local encode = require "ngx.base64".encode_base64url
local ffi = require "ffi"
local generations = require "generations"
local lease = require "lease"
local limits = require "limits"
local store = require "store"

local POLL_S = 0.002
local MAX_REMEMBERED = 1000
local FETCH_WAIT_S = 0.05  -- a read waits so long for another read that fetches the same key, then it fetches it itself

local fills = ngx.shared.fills
local time = ngx.time
local find, sub = string.find, string.sub

-- OpenSSL's, which Nginx has loaded. Lua's own digests end at SHA-1.
ffi.cdef [[
unsigned char *SHA256(const unsigned char *data, size_t size, unsigned char *digest);
]]
local DIGEST_BYTES = 32
local digest = ffi.new("unsigned char[?]", DIGEST_BYTES)

local protects_console = false

local _M = {
    are_needed = false,  -- a cached read without a valid key is refused
    are_known = false,  -- a request may have a key that counts
}


-- In init_by_lua, after the limits. auth: the setting AUTH.
function _M.configure(auth)
    protects_console = auth ~= "off"
    _M.are_needed = auth == "all"
    _M.are_known = _M.are_needed or (auth == "writes" and limits.are_on())
end


-- The findings of this worker in the shared memory, by the value of Authorization: a hit computes no digest and copies
-- no entry. A verdict counts only while its path still has the generation under which the entry was found. So a
-- revocation, which drops the generation, ends the verdicts of all workers.
local verdicts, verdict_count = {}, 0


-- Return the path of the request's key; nil if it has none, or something else than a key
-- (edge/conf/generated/authorization.conf).
local function path_of_key()
    local token = ngx.var.api_key
    if token == "" or token == "?" then
        return nil
    end
    ffi.C.SHA256(token, #token, digest)
    return "/.keys/" .. encode(ffi.string(digest, DIGEST_BYTES))
end


-- Return the second at which a key with this body ends: 0 if it is revoked.
local function end_of(body)
    local scope_end = find(body, " ", 1, true)
    local expires_at = sub(body, scope_end + 1, find(body, " ", scope_end + 1, true) - 1)
    if sub(body, 1, scope_end - 1) == "none" then
        return 0
    end
    return expires_at == "never" and math.huge or tonumber(expires_at)
end


-- Return the verdict about the request's key from the shared memory; nil if the memory has no entry of it.
local function look_up(epoch, header)
    local path = path_of_key()
    local generation = path and generations.known(epoch, path)
    local entry, fresh_until
    if generation then
        entry, fresh_until = store.get_until(generation)
    end
    if not entry then
        return nil
    end
    local _, _, _, _, body = store.parts(entry)
    local verdict = { epoch = epoch, path = path, epoch_and_path = epoch .. path, generation = generation,
                      ends_at = end_of(body), fresh_until = fresh_until }
    if verdict_count >= MAX_REMEMBERED then
        verdicts, verdict_count = {}, 0
    end
    verdict_count = verdicts[header] and verdict_count or verdict_count + 1
    verdicts[header] = verdict
    return verdict
end


-- In set_by_lua, so without waiting. Return the verdict about the request's key; nil if it has no key, or if the key is
-- not in memory or not valid.
-- epoch: of the lease that the edge holds.
function _M.valid(epoch)
    local header = ngx.var.http_authorization
    if not header then
        return nil
    end
    local verdict = verdicts[header]
    if not verdict or verdict.epoch ~= epoch or time() >= verdict.fresh_until
        or not generations.is_current(verdict.epoch_and_path, verdict.generation) then
        verdict = look_up(epoch, header)
    end
    return verdict and time() < verdict.ends_at and verdict or nil
end


-- Return whether the request has a key, valid or not.
function _M.is_sent()
    local token = ngx.var.api_key
    return token ~= "" and token ~= "?" and sub(ngx.var.uri, 1, 2) ~= "/."  -- no key opens such an address
end


-- Return whether the verdict allows a hit: a key is fetched again after EDGE_TTL. Until then, and until its generation
-- is dropped, it is the same key for the limits.
function _M.admits(verdict)
    return verdict and time() < verdict.fresh_until
end


-- Return whether the request has a valid key, and the key's path; nil and a status if no app answers. A key that is not
-- in memory is fetched from an app, and stored if the edge has its lease.
local function check(path)
    local generation
    local waited_s = 0
    while true do
        local epoch = lease.held()
        generation = epoch and generations.current(epoch, path)  -- before the request, as in read.lua
        local entry = generation and store.get_small_fresh(generation)
        if entry then
            local _, _, _, _, body = store.parts(entry)
            return time() < end_of(body)
        elseif not generation or fills:add(generation, true, FETCH_WAIT_S) or waited_s >= FETCH_WAIT_S then
            break
        end
        ngx.sleep(POLL_S)
        waited_s = waited_s + POLL_S
    end
    local response = app_response.fetch_key(path)
    local is_known = response.status == 200 and not response.truncated
    if generation then
        local entry = is_known and store.pack(response, "")
        if entry then
            generations.store_if_current(path, "", generation, entry)
        elseif not is_known then
            generations.drop(path)  -- its memory: anyone can make up any number of keys
        end
        fills:delete(generation)
    end
    if response.status == 404 then
        return false
    elseif not is_known then
        return nil, response.status >= 502 and response.status <= 504 and response.status or 502
    end
    return time() < end_of(response.body)
end


-- In access_by_lua of every route that reaches an app. Count the request for its key or its client, if entrance.lua did
-- not know yet which (limits.lua), and refuse a cached read that needs a key and has none.
-- is_console: the edge answers the request by itself, with data of the console.
function _M.admit(is_console)
    local var = ngx.var
    local is_needed = is_console and protects_console or _M.are_needed and var.route == "@read"
    local is_uncounted = var.uncounted == "1"
    if not (is_needed or is_uncounted) then
        return
    end
    local path = path_of_key()
    local is_valid, failure = false, nil
    if path then
        is_valid, failure = check(path)
    end
    if is_uncounted and limits.count(is_valid and path or nil) then
        return ngx.exit(429)
    end
    if is_needed and failure then
        return ngx.exit(failure)
    elseif is_needed and not is_valid then
        return ngx.exit(ngx.HTTP_UNAUTHORIZED)
    end
end


return _M
