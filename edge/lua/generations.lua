-- Each path has a generation, which is part of its key in the cache. To drop a path is to forget its generation: the
-- next read creates one that was never used, so no entry that is stored, or about to be, is found again. The dictionary
-- of generations may lose any of them at any time, which costs a miss.

local ids = require "ids"
local lease = require "lease"
local store = require "store"

local generations = ngx.shared.generations

local _M = {}


-- Return the generation of this path in this epoch; nil if there is no memory for it.
function _M.current(epoch, path)
    local key = epoch .. path
    local generation = generations:get(key)
    while not generation do
        -- Never a default: an entry that was stored under it before would be found again. `add`, because another read
        -- may have added a generation meanwhile, which both have to use.
        local fresh = ids.fresh()
        local added, err = generations:add(key, fresh)
        if added then
            return fresh
        elseif err ~= "exists" then
            return nil  -- no memory, even after eviction: the response is not stored
        end
        generation = generations:get(key)
    end
    return generation
end


-- Return the generation of this path if it has one. A new one would find no entry.
function _M.known(epoch, path)
    return generations:get(epoch .. path)
end


function _M.drop(path)
    local key = lease.epoch() .. path
    local generation = generations:get(key)
    generations:delete(key)
    if generation then
        store.forget(generation)  -- to free its memory; the entries of queries go as other entries need theirs
    end
end


function _M.drop_all()
    generations:flush_all()
end


return _M
