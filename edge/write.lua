-- A write: what is looked at before an app is asked.

local _M = {}

-- Nginx itself refuses conditions that are repeated. Of these the app would hear the first one alone: the same request
-- in another order would have another key.
local ONCE = { "Content-Type", "Idempotency-Key" }


-- In rewrite_by_lua.
function _M.begin()
    local headers = ngx.req.get_headers(0)  -- all of them, not the first 100
    for _, name in ipairs(ONCE) do
        if type(headers[name]) == "table" then
            return ngx.exit(ngx.HTTP_BAD_REQUEST)
        end
    end
end


return _M
