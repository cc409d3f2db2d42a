-- Each path has a generation, which is part of its key in the cache. To drop a path is to forget its generation: the
-- next read creates one that was never used, so no entry that is stored, or about to be, is found again. The dictionary
-- of generations may lose any of them at any time, which costs a miss.

local ids = require "ids"
local lease = require "lease"
local metrics = require "metrics"
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
        local added, err, evicted = generations:add(key, fresh)
        if evicted then
            metrics.count('evictions_total{store="generations"}')
        end
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


-- Return whether the path has this generation. epoch_and_path: one after the other, so that a hit need not join them.
function _M.is_current(epoch_and_path, generation)
    return generations:get(epoch_and_path) == generation
end


-- Return the key under which a response is found now. A path without a generation has no entry.
function _M.key_of(path, query)
    return (_M.known(lease.epoch(), path) or "") .. query
end


-- Store an entry and return whether it is current. If a write has forgotten the generation meanwhile, no read uses that
-- key again, and the entry would keep its memory until others need it. The check comes after the store: a drop that
-- comes later finds the entry and forgets it.
function _M.store_if_current(path, query, key, entry)
    local stored = store.put(key, entry)
    if _M.key_of(path, query) ~= key then
        store.forget(key)
        return false
    end
    return stored
end


function _M.drop(path)
    local key = lease.epoch() .. path
    local generation = generations:get(key)
    generations:delete(key)
    if generation then
        store.forget(generation)  -- frees its memory at once; the entries of queries are evicted later
    end
end


function _M.drop_all()
    generations:flush_all()
end


return _M
