-- The requests: each maker returns a function that returns the next request of its thread, as bytes for the wire.
-- A request is concatenated from ready strings, because wrk.format costs several times as much.

local ffi = require "ffi"

local HEAD = " HTTP/1.1\r\nHost: localhost\r\n"  -- an edge refuses other names

local makers = {}

local function get(path)
    return "GET " .. path .. HEAD .. "\r\n"
end

local function put(id, number)
    -- The length is constant, and the name differs from the stored name.
    local body = string.format('{"name":"Bench %09d"}', number % 1e9)
    return "PUT /users/" .. id .. HEAD .. "Content-Type: application/json\r\nContent-Length: " .. #body .. "\r\n\r\n"
        .. body
end

-- Read one address again and again.
function makers.one(_, path)
    local request = get(path)
    return function() return request end
end

-- The same with an API key.
function makers.one_keyed(_, path, token)
    local request = "GET " .. path .. HEAD .. "Authorization: Bearer " .. token .. "\r\n\r\n"
    return function() return request end
end

-- Read users one after the other, from `offset` on, in a circle of `count` that begins with `first`. The threads share
-- the users.
function makers.ids(thread, first, count, offset)
    local at = offset + thread.number - thread.count
    return function()
        at = at + thread.count
        return get("/users/" .. first + at % count)
    end
end

-- Change users one after the other, in the same order.
function makers.put(thread, first, count, offset)
    local at = offset + thread.number - thread.count
    return function()
        at = at + thread.count
        return put(first + at % count, at)
    end
end

-- Change one user again and again.
function makers.put_one(thread, id)
    local at = thread.number
    return function()
        at = at + 1
        return put(id, at)
    end
end

-- Read users by Zipf's law: the n-th most popular of `count` users is requested 1/n^exponent times as often as the
-- first. The share `writes` of the requests, from 0 to 1, change the user.
function makers.mix(thread, first, count, exponent, writes)
    local up_to = ffi.new("double[?]", count)
    local sum = 0
    for n = 0, count - 1 do
        sum = sum + 1 / (n + 1) ^ exponent
        up_to[n] = sum
    end
    math.randomseed(thread.number)
    local random, at = math.random, thread.number * 1000003
    return function()
        local wanted, low, high = random() * sum, 0, count - 1
        while low < high do
            local middle = math.floor((low + high) / 2)
            if up_to[middle] < wanted then low = middle + 1 else high = middle end
        end
        -- Popular users are scattered over the table, as in practice, and not on one page of it.
        local id = first + low * 7919 % count
        if random() < writes then
            at = at + 1
            return put(id, at)
        end
        return get("/users/" .. id)
    end
end

local function numbers(arguments, from)
    local values = {}
    for n = from, #arguments do
        values[#values + 1] = tonumber(arguments[n]) or arguments[n]
    end
    return values
end

-- `arguments`: the number of threads, the name of the maker, the arguments of the maker.
return function(number, arguments)
    local thread = { number = number, count = tonumber(arguments[1]) }
    return makers[arguments[2]](thread, unpack(numbers(arguments, 3)))
end
