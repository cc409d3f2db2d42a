-- What this edge keeps: whole answers, in memory that all workers share, each under the name that its path had when it
-- was asked for (generations.lua). Nginx' own cache keeps files; a hit there costs half as much again.
--
-- An entry has the form that it has in Redis (velikiy/coherence/entry.py):
-- <status>\t<etag>\t<last-modified>\t<link>\n<body>. A 404 is the problem without its request's id, which is each
-- request's own.

local small = ngx.shared.small
local large = ngx.shared.large
local time = ngx.time
local find, sub, byte = string.find, string.sub, string.byte  -- these are compiled; match is not

-- Bytes. What is larger takes whole pages of memory, and finding them in a row may push out hundreds of small ones.
local SMALL = 1800

local _M = {}

local ttl


function _M.configure(edge_ttl)
    ttl = tonumber(edge_ttl)
end


-- The entry, if it is a small one and in its time; or nil.
function _M.at_hand(key)
    local entry, stored = small:get(key)
    if entry and time() < stored + ttl then
        return entry
    end
end


-- The entry, whether its time is over, and when it was stored; or nil. One that is outdated by its age stays until
-- others need its place: an edge that nobody can tell what is true shows it, marked (read.lua).
function _M.get(key)
    local entry, stored = small:get(key)
    if not entry then
        entry, stored = large:get(key)
        if not entry then
            return nil
        end
    end
    return entry, time() >= stored + ttl, stored
end


-- Whether it is kept. What has no place pushes out what was asked for longest ago.
function _M.put(key, entry)
    local kept, other = small, large
    if #entry > SMALL then
        kept, other = large, small
    end
    other:delete(key)  -- where one that is outdated may be, of another size, which would be found instead
    return (kept:set(key, entry, 0, time()))
end


-- Under a name that nobody will ask for again: its place is free at once.
function _M.forget(key)
    small:delete(key)
    large:delete(key)
end


-- Of an answer of the app's; nil where it is none that may be kept: it did not come through the fence, or was read
-- while somebody wrote.
function _M.pack(answer, request_id)
    local header = answer.header
    if answer.truncated or not header["Cache-Status"] or header["X-Accel-Expires"] == "0" then
        return nil
    end
    local etag, modified, link = header["ETag"] or "", header["Last-Modified"] or "", header["Link"] or ""
    if type(etag) == "table" or type(modified) == "table" or type(link) == "table" then
        return nil  -- said more than once: not by our apps
    end
    local body = answer.body
    if answer.status == 404 then
        local own = ',"request_id":"' .. request_id .. '"}'
        if sub(body, -#own) ~= own then
            return nil
        end
        body = sub(body, 1, -#own - 1) .. "}"
    elseif answer.status ~= 200 then
        return nil
    end
    return answer.status .. "\t" .. etag .. "\t" .. modified .. "\t" .. link .. "\n" .. body
end


-- Whether it is a 404; ETag, Last-Modified and Link, each empty if there is none; the body.
function _M.parts(entry)
    local etag = find(entry, "\t", 5, true)
    local modified = find(entry, "\t", etag + 1, true)
    local link = find(entry, "\n", modified + 1, true)
    return byte(entry) == 52,  -- "4"
        sub(entry, 5, etag - 1), sub(entry, etag + 1, modified - 1), sub(entry, modified + 1, link - 1),
        sub(entry, link + 1)
end


-- Answers the request with it. A condition (If-None-Match) Nginx looks at on the way out.
function _M.send(entry)
    local header = ngx.header
    local is_missing, etag, modified, link, body = _M.parts(entry)
    if is_missing then
        ngx.status = 404
        header["Content-Type"] = "application/problem+json"
        body = sub(body, 1, -2) .. ',"request_id":"' .. ngx.var.id .. '"}'
    end
    if etag ~= "" then
        header["ETag"] = etag
    end
    if modified ~= "" then
        header["Last-Modified"] = modified
    end
    if link ~= "" then
        header["Link"] = link
    end
    header["Content-Length"] = #body
    ngx.print(body)
end


return _M
