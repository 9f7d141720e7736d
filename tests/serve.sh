#!/bin/sh
# Runs a command while the service serves a database of its own. The command gets the URL in ADDRESS, and an administrator's
# key in KEY. An error in the log of the service is a failure too. The Makefile sets the variables that this script needs.
set -eu

server_url=$(echo "$DATABASE_URL" | sed 's|/[^/?]*\([?].*\)\{0,1\}$|/postgres\1|')
own_url=$(echo "$server_url" | sed 's|/postgres\([?].*\)\{0,1\}$|/listing_served\1|')
sql() { tests/db.sh run psql --no-psqlrc --quiet --set=ON_ERROR_STOP=1 "$@"; }
drop() {
    sql "$server_url" -c 'set client_min_messages = error' -c 'drop database if exists listing_served with (force)' \
        -c 'drop role if exists listing_served'
}
log=$(mktemp)
service=
end() {
    [ -z "$service" ] || kill "$service"
    drop
    rm -f "$log"
}
trap end EXIT
trap 'exit 130' INT TERM

drop
sql "$server_url" -c 'create database listing_served'
DATABASE_URL=$own_url "$REFINERY" migrate -e DATABASE_URL -p sql -g -d -m >/dev/null
# A role of its own: another service on this server may use listing_service.
password=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
sql "$server_url" -c "create role listing_served login password '$password' in role listing_api"
service_url=$(echo "$own_url" | sed "s|//\([^@/]*@\)\{0,1\}|//listing_served:$password@|")
KEY=$(sql "$own_url" --tuples-only --no-align -c 'select create_api_key(administrator => true)')
DATABASE_URL=$service_url AUTH=keys LISTEN_ADDR=127.0.0.1:0 ADMIN_ADDR=127.0.0.1:0 target/debug/listing-api 2> "$log" &
service=$!
for _ in $(seq 100); do
    ADDRESS=$(sed -n 's/.*serving on \(http:[^,]*\),.*/\1/p' "$log")
    [ -z "$ADDRESS" ] || break
    sleep 0.1
done
export ADDRESS KEY

"$@"
if grep 'HTTP/1.1 500 \| ERROR ' "$log"; then
    echo 'The lines above are from the log of the service.' >&2
    exit 1
fi
