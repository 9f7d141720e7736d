#!/bin/sh
# Runs the service on two servers behind PgDog, with the configuration and the commands of docs/scaling.md. Verifies which
# server each request reaches, what the outage of one server costs, and what the feeds have.
#
# Run it with `make sharding PGDOG=/path/to/pgdog`. The Makefile sets the other variables that this script needs.
set -eu

fail() {
    echo "sharding: $*" >&2
    exit 1
}
say() { echo "$*"; }
[ "${PGDOG:-}" ] || fail 'PGDOG is not set: build PgDog (https://github.com/pgdogdev/pgdog) with cargo build --release,' \
    'then run make sharding PGDOG=/path/to/pgdog'
"$PGDOG" --version >/dev/null || fail "PGDOG=$PGDOG does not run"

unset DATABASE_URL
export PG_SETTINGS='-c fsync=off -c log_statement=all -c log_line_prefix=%u:'
folder=$(mktemp -d)
started=
end() {
    kill $started 2>/dev/null || true
    wait
    for server in 1 2; do PG_HOME=$folder/$server tests/db.sh down; done
    rm -rf "$folder"
}
trap end EXIT
trap 'exit 130' INT TERM

up() { # SERVER
    PG_HOME=$folder/$1 tests/db.sh up 2>/dev/null
}
sql() { # SERVER STATEMENT
    "$folder/psql" -XAtq --set=ON_ERROR_STOP=1 "$(cat "$folder/url$1")" -c "$2"
}
free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}
# Block number $2 of a language in the section of the page, with a password.
block() {
    awk -v fence="\`\`\`$1" -v wanted="$2" '/^## / { section = $0 } section != "## Beyond one primary" { next }
        $0 == fence { number++; inside = 1; next } /^```/ { inside = 0 } inside && number == wanted' docs/scaling.md |
        sed 's/…/secret/'
}
run_block() {
    block sh "$1" | sed "s|api_keys|$folder/api_keys|" > "$folder/block"
    SERVER_1=$(cat "$folder/url1") SERVER_2=$(cat "$folder/url2") PATH=$folder:$PATH sh -eu "$folder/block"
}
wait_for() { # SENTENCE COMMAND...
    sentence=$1
    shift
    for _ in $(seq 100); do
        if "$@" >/dev/null 2>&1; then return; fi
        sleep 0.2
    done
    fail "$sentence within 20 seconds: $(tail -n 5 "$folder"/*.log)"
}

start_pgdog() {
    "$PGDOG" --config "$folder/pgdog.toml" --users "$folder/users.toml" > "$folder/pgdog.log" 2>&1 &
    pgdog=$!
    started="$started $pgdog"
    wait_for 'PgDog does not listen' grep -q listening "$folder/pgdog.log"
}
# Starts an instance. Its address is then in `address`.
serve() { # NAME DATABASE_URL SHARDING_PROXY
    DATABASE_URL=$2 SHARDING_PROXY=$3 AUTH=keys LISTEN_ADDR=127.0.0.1:0 ADMIN_ADDR=127.0.0.1:0 \
        target/debug/listing-api 2> "$folder/$1.log" &
    instance=$!
    started="$started $instance"
    wait_for "the instance $1 does not serve" grep -q 'serving on' "$folder/$1.log"
    address=$(sed -n 's/.*serving on \(http:[^,]*\),.*/\1/p' "$folder/$1.log")
    admin=$(sed -n 's/.*metrics on \(http:.*\)$/\1/p' "$folder/$1.log")
}

# Sends a request with the key and verifies the status. The response is then in $folder/head and $folder/body.
request() { # STATUS METHOD PATH [CURL OPTION...]
    wanted=$1 method=$2 path=$3
    shift 3
    status=$(curl -s --max-time 20 -X "$method" -H "Authorization: Bearer $key" -H 'Content-Type: application/json' \
        -D "$folder/head" -o "$folder/body" -w '%{http_code}' "$@" "$address$path") || fail "$method $path: no response"
    [ "$status" = "$wanted" ] || fail "$method $path: $status instead of $wanted: $(cat "$folder/body")"
}
# The same, and verifies which servers got its statements.
reach() { # SERVERS STATUS METHOD PATH [CURL OPTION...]
    servers=$1
    shift
    for each in 1 2; do wc -l < "$folder/$each/server.log" > "$folder/lines$each"; done
    request "$@"
    reached=$(for each in 1 2; do
        tail -n "+$(($(cat "$folder/lines$each") + 1))" "$folder/$each/server.log" |
            grep -q '^listing_service:.*public\.' && printf %s "$each"
    done || true)
    [ "$servers" = any ] && [ ${#reached} = 1 ] || [ "$reached" = "$servers" ] ||
        fail "$2 $3 reached the servers '$reached' instead of '$servers'"
}
expect() { # WHAT WANTED FOUND
    [ "$3" = "$2" ] || fail "$1: '$3' instead of '$2'"
}
ids() { grep -o '"id":[0-9]*' "$folder/body" | cut -d: -f2 | tr '\n' ' ' | sed 's/ $//'; }
listing() { # PRICE
    printf '{"name": "Loft", "description": "Under the roof", "building_type": "APARTMENT", "surface_area_m2": 42.5,
        "postal_address": {"street_address": "1 rue Oberkampf", "postal_code": "75011", "city": "Paris", "country": "FR"},
        "rooms_count": 2, "bedrooms_count": 1, "latest_price_eur": %s}' "$1"
}

say 'Prepares two servers and PgDog.'
ln -s "$REFINERY" "$folder/refinery"
printf '#!/bin/sh\nexec "%s" run psql "$@"\n' "$PWD/tests/db.sh" > "$folder/psql"
chmod +x "$folder/psql"
for server in 1 2; do up $server > "$folder/url$server"; done
export PG_HOME=$folder/1
run_block 1 >/dev/null
port=$(free_port)
block toml 1 | sed "s/^port = 6432/host = \"127.0.0.1\"\nport = $port/
    s/\"10.0.0.1\", port = 5432/\"127.0.0.1\", port = $(cat "$folder/1/port")/
    s/\"10.0.0.2\", port = 5432/\"127.0.0.1\", port = $(cat "$folder/2/port")/" > "$folder/pgdog.toml"
block toml 2 > "$folder/users.toml"
start_pgdog
key=$(sql 1 "select create_api_key('alice')")
run_block 2 >/dev/null
proxy=postgres://listing_service:secret@127.0.0.1:$port/listing
serve proxied "$proxy" on
proxied=$address proxied_admin=$admin
settings=$(PGOPTIONS='-c statement_timeout=4321 -c search_path=pg_catalog,pg_temp' "$folder/psql" -XAtq "$proxy" \
    -c "select current_setting('statement_timeout') || ' ' || current_setting('search_path')")
expect 'the settings of a session through PgDog' '4321ms pg_catalog, pg_temp' "$settings"

say 'Each request by id reaches one server.'
for price in $(seq 100 139); do
    reach any 201 POST /listings -d "$(listing "$price")"
    request 200 GET /listings
    case " $(ids) " in *' 2 '*' 500000002 '*) break ;; esac
done
stored=$(for each in 1 2; do sql $each 'select id from listing order by id'; done)
expect 'the listings of both servers' "$(echo $stored)" "$(ids)"
for id in 1 500000001; do
    server=1
    [ $id = 1 ] || server=2
    reach $server 200 GET /listings/$id
    etag=$(sed -n 's/^etag: *\(.*\)\r$/\1/ip' "$folder/head")
    reach $server 200 PATCH /listings/$id -d '{"latest_price_eur": 150}' -H "If-Match: $etag"
    reach $server 412 PATCH /listings/$id -d '{"latest_price_eur": 160}' -H "If-Match: $etag"
    reach $server 200 PUT /listings/$id -d "$(listing 175.25)"
    for query in prices 'prices?limit=2' "prices?at=$(date -u +%Y-%m-%dT%H:%M:%SZ)" prices.svg; do
        reach $server 200 GET "/listings/$id/$query"
    done
    request 200 GET /listings/$id/prices
    prices=$(grep -o '"price_eur":[0-9.]*' "$folder/body" | cut -d: -f2 | xargs)
    expect "the last prices of listing $id" '150 175.25' "${prices#* }"
    expect 'the writer in the log' alice "$(sql $server "select string_agg(distinct changed_by, ',') from listing_price_log")"
    reach $server 204 DELETE /listings/$((id + 1))
    reach $server 404 GET /listings/$((id + 1))
done
request 200 GET '/listings?limit=2&min_price=175.25'
expect 'a page' '1 500000001' "$(ids)"
request 200 GET '/listings?limit=1&after=499999999'
expect 'the next page' 500000001 "$(ids)"

say 'A repeated POST creates one listing.'
for key_of_post in a b c d e f; do
    reach any 201 POST /listings -d "$(listing 500)" -H "Idempotency-Key: $key_of_post"
    first=$(ids)
    request 201 POST /listings -d "$(listing 500)" -H "Idempotency-Key: $key_of_post"
    expect 'the repeated listing' "$first" "$(ids)"
    grep -qi '^idempotent-replayed: true' "$folder/head" || fail 'the response does not say that it is a repetition'
    request 422 POST /listings -d "$(listing 501)" -H "Idempotency-Key: $key_of_post"
done
kept=$(($(sql 1 'select count(*) from idempotency_key') + $(sql 2 'select count(*) from idempotency_key')))
expect 'the kept keys' 6 $kept

say 'The feed is served by an instance beside each server.'
request 503 GET /changes
wait_for 'the log does not say why /changes answers 503' grep -q SHARDING_PROXY "$folder/proxied.log"
for server in 1 2; do
    serve feed$server "$(sed "s|//[^@]*@|//listing_service:secret@|" "$folder/url$server")" off
    request 200 GET '/changes?limit=1000'
    prices=$(sql $server 'select count(*) from listing_price_log')
    expect "the prices in the feed of server $server" "$prices" "$(grep -o '"price_eur"' "$folder/body" | wc -l)"
done
address=$proxied admin=$proxied_admin

say 'While one server is down, only its listings are missing.'
PG_HOME=$folder/2 tests/db.sh stop
for _ in 1 2 3 4 5 6; do
    reach 1 200 GET /listings/1
    reach 1 200 PATCH /listings/1 -d '{"latest_price_eur": 180}'
    reach 1 200 GET /listings/1/prices
    reach 1 201 POST /listings -d "$(listing 600)"
done
keys=$(sql 1 'select key from idempotency_key')
for key_of_post in a b c d e f; do
    case $keys in *"$key_of_post"*) status=201 ;; *) status=503 ;; esac
    request $status POST /listings -d "$(listing 500)" -H "Idempotency-Key: $key_of_post"
done
for path in /listings/500000001 /listings/500000001/prices /listings; do
    request 503 GET $path
    grep -qi '^retry-after:' "$folder/head" || fail "GET $path: no Retry-After"
done
request 503 PATCH /listings/500000001 -d '{"latest_price_eur": 180}'
expect 'the readiness' 200 "$(curl -s -o "$folder/ready" -w '%{http_code}' "$admin/health/ready")"

say 'PgDog and the service start while it is down.'
kill -KILL $pgdog
{ wait $pgdog; } 2>/dev/null || true
start_pgdog
serve restarted "$proxy" on
reach 1 200 GET /listings/1
request 503 GET /listings/500000001
up 2 >/dev/null
wait_for 'the server that is up again is not used' curl -sf "$address/listings/500000001"
reach 12 200 GET /listings

say 'A DBA checks, prunes and revokes on both servers.'
expect 'the problems' '' "$(for server in 1 2; do sql $server 'select problem from listing_price_log_problem'; done)"
for server in 1 2; do sql $server 'select revoke_api_key(1)' >/dev/null; done
run_block 2 >/dev/null
for _ in 1 2 3 4; do request 401 DELETE /listings/1; done

if grep -h ' ERROR ' "$folder/proxied.log" "$folder/restarted.log" | grep -v ' 503 '; then
    fail 'the lines above are from the log of the service'
fi
say 'Every check passed.'
