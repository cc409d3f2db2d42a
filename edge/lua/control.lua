-- What writers and people ask of an edge, on a listener of its own that clients do not reach.

local store = require "store"
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


-- One `name value` a line: the lease, and with ?uri=... what is known of it.
function _M.show()
    local lines = { "place " .. lease.place(), "lease " .. lease.left() }
    local uri = ngx.var.arg_uri and ngx.unescape_uri(ngx.var.arg_uri)
    local path, query = (uri or ""):match("^([^?]*)(.*)$")
    local generation = generations.known(lease.epoch(), path)
    if generation then
        lines[#lines + 1] = "generation " .. generation
        local entry, _, stored = store.get(generation .. query)
        if entry then
            lines[#lines + 1] = "size " .. #entry
            lines[#lines + 1] = "age " .. ngx.time() - stored
        end
    end
    ngx.say(table.concat(lines, "\n"))
end


return _M
