-- The one spelling of a query, under which its response is stored: that of the app's own links
-- (velikiy/resources/pagination.py:Page.variant). A query in this spelling stays as it is.

local gmatch, gsub, byte, char, format = string.gmatch, string.gsub, string.byte, string.char, string.format

local _M = {}


local function decode(hex)
    return char(tonumber(hex, 16))
end


local function encode(character)
    return format("%%%02X", byte(character))
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
    table.sort(parameters)
    return "?" .. table.concat(parameters, "&")
end


return _M
