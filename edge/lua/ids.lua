-- Strings that are never used twice: generations, and the tokens of fill leases.

local state = ngx.shared.state

local _M = {}


-- In init_by_lua, which runs again on each reload: `add` keeps the value of this run.
function _M.configure()
    local random = assert(io.open("/dev/urandom", "rb"))
    local bytes = random:read(8)
    random:close()
    state:add("run", (bytes:gsub(".", function(byte) return string.format("%02x", byte:byte()) end)))
end


-- Return the random part that belongs to this run of the edge.
function _M.run()
    return state:get("run")
end


-- Return a string that no run has used before.
function _M.fresh()
    return state:get("run") .. string.format(".%d", state:incr("ids", 1, 0))
end


return _M
