# What speed.sh and size.sh share. The data stay in .postgres-bench for the next run.
set -eu
rounds=${ROUNDS:-5}
seconds=${SECONDS_EACH:-3}
export PG_HOME="$PWD/.postgres-bench"
export PG_SETTINGS='-c shared_buffers=1GB -c max_wal_size=8GB -c checkpoint_timeout=30min -c max_connections=300'
unset DATABASE_URL

say() { echo "bench: $*" >&2; }
for program in wrk curl perl; do
    command -v $program >/dev/null || { say "$program is missing: apt-get install wrk curl perl"; exit 1; }
done

db() { program=$1; shift; tests/db.sh run "$program" "$@"; }
sql() { db psql --no-psqlrc --quiet --tuples-only --no-align --set=ON_ERROR_STOP=1 "$@"; }
median() { sort -n | awk '{ value[NR] = $1 } END { print value[int((NR + 1) / 2)] }'; }
now() { perl -MTime::HiRes=time -e 'print time'; }
grouped() { echo "$1" | perl -pe '1 while s/^(\d+)(\d{3})/$1,$2/'; }
cores=$(nproc 2>/dev/null || sysctl -n hw.ncpu)

scratch=$(mktemp -d)
services=
stop_services() {
    for running in $services; do { kill "$running" && wait "$running"; } || true; done
    services=
}
trap 'stop_services; tests/db.sh stop; rm -r "$scratch"' EXIT
trap 'exit 130' INT TERM

up() {
    server=$(tests/db.sh up)
    [ "$(cat "$PG_HOME/server")" != docker ] || { say 'this needs the server programs of PostgreSQL'; exit 1; }
    server=${server%/listing}
}

# load LISTINGS PRICES: creates the database bench_LISTINGS_PRICES, unless it is complete. Nearly half of the listings are in one
# city, the others in towns. The last fifth differ only in id and price. One more listing has 100,000 prices. Each transaction
# writes one price of every listing, as if one statement changed all prices. The triggers would write the same, but more slowly.
load() {
    up
    data=$server/bench_$1_$2
    if [ "$(sql "$data" -c "select to_regclass('bench_data_are_complete') is not null" 2>/dev/null)" != t ]; then
        say "creating $(grouped "$1") listings with $(grouped "$2") prices, only in the first run: a minute for 5 million prices"
        tests/db.sh stop
        PG_SETTINGS="$PG_SETTINGS -c fsync=off" tests/db.sh up >/dev/null
        sql "$server/postgres" -c 'set client_min_messages = error' -c "drop database if exists bench_$1_$2 with (force)" \
            -c "create database bench_$1_$2"
        DATABASE_URL=$data "$REFINERY" migrate -e DATABASE_URL -p sql -g -d -m >/dev/null
        sql "$data" <<-END
			set session_replication_role = replica;
			insert into listing (price, name, description, building_type, street_address, postal_code, city, country,
			    surface_area_m2, rooms_count, bedrooms_count, contact_phone_number)
			select 100000 + n, case when n > $1 / 5 * 4 then 'Loft' else 'Listing ' || n end, repeat('Nice. ', 40),
			    case when n > $1 / 5 * 4 then 'HOUSE' else (array['STUDIO', 'APARTMENT', 'HOUSE'])[1 + n % 3] end,
			    '1 rue Oberkampf', case when n > $1 / 5 * 4 then '75011' else lpad((n % 7919)::text, 5, '0') end,
			    case when n > $1 / 5 * 4 or n % 3 = 0 then 'Paris' else 'Town ' || floor(sqrt(n)) end, 'FR', 42.5, 2, 1,
			    '+33123456789'
			from generate_series(1, $1 + 1) as n;
			-- Leaves free space in the pages, as in a table in use.
			update listing set price = price;
			select format('insert into listing_price_log (listing_id, old_price, new_price, changed_by)
			    select n, %s, 100000 + n + 1000 * %s, session_user from generate_series(1, $1) as n',
			    case when step = 1 then 'null' else format('100000 + n + 1000 * %s', $2 / $1 - step + 1) end, $2 / $1 - step)
			from generate_series(1, $2 / $1) as step \\gexec
			insert into listing_price_log (listing_id, old_price, new_price, changed_by)
			select $1 + 1, case when n < 99999 then 100000 + $1 + 2 + n end, 100000 + $1 + 1 + n, session_user
			from generate_series(99999, 0, -1) as n;
			create table bench_data_are_complete ();
			vacuum (freeze, analyze);
		END
        tests/db.sh stop
        up
    fi
    DATABASE_URL=$data "$REFINERY" migrate -e DATABASE_URL -p sql -g -d -m >/dev/null
    login=$(tests/db.sh login)
}

# serve PORT AUTH DATABASE: starts the service and waits for its first answer.
serve() {
    DATABASE_URL=${login%/*}/$3 LISTEN_ADDR=127.0.0.1:$1 AUTH=$2 ADMIN_ADDR=127.0.0.1:0 \
        target/release/listing-api 2>>"$scratch/log" &
    services="$services $!"
    until curl --silent --fail --output /dev/null "http://127.0.0.1:$1/listings/1"; do
        kill -0 $! 2>/dev/null || { cat "$scratch/log" >&2; exit 1; }
    done
}
