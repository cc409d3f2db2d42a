-- What writers and people ask of an edge, on a listener of its own that clients do not reach.

local lease = require "lease"
local generations = require "generations"

local _M = {}


-- The body: paths, one a line, or `*`. Which epoch the writer knows of does not matter, a path may be dropped too
-- often; but it has to be this edge: at an address where another one was, that other one may live on elsewhere.
function _M.drop()
    if ngx.var.http_x_edge ~= lease.place() then
        return ngx.exit(ngx.HTTP_CONFLICT)
    end
    ngx.req.read_body()
    local body = ngx.req.get_body_data()
    if not body then
        return ngx.exit(ngx.HTTP_BAD_REQUEST)
    end
    if body == "*" then
        generations.drop_all()
    else
        for path in body:gmatch("[^\n]+") do
            generations.drop(path)
        end
    end
    return ngx.exit(ngx.HTTP_NO_CONTENT)
end


-- Bytes of an entry in Nginx' cache, and until when it is fresh (seconds since 1970): its file is named by the key's
-- MD5 and begins with a version (8 bytes) and that time (ngx_http_file_cache_header_t).
local function entry(data, key)
    local name = ngx.md5(key)
    local file = io.open(data .. "/cache/" .. name:sub(-1) .. "/" .. name:sub(-3, -2) .. "/" .. name, "rb")
    if not file then
        return nil
    end
    local head = file:read(16)
    local size = file:seek("end")
    file:close()
    if not head or #head < 16 then
        return nil
    end
    local fresh_until = 0
    for i = 16, 9, -1 do
        fresh_until = fresh_until * 256 + head:byte(i)
    end
    return size, fresh_until
end


-- One `name value` a line: the lease, and with ?uri=... what is known of it.
function _M.show(data)
    local lines = { "place " .. lease.place(), "lease " .. lease.left() }
    local uri = ngx.var.arg_uri and ngx.unescape_uri(ngx.var.arg_uri)
    local generation = uri and generations.known(lease.epoch(), uri:match("^[^?]+"))
    if generation then
        lines[#lines + 1] = "generation " .. generation
        local size, fresh_until = entry(data, generation .. uri)
        if size then
            lines[#lines + 1] = "size " .. size
            lines[#lines + 1] = "fresh " .. fresh_until - ngx.time()
        end
    end
    ngx.say(table.concat(lines, "\n"))
end


return _M
