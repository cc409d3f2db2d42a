-- A write: what is looked at before an app is asked.

local _M = {}

-- What the app would not hear as it was said: Nginx passes on the first of two, and none that is empty. A write whose
-- condition is lost on the way overwrites what it was to spare; of two keys each order would be another request.
local ONCE = { "Content-Type", "If-Match", "If-None-Match", "If-Unmodified-Since", "Idempotency-Key" }


-- In rewrite_by_lua.
function _M.begin()
    local headers = ngx.req.get_headers(0)  -- all of them, not the first 100
    for _, name in ipairs(ONCE) do
        local value = headers[name]
        if value == "" or type(value) == "table" then
            return ngx.exit(ngx.HTTP_BAD_REQUEST)
        end
    end
end


return _M
