-- Tier 1: whole responses in memory that all workers share. The key of each contains the generation that its path had
-- when the response was requested (generations.lua).
--
-- An entry has the form that it has in Redis (velikiy/coherence/entry.py):
-- <status>\t<etag>\t<last-modified>\t<link>\n<body>. The body of a 404 is the problem without the id of the request,
-- which differs for each request.
--
-- Gains: a hit takes two thirds of the CPU time of a hit in Nginx's own cache, which keeps files.
-- Relies on: shared dictionaries, which evict the entry that was used longest ago.
-- Remove when: proxy_cache can keep responses in memory.

local metrics = require "metrics"

local small = ngx.shared.small
local large = ngx.shared.large
local time = ngx.time
local find, sub, byte = string.find, string.sub, string.byte  -- LuaJIT compiles these, and not match
local gsub = string.gsub

-- A larger entry takes whole pages of memory: to find them in a row, Nginx may evict hundreds of small entries.
local MAX_SMALL_BYTES = 1800
local MIN_COMPRESSED_BYTES = 2048  -- edge/conf/compression.conf, gzip_min_length

local PROBLEM = '{"type":"/'

local _M = {}

local ttl_s


-- Return whether an entry is within its TTL. An entry from the future is not: the clock was set back since.
local function is_fresh(stored_at)
    local now = time()
    return now < stored_at + ttl_s and stored_at <= now
end


function _M.configure(edge_ttl)
    ttl_s = tonumber(edge_ttl)
end


-- Return the entry if it is small and within its TTL, else nil.
function _M.get_small_fresh(key)
    local entry, stored_at = small:get(key)
    if entry and is_fresh(stored_at) then
        return entry
    end
end


-- Return a small entry and the second until which it is within its TTL, which may be over; or nil.
function _M.get_until(key)
    local entry, stored_at = small:get(key)
    if entry then
        return entry, is_fresh(stored_at) and stored_at + ttl_s or 0
    end
end


-- Return the entry, whether its TTL is over, and when it was stored; or nil. An entry stays after its TTL until others
-- need its memory: an edge that reaches no app serves it with a mark (read.lua).
function _M.get(key)
    local entry, stored_at = small:get(key)
    if not entry then
        entry, stored_at = large:get(key)
        if not entry then
            return nil
        end
    end
    return entry, not is_fresh(stored_at), stored_at
end


-- Store an entry and return whether that succeeded. A new entry evicts the entry that was used longest ago.
function _M.put(key, entry)
    local dictionary, other, name = small, large, "small"
    if #entry > MAX_SMALL_BYTES then
        dictionary, other, name = large, small, "large"
    end
    other:delete(key)  -- an outdated entry of another size, which would be found instead
    local stored, _, evicted = dictionary:set(key, entry, 0, time())
    if evicted then
        metrics.count('evictions_total{store="' .. name .. '"}')
    end
    return stored
end


-- Free the memory of an entry whose generation no read will use again.
function _M.forget(key)
    small:delete(key)
    large:delete(key)
end


-- Return an app's response as an entry; nil if it must not be stored: it did not pass the gate, or a writer was in
-- flight.
function _M.pack(response, request_id)
    local header = response.header
    if response.truncated or not header["Cache-Status"] or header["X-Accel-Expires"] == "0" then
        return nil
    end
    local etag, modified, link = header["ETag"] or "", header["Last-Modified"] or "", header["Link"] or ""
    if type(etag) == "table" or type(modified) == "table" or type(link) == "table" then
        return nil  -- a repeated header: our apps send each once
    end
    local body = response.body
    if response.status == 404 then
        local id = ',"request_id":"' .. request_id .. '"}'
        if sub(body, -#id) ~= id then
            return nil
        end
        body = sub(body, 1, -#id - 1) .. "}"
    elseif response.status ~= 200 then
        return nil
    end
    return response.status .. "\t" .. etag .. "\t" .. modified .. "\t" .. link .. "\n" .. body
end


function _M.is_missing(entry)
    return byte(entry) == 52  -- "4" of 404
end


-- Return whether the entry is a 404; ETag, Last-Modified and Link, each empty if it is absent; and the body.
function _M.parts(entry)
    local etag = find(entry, "\t", 5, true)
    local modified = find(entry, "\t", etag + 1, true)
    local link = find(entry, "\n", modified + 1, true)
    return byte(entry) == 52,  -- "4"
        sub(entry, 5, etag - 1), sub(entry, etag + 1, modified - 1), sub(entry, modified + 1, link - 1),
        sub(entry, link + 1)
end


-- Return the ETag under which this client may receive the response. Nginx makes it weak when it compresses, but not in
-- a 304, and a cache must not update what it stores under a weak tag by a 304 with a strong one (RFC 9111, 4.3.4). So a
-- response that may be compressed has a weak ETag in either case.
function _M.etag_for_client(etag, bytes)
    local accepted = bytes >= MIN_COMPRESSED_BYTES and ngx.var.http_accept_encoding
    if accepted and find(accepted:lower(), "gzip", 1, true) and sub(etag, 1, 1) == '"' then
        return "W/" .. etag
    end
    return etag
end


-- Return a Link header with the path prefix of a request (edge/conf/proxies.conf) in its addresses.
function _M.prefixed_links(link, prefix)
    if prefix == "" then
        return link
    end
    return (gsub(link, "</", "<" .. prefix .. "/"))
end


-- Return a problem with the path prefix of a request in its `type`, which is the first member.
function _M.prefixed_problem(body, prefix)
    if prefix == "" or sub(body, 1, #PROBLEM) ~= PROBLEM then
        return body
    end
    return '{"type":"' .. prefix .. sub(body, #PROBLEM)
end


-- Send the entry as the response. Nginx itself evaluates If-None-Match on the way out.
function _M.send(entry)
    local header = ngx.header
    local is_missing, etag, modified, link, body = _M.parts(entry)
    if is_missing then
        ngx.status = 404
        header["Content-Type"] = "application/problem+json"
        body = sub(_M.prefixed_problem(body, ngx.var.path_prefix), 1, -2) .. ',"request_id":"' .. ngx.var.id .. '"}'
    end
    if etag ~= "" then
        header["ETag"] = _M.etag_for_client(etag, #body)
    end
    if modified ~= "" then
        header["Last-Modified"] = modified
    end
    if link ~= "" then
        header["Link"] = _M.prefixed_links(link, ngx.var.path_prefix)
    end
    header["Content-Length"] = #body
    ngx.print(body)
end


return _M
