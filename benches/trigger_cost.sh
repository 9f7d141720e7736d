#!/bin/sh
# Measures what the price history costs. Runs each statement against listing and against the same table without its triggers,
# in turn, on one server. Only the ratios carry over to another machine. `make bench` runs this and sets the variables.
set -eu
rows=200000
rounds=5
seconds=2
clients=8

db() { program=$1; shift; tests/db.sh run "$program" "$@"; }
sql() { db psql --no-psqlrc --quiet --tuples-only --no-align --set=ON_ERROR_STOP=1 "$bench_url" "$@"; }
median() { sort -n | awk '{ value[NR] = $1 } END { print value[int((NR + 1) / 2)] }'; }

scratch=$(mktemp -d)
server_url=$(echo "$DATABASE_URL" | sed 's|/[^/?]*\([?].*\)\{0,1\}$|/postgres\1|')
bench_url=$(echo "$server_url" | sed 's|/postgres\([?].*\)\{0,1\}$|/listing_bench\1|')
drop() { db psql --no-psqlrc --quiet "$server_url" -c 'set client_min_messages = error' \
    -c 'drop database if exists listing_bench with (force)'; }
trap 'drop; rm -r "$scratch"' EXIT
trap 'exit 130' INT TERM

seconds_now() { sql -c 'select extract(epoch from clock_timestamp())'; }

columns='id, price, name, description, building_type, street_address, postal_code, city, country, surface_area_m2, rooms_count,
    bedrooms_count'
values="n, n, 'Loft', repeat('Nice. ', 40), 'HOUSE', '1 rue Oberkampf', '75011', 'Paris', 'FR', 42.5, 2, 1
    from generate_series(1, $rows) as n"

echo "Migrating an inherited table of $rows listings." >&2
drop
db psql --no-psqlrc --quiet "$server_url" -c 'create database listing_bench'
sql -c "create table listing (id serial primary key, name varchar not null, description varchar not null,
    building_type varchar not null, street_address varchar not null, postal_code varchar not null, city varchar not null,
    country varchar not null, surface_area_m2 double precision not null, rooms_count integer not null,
    bedrooms_count integer not null, price double precision not null, contact_phone_number varchar, created_date timestamp,
    updated_date timestamp)" \
    -c "insert into listing ($columns) select $values"
before=$(seconds_now)
DATABASE_URL=$bench_url "$REFINERY" migrate -e DATABASE_URL -p sql -g -d -m >/dev/null
migration=$(echo "$(seconds_now) $before" | awk '{ printf "%.1f", $1 - $2 }')

sql -c 'create table bare (like listing including all)' \
    -c "insert into bare ($columns) select $values"

# change, keep and keep_undated TABLE: print one transaction of pgbench. Services set updated_date, psql does not.
change() { echo "update $1 set price = price + 1, updated_date = now() where id = :id"; }
keep() { echo "update $1 set price = price, name = 'Flat', updated_date = now() where id = :id"; }
keep_undated() { echo "update $1 set price = price, name = 'Flat' || :id where id = :id"; }

# rate STATEMENT TABLE SYNCHRONOUS_COMMIT: prints transactions per second.
rate() {
    { echo "\\set id random(1, $rows)"; "$1" "$2"; } > "$scratch/$1.sql"
    PGOPTIONS="-c synchronous_commit=$3" db pgbench --no-vacuum --protocol=prepared --client=$clients --jobs=2 \
        --time=$seconds --file="$scratch/$1.sql" "$bench_url" | sed -n 's/^tps = \([0-9]*\).*/\1/p' | grep .
}

# duration STATEMENT: prints the milliseconds that it takes.
duration() {
    sql -c '\timing on' -c "$1" | sed -n 's/^Time: \([0-9]*\).*/\1/p' | grep .
}

# row LABEL UNIT: prints a row of the table: the medians of both tables, and the median of the ratios of all rounds.
row() {
    paste "$scratch/bare" "$scratch/listing" | awk -v unit="$2" '{ print unit == "ms" ? $1 / $2 : $2 / $1 }' > "$scratch/ratio"
    printf '| %-60s | %6s %-2s | %6s %-2s | %5.2f |\n' "$1" "$(median < "$scratch/bare")" "$2" \
        "$(median < "$scratch/listing")" "$2" "$(median < "$scratch/ratio")"
    : > "$scratch/bare"
    : > "$scratch/listing"
}

echo "| $(printf %-60s "PostgreSQL $(sql -c 'show server_version'), $(nproc 2>/dev/null || sysctl -n hw.ncpu) cores") |      bare |    logged | ratio |"
echo '|--------------------------------------------------------------|-----------|-----------|-------|'
for commit in on off; do
    for statement in change keep keep_undated; do
        for _ in $(seq $rounds); do
            for table in bare listing; do
                sql -c "vacuum $table" -c checkpoint
                rate $statement $table $commit >> "$scratch/$table"
            done
        done
        case $statement in
            change) label='a new price' ;;
            keep) label='the same price' ;;
            keep_undated) label='the same price and no date' ;;
        esac
        [ $commit = on ] && how="$clients clients" || how="$clients clients, async"
        row "update with $label, $how" /s
    done
done
# Now most rows of the log come from writes in random order, each in a transaction of its own.
bytes=$(sql -c "with log as (select count(*) as rows from listing_price_log)
    select format('A price takes %s bytes in the log: %s in the table, %s in the primary key, %s in the index on xact_id.',
        round(pg_total_relation_size('listing_price_log') / rows::numeric),
        round(pg_table_size('listing_price_log') / rows::numeric),
        round(pg_relation_size('listing_price_log_pkey') / rows::numeric),
        round(pg_relation_size('listing_price_log_xact_id_idx') / rows::numeric))
    from log")
for round in $(seq $rounds); do
    series="generate_series($((rows * round + 1)), $((rows * round + rows)))"
    for table in bare listing; do
        sql -c checkpoint
        duration "insert into $table ($columns) select $(echo "$values" | sed "s/generate_series(.*)/$series/")" \
            >> "$scratch/$table"
    done
done
row "insert of $rows rows" ms
for _ in $(seq $rounds); do
    for table in bare listing; do
        sql -c "vacuum analyze $table" -c checkpoint
        duration "update $table set price = price + 1, updated_date = now() where id <= $rows" >> "$scratch/$table"
    done
done
row "update of $rows prices" ms
echo
echo "Migrating an inherited table of $rows listings takes $migration s. The table is locked for that time."
log_rows() { sql -c 'select count(*) from listing_price_log'; }
echo "Checking $(log_rows) prices by listing_price_log_problem takes $(duration 'table listing_price_log_problem') ms," \
    "one listing $(duration 'select * from listing_price_log_problem where listing_id = 777') ms."
since=$(sql -c 'select pg_snapshot_xmin(pg_current_snapshot())' -c 'select clock_timestamp()')
sql -c 'update listing set price = price + 1 where id <= 1000'
xact_id=$(echo "$since" | head -n 1)
moment=$(echo "$since" | tail -n 1)
echo "After 1000 more changes, listing_price_log_problem_since() takes" \
    "$(duration "select * from listing_price_log_problem_since('$xact_id')") ms, listing_price_trend() for that period" \
    "$(duration "select * from listing_price_trend('$moment')") ms, for all time $(duration 'select * from listing_price_trend()') ms."

echo "$bytes"
