-- Each path has a generation, a name that is part of its key in the cache. To drop a path is to forget the name:
-- the next read gives it one that was never used, so whatever lies in the cache, or is on its way there, is not found
-- again. The names are in a dictionary of their own, which may lose any of them at any time: that costs a miss.

local store = require "store"
local lease = require "lease"

local names = ngx.shared.generations

local _M = {}


-- The name of this path in this epoch.
function _M.current(epoch, path)
    local key = epoch .. path
    local name = names:get(key)
    while not name do
        -- Never a default: an entry that was stored under it before would be found again. `add`, since somebody else
        -- may be faster: both have to go on with the same one.
        local fresh = lease.fresh()
        local added, why = names:add(key, fresh)
        if added then
            return fresh
        elseif why ~= "exists" then
            return nil  -- no memory at all, not even for what is evicted for it: not cached
        end
        name = names:get(key)
    end
    return name
end


-- The same, but only if there is one: where nothing is to be asked for, a new one would find nothing.
function _M.known(epoch, path)
    return names:get(epoch .. path)
end


function _M.drop(path)
    local key = lease.epoch() .. path
    local name = names:get(key)
    names:delete(key)
    if name then
        store.forget(name)  -- for its place alone, and not of each query: those go as others need theirs
    end
end


function _M.drop_all()
    names:flush_all()
end


return _M
