-- The parts of an address: the path, and the query that selects one of its responses. The address of a history is the
-- path of its row with a query that begins with "/history" (velikiy/resources/base.py:history_address).
--
-- A query has one spelling, under which its response is stored: that of the app's own links
-- (velikiy/resources/pagination.py:Page.variant). A query in this spelling stays as it is.

local gmatch, gsub, byte, char, format = string.gmatch, string.gsub, string.byte, string.char, string.format
local find, match, sub = string.find, string.match, string.sub  -- of these, LuaJIT compiles find and sub

local HISTORY = require("constants").HISTORY

local _M = {}


local function decode(hex)
    return char(tonumber(hex, 16))
end


local function encode(character)
    return format("%%%02X", byte(character))
end


-- Return the path of an address, and the rest of it: "", "?limit=5", "/history", "/history?limit=5".
function _M.split(uri)
    local rest = find(uri, "?", 1, true) or #uri + 1
    -- 121 is "y": most addresses of rows end in a digit, and need no further look.
    if byte(uri, rest - 1) == 121 and sub(uri, rest - #HISTORY, rest - 1) == HISTORY
        and find(uri, "^%d", rest - #HISTORY - 1) then
        rest = rest - #HISTORY
    end
    if rest > #uri then
        return uri, ""
    end
    return sub(uri, 1, rest - 1), sub(uri, rest)
end


-- Return the query with its parameters sorted by name, and with each value percent-encoded where it has to be. The app
-- reads both spellings as the same values. Return nil if a parameter is repeated, which the app refuses. The query is
-- one that edge/conf/generated/routes.conf accepts: names without encoding, and no malformed encoding.
function _M.canonical(query)
    local parameters, names = {}, {}
    for name, value in gmatch(query, "([^?&=]+)=([^&]+)") do
        if names[name] then
            return nil
        end
        names[name] = true
        value = gsub(gsub(value, "%+", " "), "%%(%x%x)", decode)
        parameters[#parameters + 1] = name .. "=" .. gsub(value, "[^%w._~-]", encode)
    end
    local beginning = match(query, "^[^?]*")
    if #parameters == 0 then
        return beginning
    end
    table.sort(parameters)
    return beginning .. "?" .. table.concat(parameters, "&")
end


return _M
