-- Sends signed requests (signature.lua) to apps and to other edges, over HTTP/1.0, so that a response ends with its
-- connection.

local clock = require "clock"
local signature = require "signature"

local CONNECT_TIMEOUT_MS = 200
local MAX_RESPONSE_BYTES = 131072  -- more than a response of one row

local now_ms = clock.now_ms

local _M = {}


-- Return everything until the other side closes; nil if that takes until `deadline`, or is too long.
local function receive_all(socket, deadline)
    local pieces, length = {}, 0
    while now_ms() < deadline and length < MAX_RESPONSE_BYTES do
        local piece, err = socket:receiveany(MAX_RESPONSE_BYTES)
        if not piece then
            return err == "closed" and table.concat(pieces) or nil
        end
        pieces[#pieces + 1] = piece
        length = length + #piece
    end
end


-- Send a GET request. Return the status as text and the body; nil without a signed response, because another program
-- may listen on the port of an app or an edge that has ended.
-- connect: a function that connects a socket; target: the address; headers: further lines, each with its line break;
-- timeout_ms: for the whole response.
function _M.get(connect, target, headers, timeout_ms)
    local signed, request_mac = signature.sign_request("GET", target, "")
    local socket = ngx.socket.tcp()
    socket:settimeouts(CONNECT_TIMEOUT_MS, CONNECT_TIMEOUT_MS, timeout_ms)
    local response
    if connect(socket)
        and socket:send("GET " .. target .. " HTTP/1.0\r\n" .. signature.HEADER .. ": " .. signed .. "\r\n" .. headers
                        .. "\r\n") then
        response = receive_all(socket, now_ms() + timeout_ms)
    end
    socket:close()
    local head, body = (response or ""):match("^(.-\r\n)\r\n(.*)$")
    local status = head and head:match("^HTTP/1%.%d (%d%d%d) ")
    if status and signature.is_response(request_mac, status, body,
                                        head:match("\r\n" .. signature.HEADER .. ": (%x+)\r\n")) then
        return status, body
    end
end


return _M
