-- The names that may stand in Host, by the rules of velikiy/http/browsers.py:allowed_hosts. While clients reach the
-- edge on a loopback address only, a foreign name belongs to a web page that rebinds its DNS name to read what its
-- reader can reach. A cached response is refused as well, so this is a step of entrance.lua.

local find, sub, byte = string.find, string.sub, string.byte  -- LuaJIT compiles these, and not match

local _M = {}

local names  -- nil: every name is allowed
local domains = {}  -- ".users.example": this name, and every name below it
local any_address = false


-- In init_by_lua, where an error stops the start.
-- bind: the address where clients reach this edge; list: ALLOWED_HOSTS.
function _M.configure(bind, list)
    bind = bind:gsub("[%[%]]", "")
    local members = {}
    for member in list:lower():gmatch("[^,%s]+") do
        if not (member == "*" or member:find("^%.?[%w_][%w_.-]*$") or member:find("^%[[%x:.]+%]$")) then
            error("ALLOWED_HOSTS='" .. list .. "' is not allowed: it must be names separated by commas, without a "
                  .. "port: users.example, or .users.example for a name and all names below it, or * for every name", 0)
        end
        members[#members + 1] = member
    end
    names = { ["localhost"] = true, ["127.0.0.1"] = true, ["[::1]"] = true,
              [bind:find(":", 1, true) and "[" .. bind .. "]" or bind] = true }
    for _, member in ipairs(members) do
        names[member] = true
        if byte(member) == 46 then  -- "."
            domains[#domains + 1] = member
        end
    end
    any_address = bind == "0.0.0.0" or bind == "::"
    local is_loopback = bind == "localhost" or bind == "::1" or bind:find("^127%.")
    if names["*"] or not (is_loopback or #members > 0) then
        names = nil
    end
end


-- A step of entrance.lua. Nginx has removed the port and made the name lower case.
function _M.refuse()
    if not names then
        return nil
    end
    local host = ngx.var.host
    if names[host] or any_address and (find(host, "^%d+%.%d+%.%d+%.%d+$") or byte(host) == 91) then  -- "["
        return nil
    end
    for i = 1, #domains do
        if sub("." .. host, -#domains[i]) == domains[i] then
            return nil
        end
    end
    return 421
end


return _M
