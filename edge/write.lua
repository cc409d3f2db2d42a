-- A write: what is looked at before an app is asked.

local _M = {}

-- Of these Nginx passes on the first one alone: with another one behind it a condition would be half a condition, and
-- the same request in another order would have another key.
local ONCE = { "Content-Type", "If-Match", "If-None-Match", "If-Unmodified-Since", "Idempotency-Key" }


-- In rewrite_by_lua.
function _M.begin()
    local headers = ngx.req.get_headers(0)  -- all of them, not the first 100
    for _, name in ipairs(ONCE) do
        if type(headers[name]) == "table" then
            ngx.var.repeated = name
            return ngx.exit(ngx.HTTP_BAD_REQUEST)
        end
    end
end


return _M
