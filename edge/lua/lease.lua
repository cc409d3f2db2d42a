-- The edge's lease: it may serve from and store in its cache only while an app tells it so, once a second. An edge that
-- cannot be told of a write is fenced in PostgreSQL (velikiy/coherence/membership.py), and finds that out here.
--
-- An epoch is a time in which the edge is registered without a break. Generations belong to one epoch: what was stored
-- in an earlier one is never found again, whatever worker looks, however long it was stopped between two lines.

local ffi = require "ffi"
local balancer = require "balancer"

ffi.cdef[[
    struct velikiy_timespec { long seconds; long nanoseconds; };
    int clock_gettime(int clock, struct velikiy_timespec *now);
]]
local CLOCK_BOOTTIME = 7  -- ngx.now is wall time, which is set; this one goes on while the machine sleeps

local RENEW = 1        -- seconds between two questions
local AGAIN = 0.1      -- seconds after one that failed
local HANG = 5         -- seconds after which a renewal that has not ended no longer holds up the next
local MOST = 4096      -- bytes of an answer
local CONNECT = 200    -- milliseconds
local PATIENCE = 800   -- milliseconds for the answer: of two that fail, the second is still in time

local state = ngx.shared.state
local timespec = ffi.new("struct velikiy_timespec")
local exiting = ngx.worker.exiting

local _M = {}

local place, host, port
local rows, rows_text = {}, nil  -- as apps name them, parsed
local said  -- what was logged last: each state once, and not each second


-- Milliseconds.
local function now()
    ffi.C.clock_gettime(CLOCK_BOOTTIME, timespec)
    return tonumber(timespec.seconds) * 1000 + tonumber(timespec.nanoseconds) / 1e6
end
_M.now = now


-- In init_by_lua, which runs again on each reload: the dictionary is kept, and what is in it is still true.
-- where: a place where no two edges can be at the same time; address: a host, or empty (both: edge/start).
function _M.configure(where, address, control_port)
    if os.getenv("NGINX") then
        error("an upgrade in place (SIGUSR2) would be two edges behind one port, each with a cache that the drops of "
              .. "the other pass by; start it anew instead", 0)
    end
    place, host, port = where, address, tonumber(control_port)
    local random = assert(io.open("/dev/urandom", "rb"))
    local bytes = random:read(8)
    random:close()
    state:add("run", (bytes:gsub(".", function(byte) return string.format("%02x", byte:byte()) end)))
    state:add("epoch", 0)
end


-- A string that was never used before, by this run or any other: files of the run before are still on the disk.
function _M.fresh()
    return state:get("run") .. string.format(".%d", state:incr("names", 1, 0))
end


-- The newest. A lease is kept under the number of its epoch, so one that arrives late, because a worker was stopped or
-- is on its way out, is never taken for the newest one's.
function _M.epoch()
    return state:get("epoch")
end


-- The epoch, if there is a lease for it; else nil. What holds at this moment holds for the request that asks, however
-- long it then takes: it began when the lease was there.
function _M.held()
    local epoch = state:get("epoch")
    local till = state:get(epoch)
    -- A worker that is on its way out does not know whether writers still reach this edge: a listener that is closed
    -- counts as an edge that is dead.
    if till and now() < till and not exiting() then
        return epoch
    end
end


-- Whether Redis may be used: an app said so with the lease of this epoch. What was taken from Redis counts only if this
-- holds after Redis has answered; a worker may be stopped for any time in between.
function _M.trusts_redis(epoch)
    local till = state:get(epoch .. " redis")
    return till ~= nil and now() < till and state:get("epoch") == epoch
end


-- What the resource of this name calls one of its rows, which is part of the keys in Redis; nil: there is none.
function _M.rows(name)
    local text = state:get("rows")
    if text ~= rows_text then
        rows, rows_text = {}, text
        for many, one in (text or ""):gmatch("(%S+):(%S+)") do
            rows[many] = ngx.unescape_uri(one)
        end
    end
    return rows[name]
end


-- For people: the milliseconds that are left, or 0.
function _M.left()
    return math.max(0, math.floor((state:get(state:get("epoch")) or 0) - now()))
end


function _M.place()
    return place
end


-- On the one level that is kept (nginx.conf, error_log): the others quote requests.
local function say(what)
    if what ~= said then
        ngx.log(ngx.ALERT, what)
        said = what
    end
