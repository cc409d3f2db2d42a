-- Signs the requests between apps, writers and edges, and the responses to them: the same as
-- velikiy/signatures.py, which says why.
--
-- Relies on: libcrypto, which Debian's Nginx has loaded. Its HMAC is used directly, because ngx.hmac_sha1 knows only
-- SHA-1.

local ffi = require "ffi"
local ids = require "ids"

ffi.cdef[[
    const void *EVP_sha256(void);
    unsigned char *HMAC(const void *hash, const void *key, int key_length,
                        const char *text, size_t text_length, unsigned char *mac, unsigned int *mac_length);
    int CRYPTO_memcmp(const void *a, const void *b, size_t length);
]]
local C = ffi.C
local MAC_BYTES = 32

local mac_buffer = ffi.new("unsigned char[?]", MAC_BYTES)
local sha256 = C.EVP_sha256()
local key

local HEX = {}  -- by the byte. A table, because gsub would call a function for each byte of each MAC
for value = 0, 255 do
    HEX[string.char(value)] = string.format("%02x", value)
end

local _M = { HEADER = "Signature" }


-- In init_by_lua.
function _M.configure(secret)
    key = secret
end


-- Return the MAC of the text in hexadecimal.
local function mac_of(text)
    C.HMAC(sha256, key, #key, text, #text, mac_buffer, nil)
    return (ffi.string(mac_buffer, MAC_BYTES):gsub(".", HEX))
end


-- Return a digest of a client (limits.lua), which is the same at every edge and does not show the address.
function _M.digest_of_client(client)
    return mac_of("client\n" .. client):sub(1, 32)
end


-- Return whether both are the same, in a time that does not show where they differ.
local function same(mac, other)
    return #mac == #other and C.CRYPTO_memcmp(mac, other, #mac) == 0
end


-- Return the value of the header of a request, and the MAC that belongs to its response.
function _M.sign_request(method, target, body)
    local nonce = ids.fresh()
    local mac = mac_of("request\n" .. nonce .. "\n" .. method .. "\n" .. target .. "\n\n" .. body)
    return nonce .. " " .. mac, mac
end


-- Return whether a response was signed by a server with the secret, and for this request.
function _M.is_response(request_mac, status, body, given)
    return given ~= nil and same(mac_of("response\n" .. request_mac .. "\n" .. status .. "\n" .. body), given)
end


-- Return the MAC of the present request, or nil if it was not signed with the secret.
function _M.request_mac(body)
    local nonce, given = (ngx.var.http_signature or ""):match("^([%x.]+) (%x+)$")
    if not nonce then
        return nil
    end
    local mac = mac_of("request\n" .. nonce .. "\n" .. ngx.req.get_method() .. "\n" .. ngx.var.request_uri .. "\n"
                       .. (ngx.var.http_x_edge or "") .. "\n" .. body)
    return same(mac, given) and mac or nil
end


-- Send the response to a signed request.
function _M.respond(request_mac, status, body)
    ngx.status = status
    ngx.header[_M.HEADER] = mac_of("response\n" .. request_mac .. "\n" .. status .. "\n" .. body)
    if body == "" then
        return ngx.exit(status)
    end
    return ngx.print(body)
end


return _M
