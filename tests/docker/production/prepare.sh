#!/bin/bash
# Replace the outside of a machine for docs/production.md: the name of the server, and the authority that signs
# certificates.
set -e
echo '127.0.0.1 users.example.com' >> /etc/hosts
mkdir -p /srv/authority
cd /srv/authority
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout ca.key -out ca.pem -days 9 \
    -subj /CN=authority -addext basicConstraints=critical,CA:true 2> /dev/null
cp ca.pem /usr/local/share/ca-certificates/authority.crt
update-ca-certificates > /dev/null
cat > /usr/local/bin/certbot <<'END'
#!/bin/bash
# Sign a certificate as the authority would, and run the hook.
set -e
while [ $# -gt 0 ]; do
    case $1 in --domain) domain=$2 ;; --deploy-hook) hook=$2 ;; esac
    shift
done
export RENEWED_LINEAGE=/etc/letsencrypt/live/$domain
mkdir -p "$RENEWED_LINEAGE"
cd "$RENEWED_LINEAGE"
openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout privkey.pem -out request -subj "/CN=$domain"
openssl x509 -req -in request -CA /srv/authority/ca.pem -CAkey /srv/authority/ca.key -CAcreateserial -days 9 \
    -out fullchain.pem -extfile <(echo "subjectAltName=DNS:$domain")
[ -z "$hook" ] || sh -c "$hook"
END
chmod 755 /usr/local/bin/certbot
