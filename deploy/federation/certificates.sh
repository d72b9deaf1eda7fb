#!/bin/sh
# Makes a certificate authority, once, and a certificate of the SuperLink for the names and addresses given.
#
#     certificates.sh FOLDER NAME-OR-ADDRESS...
#
# FOLDER/ca.crt goes to every node; the keys stay where they are. 127.0.0.1 and localhost are always named: the
# ServerApp and the operator's commands reach the SuperLink there. Nothing that exists is made anew.
set -eu
umask 077
[ $# -ge 2 ] || { sed -n '2,4p' "$0" >&2; exit 2; }
folder=$1
shift
mkdir -p "$folder"
cd "$folder"

names="DNS:localhost,IP:127.0.0.1"
for name in "$@"; do
    case $name in
        *[!0-9.]*:* | *:*) names="$names,IP:$name" ;;
        *[!0-9.]*) names="$names,DNS:$name" ;;
        *) names="$names,IP:$name" ;;
    esac
done

if [ ! -e ca.key ]; then
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -days 3650 -subj "/CN=SOPPU federation" \
        -addext "basicConstraints=critical,CA:TRUE" -addext "keyUsage=critical,keyCertSign,cRLSign" \
        -keyout ca.key -out ca.crt 2>/dev/null
fi
if [ ! -e server.key ]; then
    openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -subj "/CN=SuperLink" \
        -keyout server.key -out server.csr 2>/dev/null
    printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth\n' "$names" > server.ext
    openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 825 -extfile server.ext \
        -out server.crt 2>/dev/null
    rm -f server.csr server.ext
fi
chmod 644 ca.crt server.crt
openssl verify -CAfile ca.crt server.crt
