-- The route of a request, for the metrics and for the log. A mistyped address may be a name or an e-mail address, so
-- only addresses of resources that an app has named are known.

local state = ngx.shared.state
local match = string.match

local _M = {}

local known, known_text = {}, nil


-- Return whether the app has such a resource. An app names them with each cache lease (velikiy/http/edge_leases.py).
local function is_resource(name)
    local text = state:get("resources")
    if text ~= known_text then
        known, known_text = {}, text
        for resource in (text or ""):gmatch("([^: ]+):[^ ]*") do
            known[resource] = true
        end
    end
    return known[name]
end


-- Return the name of the resource, and what follows it in the path. nil means that no route is known.
local function parts_of(var)
    local resource, rest = match(var.request_uri, "^/([a-z][a-z0-9_]*)([^?]*)")
    if not (resource and is_resource(resource)) then
        return nil
    end
    return resource, (rest == "" or rest == "/count" or rest == "/batch" or match(rest, "^/%d+$")
                      or match(rest, "^/%d+/history$")) and rest
end


-- Return the route of an address: there are few routes, and any number of paths.
function _M.route_of(var)
    local resource, rest = parts_of(var)
    if not resource then
        return var.own_path
    end
    if not rest then
        return "(other)"
    end
    return "/" .. resource .. rest:gsub("^/%d+", "/{id}")
end


-- Return whether a route is one of a resource, whose responses are cached.
function _M.is_cached(route)
    return is_resource(match(route, "^/([a-z][a-z0-9_]*)") or "") and true or false
end


-- In log_by_lua, which runs before the access log: note the path of a route whatever the response is. Without this,
-- only a response of the app could show that the path is one.
function _M.note_path()
    local var = ngx.var
    local resource, rest = parts_of(var)
    if resource and rest then
        var.known_path = "/" .. resource .. rest
    end
end


return _M
