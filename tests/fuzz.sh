#!/bin/sh
# Sends valid and invalid requests that schemathesis generates from the OpenAPI document, and checks the responses against it.
# It uses a database of its own. Run it with `make fuzz`, which sets the variables.
set -eu

server_url=$(echo "$DATABASE_URL" | sed 's|/[^/?]*\([?].*\)\{0,1\}$|/postgres\1|')
fuzz_url=$(echo "$server_url" | sed 's|/postgres\([?].*\)\{0,1\}$|/listing_fuzz\1|')
sql() { tests/db.sh run psql --no-psqlrc --quiet --set=ON_ERROR_STOP=1 "$@"; }
drop() {
    sql "$server_url" -c 'set client_min_messages = error' -c 'drop database if exists listing_fuzz with (force)' \
        -c 'drop role if exists listing_fuzz'
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
sql "$server_url" -c 'create database listing_fuzz'
DATABASE_URL=$fuzz_url "$REFINERY" migrate -e DATABASE_URL -p sql -g -d -m >/dev/null
# A role of its own: another service on this server may use listing_service.
password=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
sql "$server_url" -c "create role listing_fuzz login password '$password' in role listing_api"
service_url=$(echo "$fuzz_url" | sed "s|//\([^@/]*@\)\{0,1\}|//listing_fuzz:$password@|")
key=$(sql "$fuzz_url" --tuples-only --no-align -c 'select create_api_key(administrator => true)')
DATABASE_URL=$service_url AUTH=keys LISTEN_ADDR=127.0.0.1:0 ADMIN_ADDR=127.0.0.1:0 target/debug/listing-api 2> "$log" &
service=$!
for _ in $(seq 100); do
    address=$(sed -n 's/.*serving on \(http:[^,]*\),.*/\1/p' "$log")
    [ -z "$address" ] || break
    sleep 0.1
done

PYTHONPATH=$(dirname "$(dirname "$SCHEMATHESIS")") python3 "$SCHEMATHESIS" --config-file tests/schemathesis.toml run "$address/openapi.yaml" \
    --checks all --seed 20261120 --max-examples 400 --generation-database none --no-color \
    --header "Authorization: Bearer $key"
if grep 'HTTP/1.1 500 \| ERROR ' "$log"; then
    echo 'The lines above are from the log of the service.' >&2
    exit 1
fi