end


-- Returns everything until the other side closes; nil if that takes until `limit`, or is too long. With a timeout for
-- each piece alone, an app that sends byte by byte could hold up the renewal for ever.
local function receive_all(socket, limit)
    local answer = ""
    while now() < limit and #answer < MOST do
        local piece, err = socket:receiveany(MOST)
        if not piece then
            return err == "closed" and answer or nil
        end
        answer = answer .. piece
    end
end


-- Returns an app's response (velikiy/http/edge_leases.py), `<milliseconds> <redis> <rows>`: the time of the lease,
-- whether Redis may be used as long, and `users:user` for each resource, percent-encoded. Or nil and the status, 0
-- without a response.
local function ask(what, epoch)
    local peer = balancer.choose()
    if not peer then
        return nil, 0
    end
    local body = ngx.encode_args({ place = place, epoch = state:get("run") .. "." .. epoch, host = host, port = port })
    local socket = ngx.socket.tcp()
    socket:settimeouts(CONNECT, CONNECT, PATIENCE)
    local status, milliseconds, redis, names
    if socket:connect(peer.address, peer.port)
        and socket:send("POST /.lease/" .. what .. " HTTP/1.0\r\nContent-Type: application/x-www-form-urlencoded\r\n"
                        .. "Content-Length: " .. #body .. "\r\n\r\n" .. body) then
        local answer = receive_all(socket, now() + PATIENCE)
        status = answer and answer:match("^HTTP/1%.%d (%d%d%d) ")
        if status == "200" then
            milliseconds, redis, names = answer:match("\r\n\r\n(%d+) ?(%d?) ?([!-~ ]*)$")
        end
    end
    socket:close()
    if milliseconds then
        return { milliseconds = tonumber(milliseconds), redis = redis == "1", rows = names }
    end
    return nil, tonumber(status or 0)
end


local function take(epoch, asked, answer)
    local till = asked + answer.milliseconds
    state:set("rows", answer.rows)
    state:set(epoch .. " redis", answer.redis and till or 0)
    state:set(epoch, till)
end


-- Returns whether there is a lease now.
local function renew()
    local epoch = state:get("registered")
    -- Another one: a worker that was on its way out got its answer late, after its successor had begun a newer epoch.
    -- To go on with it would be to renew for ever a lease that no read asks for.
    if epoch and epoch == state:get("epoch") then
        local asked = now()  -- before the question: it may be answered at once and arrive late
        local lease, status = ask("renew", epoch)
        if lease then
            take(epoch, asked, lease)
            return true
        end
        if status ~= 409 then
            return false  -- what was promised runs out by itself
        end
        say("writers pass this edge by, since they could not reach it: it starts again with nothing")
        state:delete("registered")
    end
    -- In this order: a new epoch, for which there is no lease and no name; only then may writers hear of us again.
    epoch = state:incr("epoch", 1)
    state:delete(epoch - 1)
    state:delete(epoch - 1 .. " redis")
    local asked = now()
    local lease, status = ask("register", epoch)
    if lease then
        state:set("registered", epoch)
        take(epoch, asked, lease)
        said = nil
    elseif status == 424 then
        say("the app that was asked cannot reach this edge's control listener (EDGE_CONTROL, EDGE_ADDRESS; port "
            .. port .. "): the cache is not used")
    end
    return lease ~= nil
end


local due = 0  -- the moment (now) of the next renewal


local function keep(premature)
    local began = now()
    if premature or exiting() or began < due then
        return
    end
    due = began + HANG * 1000  -- until this renewal has ended
    local ok, held = pcall(renew)
    if not ok then
        say("cannot renew the lease: " .. tostring(held))
    end
    due = ok and held and began + RENEW * 1000 or now() + AGAIN * 1000
end


-- In init_worker_by_lua: one worker asks, all use it. Should it be killed, its successor has its number.
--
-- The timer is periodic. A timer that arms itself anew in its own handler ends for good the first time that Nginx has
-- no free connection to run the handler with, and the edge would never get a lease again.
function _M.keep()
    if ngx.worker.id() == 0 then
        ngx.timer.at(0, keep)
        ngx.timer.every(AGAIN, keep)
    end
end


return _M
