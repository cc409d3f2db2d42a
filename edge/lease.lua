-- The edge's lease: it may serve from and store in its cache only while an app tells it so, once a second. An edge that
-- cannot be told of a write is fenced in PostgreSQL (velikiy/coherence/caches.py), and finds that out here.
--
-- An epoch is a time in which the edge is registered without a break. Generations belong to one epoch: what was stored
-- in an earlier one is never found again, whatever worker looks, however long it was stopped between two lines.

local ffi = require "ffi"
local apps = require "apps"

ffi.cdef[[
    struct velikiy_timespec { long seconds; long nanoseconds; };
    int clock_gettime(int clock, struct velikiy_timespec *now);
]]
local CLOCK_BOOTTIME = 7  -- ngx.now is wall time, which is set; this one goes on while the machine sleeps

local RENEW = 1        -- seconds between two questions
local AGAIN = 0.1      -- seconds after one that failed
local CONNECT = 200    -- milliseconds
local PATIENCE = 800   -- milliseconds for the answer: of two that fail, the second is still in time

local state = ngx.shared.state
local timespec = ffi.new("struct velikiy_timespec")
local exiting = ngx.worker.exiting

local _M = {}

local place, port


-- Milliseconds.
local function now()
    ffi.C.clock_gettime(CLOCK_BOOTTIME, timespec)
    return tonumber(timespec.seconds) * 1000 + tonumber(timespec.nanoseconds) / 1e6
end


-- In init_by_lua, which runs again on each reload: the dictionary is kept, and what is in it is still true.
-- place: where no two edges can be at the same time (edge/start).
function _M.configure(where, control_port)
    if os.getenv("NGINX") then
        error("an upgrade in place (SIGUSR2) would be two edges behind one port, each with a cache that the drops of "
              .. "the other pass by; start it anew instead", 0)
    end
    place, port = where, tonumber(control_port)
    local random = assert(io.open("/dev/urandom", "rb"))
    local bytes = random:read(8)
    random:close()
    state:add("run", (bytes:gsub(".", function(byte) return string.format("%02x", byte:byte()) end)))
    state:add("epoch", 0)
    state:add("lease", 0)
end


-- A string that was never used before, by this run or any other: files of the run before are still on the disk.
function _M.fresh()
    return state:get("run") .. string.format(".%d", state:incr("names", 1, 0))
end


-- The epoch that the lease is for, or nil where there is none. What holds at this moment holds for the request that
-- asks, however long it then takes: it began when the lease was there.
function _M.held()
    local till, epoch = state:get("lease")
    -- A worker that is on its way out does not know whether writers still reach this edge: a listener that is closed
    -- counts as an edge that is dead.
    if now() < till and not exiting() then
        return epoch
    end
end


-- For marked answers where there is no other: the epoch of the lease that there was last.
function _M.last()
    local _, epoch = state:get("lease")
    return epoch
end


-- All epochs in which a reader may look. While one ends and the next begins there are two.
function _M.epochs()
    return _M.last() or 0, state:get("epoch")
end


-- For people: the milliseconds that are left, or 0.
function _M.left()
    local till = state:get("lease")
    return math.max(0, math.floor(till - now()))
end


function _M.place()
    return place
end


-- The lease's milliseconds; or nil and the status, 0 where there was no answer.
local function ask(what, epoch)
    local peer = apps.choose()
    if not peer then
        return nil, 0
    end
    local body = ngx.encode_args({ place = place, epoch = epoch, port = port })
    local socket = ngx.socket.tcp()
    socket:settimeouts(CONNECT, CONNECT, PATIENCE)
    local status, milliseconds
    if socket:connect(peer.address, peer.port)
        and socket:send("POST /.lease/" .. what .. " HTTP/1.0\r\nContent-Type: application/x-www-form-urlencoded\r\n"
                        .. "Content-Length: " .. #body .. "\r\n\r\n" .. body) then
        local answer = socket:receive("*a")
        status = answer and answer:match("^HTTP/1%.%d (%d%d%d) ")
        milliseconds = answer and answer:match("\r\n\r\n(%d+)$")
    end
    socket:close()
    if status == "200" and milliseconds then
        return tonumber(milliseconds)
    end
    return nil, tonumber(status or 0)
end


-- Returns whether there is a lease now.
local function renew()
    local epoch = state:get("registered")
    if epoch then
        local asked = now()  -- before the question: it may be answered at once and arrive late
        local lease, status = ask("renew", state:get("run") .. "." .. epoch)
        if lease then
            state:set("lease", asked + lease, 0, epoch)
            return true
        end
        if status ~= 409 then
            return false  -- what was promised runs out by itself
        end
        ngx.log(ngx.WARN, "writers pass this edge by since they could not reach it: it starts again with nothing")
    end
    -- In this order: no lease, nothing that could be found, and only then does a writer hear of us again.
    state:set("lease", 0, 0, _M.last() or 0)
    state:delete("registered")
    epoch = state:incr("epoch", 1)
    local asked = now()
    local lease, status = ask("register", state:get("run") .. "." .. epoch)
    if lease then
        state:set("registered", epoch)
        state:set("lease", asked + lease, 0, epoch)
    elseif status == 424 then
        ngx.log(ngx.ERR, "the app that was asked cannot reach this edge's control listener, port ", port, ": its cache "
                .. "is not used")
    end
    return lease ~= nil
end


local function keep(premature)
    if premature or exiting() then
        return
    end
    local began = ngx.now()
    local ok, held = pcall(renew)
    if not ok then
        ngx.log(ngx.ERR, "cannot renew the lease: ", held)
    end
    ngx.update_time()
    local pause = ok and held and math.max(AGAIN, RENEW - (ngx.now() - began)) or AGAIN
    ngx.timer.at(pause, keep)
end


-- In init_worker_by_lua: one worker asks, all use it. Should it be killed, its successor has its number.
function _M.keep()
    if ngx.worker.id() == 0 then
        ngx.timer.at(0, keep)
    end
end


return _M
