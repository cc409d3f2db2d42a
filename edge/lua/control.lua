-- The control listener: writers drop paths there, and operators look at entries. Clients do not reach it.

local generations = require "generations"
local lease = require "lease"
local canonical = require("query").canonical
local renewal = require "renewal"
local store = require "store"

local _M = {}


-- Drop the paths in the body, one a line, or every path for `*`. The epoch is not checked, because an additional drop
-- is harmless. The instance id is checked: the drop may be meant for an edge that had this address before, and that
-- runs elsewhere now.
function _M.drop()
    if ngx.var.http_x_edge ~= renewal.instance_id() then
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


-- Send one `name value` a line: the lease, and the entry of the address in ?uri=.
function _M.show()
    local lines = { "instance_id " .. renewal.instance_id(), "lease " .. lease.left_ms() }
    local uri = ngx.var.arg_uri and ngx.unescape_uri(ngx.var.arg_uri)
    local path, query = (uri or ""):match("^([^?]*)(.*)$")
    local generation = generations.known(lease.epoch(), path)
    if generation then
        lines[#lines + 1] = "generation " .. generation
        local entry, _, stored_at = store.get(generation .. (query ~= "" and canonical(query) or query))
        if entry then
            lines[#lines + 1] = "size " .. #entry
            lines[#lines + 1] = "age " .. ngx.time() - stored_at
        end
    end
    ngx.say(table.concat(lines, "\n"))
end


return _M
