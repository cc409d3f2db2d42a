-- The API keys of cached reads, with AUTH=all. A key is an entry of the path `/.keys/<digest>`, under a generation like
-- any other entry: revoking a key drops its path, and without a cache lease the edge decides nothing
-- from its memory. Apps check the keys of all other requests (velikiy/http/auth.py).
--
-- The body of an entry: <scope> <second at which the key expires, or never> <id> <name> (velikiy/keys/store.py)

local encode = require "ngx.base64".encode_base64url
local ffi = require "ffi"
local generations = require "generations"
local lease = require "lease"
local origin = require "origin"
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

local _M = { are_needed = false }


-- auth: the setting AUTH.
function _M.configure(auth)
    _M.are_needed = auth == "all"
end


-- Two results of this worker that never change, since to compute them for each hit takes as long as the look-ups: the
-- path of the key in a header, and the second at which an entry is of no use. Neither says that a key is valid.
local paths, path_count = {}, 0
local ends, end_count = {}, 0


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


local function remember_path(path)
    if path_count >= MAX_REMEMBERED then
        paths, path_count = {}, 0
    end
    paths[ngx.var.http_authorization] = path
    path_count = path_count + 1
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


local function entry_may_read(entry)
    local ends_at = ends[entry]
    if not ends_at then
        local _, _, _, _, body = store.parts(entry)
        ends_at = end_of(body)
        if end_count >= MAX_REMEMBERED then
            ends, end_count = {}, 0
        end
        ends[entry] = ends_at
        end_count = end_count + 1
    end
    return time() < ends_at
end


-- In set_by_lua, so without waiting. Return whether the request has a key that is in memory and may read. If not, the
-- location @read decides (admit). epoch: of the lease that the edge holds.
function _M.admits(epoch)
    local header = ngx.var.http_authorization
    local path = header and paths[header]
    local generation = path and generations.known(epoch, path)
    local entry = generation and store.get_small_fresh(generation)
    return entry and entry_may_read(entry) or false
end


local function refuse()
    return ngx.exit(ngx.HTTP_UNAUTHORIZED)
end


-- In access_by_lua: refuse a cached read without a valid key. A key that is not in memory is fetched from an app, and
-- stored if the edge has its lease.
function _M.admit()
    local path = path_of_key()
    if not path then
        return refuse()
    end
    local generation
    local waited_s = 0
    while true do
        local epoch = lease.held()
        generation = epoch and generations.current(epoch, path)  -- before the request, as in read.lua
        local entry = generation and store.get_small_fresh(generation)
        if entry and entry_may_read(entry) then
            return remember_path(path)
        elseif entry then
            return refuse()
        elseif not generation or fills:add(generation, true, FETCH_WAIT_S) or waited_s >= FETCH_WAIT_S then
            break
        end
        ngx.sleep(POLL_S)
        waited_s = waited_s + POLL_S
    end
    local response = origin.fetch_key(path)
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
        return refuse()
    elseif not is_known then
        return ngx.exit(response.status >= 502 and response.status <= 504 and response.status or 502)
    end
    if time() >= end_of(response.body) then
        return refuse()
    end
    remember_path(path)
end


return _M
