-- The certificate that clients receive: TLS_CERT and TLS_KEY. Each worker reads the files again while it runs, so that
-- a renewed certificate needs no restart, closes no connection and empties no cache.
--
-- Relies on: ngx.ssl of lua-resty-core, and the functions of OpenSSL that Nginx has loaded.
-- Remove when: never; a reload of Nginx would have to be started by another program, in each container.

local ffi = require "ffi"
local ssl = require "ngx.ssl"

ffi.cdef [[
    void *OPENSSL_sk_value(const void *stack, int index);
    int X509_check_private_key(const void *certificate, const void *key);
    const void *X509_get0_notAfter(const void *certificate);
    int ASN1_TIME_diff(int *days, int *seconds, const void *from, const void *to);
]]

local C = ffi.C

local CHECK_INTERVAL_S = 2
local WARNING_DAYS = 14

local _M = {}

local cert_file, key_file
local seen  -- the content of both files when they were last loaded, successfully or not
local certificate, key  -- nil: without TLS, or Nginx presents what it has loaded by itself


local function content(name)
    local file, err = io.open(name, "rb")
    if not file then
        return nil, err
    end
    local text = file:read("*a")
    file:close()
    return text
end


-- Return the parsed certificate chain and key, or nil and an error.
local function parse(cert_pem, key_pem)
    local chain, cert_error = ssl.parse_pem_cert(cert_pem)
    if not chain then
        return nil, cert_file .. ": " .. cert_error
    end
    local private, key_error = ssl.parse_pem_priv_key(key_pem)
    if not private then
        return nil, key_file .. ": " .. key_error
    end
    if C.X509_check_private_key(C.OPENSSL_sk_value(chain, 0), private) ~= 1 then
        return nil, "the key in " .. key_file .. " does not fit the certificate in " .. cert_file
    end
    return chain, private
end


-- Load the files if they have changed. A certificate that cannot be used changes nothing: the files may be replaced one
-- after the other.
local function load()
    local cert_pem, cert_error = content(cert_file)
    local key_pem, key_error = content(key_file)
    local now = (cert_pem or cert_error) .. (key_pem or key_error)
    if now == seen then
        return
    end
    local chain, private
    if cert_pem and key_pem then
        chain, private = parse(cert_pem, key_pem)
    else
        private = cert_error or key_error
    end
    if chain then
        if seen and ngx.worker.id() == 0 then
            ngx.log(ngx.EMERG, "the certificate has changed: the edge presents the new certificate")
        end
        certificate, key = chain, private
    elseif ngx.worker.id() == 0 then
        ngx.log(ngx.EMERG, "the edge keeps its certificate: ", private)
    end
    seen = now
end


-- In init_by_lua. Without TLS both names are empty.
function _M.configure(cert, private_key)
    cert_file, key_file = cert ~= "" and cert or nil, private_key
end


-- In init_worker_by_lua.
function _M.start()
    if cert_file then
        load()
        ngx.timer.every(CHECK_INTERVAL_S, load)
    end
end


-- In ssl_certificate_by_lua: choose what the client of this handshake receives.
function _M.present()
    if certificate then
        ssl.clear_certs()
        assert(ssl.set_cert(certificate))
        assert(ssl.set_priv_key(key))
    end
end


-- Return the number of whole days until the certificate expires, below 0 after that, if they are few; else nil.
function _M.last_days()
    if not certificate then
        return nil
    end
    local days, seconds = ffi.new("int[1]"), ffi.new("int[1]")
    C.ASN1_TIME_diff(days, seconds, nil, C.X509_get0_notAfter(C.OPENSSL_sk_value(certificate, 0)))
    local left = days[0]
    if left == 0 and seconds[0] < 0 then
        left = -1
    end
    return left < WARNING_DAYS and left or nil
end


return _M
