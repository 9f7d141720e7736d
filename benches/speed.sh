#!/bin/sh
# Measures how many requests per second the service answers, and compares that with pgbench, which runs the same statements
# directly. Both run in turn, on one machine that they share with PostgreSQL. `make bench` runs this and sets the variables.
. benches/common.sh
result=target/speed.md

load 500000 5000000
say 'copying the data'
bench=$server/listing_bench
sql "$server/postgres" -c 'set client_min_messages = error' -c 'drop database if exists listing_bench with (force)' \
    -c "create database listing_bench template ${data##*/} strategy file_copy" -c checkpoint

api=http://127.0.0.1:18080
for _ in $(seq 9); do
    stop_services
    before=$(now)
    serve 18080 off listing_bench
    service=$!
    echo "$(now) $before" | awk '{ printf "%.0f\n", ($1 - $2) * 1000 }' >> "$scratch/starts"
done
start=$(median < "$scratch/starts")

columns='id, name, street_address, postal_code, city, country, description, building_type, price, surface_area_m2, rooms_count,
    bedrooms_count, contact_phone_number, created_date, updated_date, xmin::text as version'
# The statements of the service. pgbench has no null, so the values 'nobody' and '{}' replace it.
written_by="case when :actor = 'nobody' or set_config('listing.actor', :actor, true) is not null then"
update="update public.listing set name = coalesce(:name, name), street_address = coalesce(:street_address, street_address),
    postal_code = coalesce(:postal_code, postal_code), city = coalesce(:city, city), country = coalesce(:country, country),
    description = coalesce(:description, description), building_type = coalesce(:building_type, building_type),
    price = coalesce(:price, price), surface_area_m2 = coalesce(:surface_area_m2, surface_area_m2),
    rooms_count = coalesce(:rooms_count, rooms_count), bedrooms_count = coalesce(:bedrooms_count, bedrooms_count),
    contact_phone_number = case when :has_phone then :contact_phone_number else contact_phone_number end,
    updated_date = $written_by statement_timestamp() end
    where id = :id and (:versions = '{}' or xmin::text = any(:versions)) and (:owner = 'nobody' or owner = :owner) returning $columns"

# transaction KIND: prints the script of pgbench for the same work as the request of this kind in benches/speed.lua.
transaction() {
    case $1 in
        history) echo '\set id random(1, 500000)'
            echo 'select id, new_price, changed_at from public.listing_price_log where listing_id = :id order by id' ;;
        listing) echo '\set id random(1, 500000)'; echo "select $columns from public.listing where id = :id" ;;
        hot) echo '\set id 4711'; echo "select $columns from public.listing where id = :id" ;;
        unknown) echo '\set id random(500000001, 500500000)'; echo "select $columns from public.listing where id = :id" ;;
        common) echo '\set after random(1, 400000)'
            echo "select $columns from public.listing where id > :after
                and hashtextextended(city, 0) = hashtextextended(:city, 0) and city = :city order by id limit 101" ;;
        rare) echo '\set town random(1, 600)'
            echo "select $columns from public.listing where id > 0
                and hashtextextended(city, 0) = hashtextextended('Town ' || :town, 0) and city = 'Town ' || :town
                order by id limit 101" ;;
        keep) echo '\set id random(400001, 500000)'; echo '\set price 100000 + :id'; echo "$update" ;;
        reprice) echo '\set id random(400001, 500000)'; echo '\set price random(1000000, 9000000)'; echo "$update" ;;
        create | keyed) echo '\set price random(1, 1000000)'
            insert="insert into public.listing (name, street_address, postal_code, city, country, description, building_type,
                price, surface_area_m2, rooms_count, bedrooms_count, contact_phone_number, owner)
                values (:name, :street_address, :postal_code, :city, :country, :description, :building_type, :price,
                :surface_area_m2, :rooms_count, :bedrooms_count, :contact_phone_number,
                $written_by nullif(:owner, 'nobody') end) returning $columns"
            if [ "$1" = create ]; then echo "$insert"; else
                echo '\set key random(1, 9000000000000000000)'
                echo "with created as ($insert), remembered as (insert into public.idempotency_key
                    (owner, key, body_sha256, listing_id) select nullif(:owner, 'nobody'), :key::text, :hash::bytea, id from created)
                    select * from created"
            fi ;;
    esac
}

# measure KIND CLIENTS PROGRAM: runs one round. Prints the requests per second, and for wrk also the latencies.
measure() {
    threads=$(($2 < cores ? $2 : cores))
    # The server processes of the previous round take a moment to exit.
    sleep 0.5
    if [ "$3" = pgbench ]; then
        transaction "$1" > "$scratch/transaction.sql"
        PGOPTIONS='-c plan_cache_mode=force_generic_plan' db pgbench --no-vacuum --protocol=prepared --client="$2" \
            --jobs=$threads --time="$seconds" --file="$scratch/transaction.sql" \
            --define=name=Loft --define='street_address=1 rue Oberkampf' --define=postal_code=75011 --define=city=Paris \
            --define=country=FR --define="description=$(printf 'Nice. %.0s' $(seq 40))" --define=building_type=HOUSE \
            --define=surface_area_m2=42.5 --define=rooms_count=2 --define=bedrooms_count=1 --define=has_phone=true \
            --define=contact_phone_number=+33123456789 --define='versions={}' --define=owner=nobody --define=actor=nobody \
            --define='hash=\x00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff' \
            "$bench" 2>"$scratch/errors" | sed -n 's/^tps = \([0-9]*\).*/\1/p' | grep . || { cat "$scratch/errors" >&2; exit 1; }
    else
        wrk --threads=$threads --connections="$2" --duration="${seconds}s" --script=benches/speed.lua $api -- "$1" \
            > "$scratch/wrk"
        : > "$scratch/log"
        awk -v kind="$1" '$1 == "result" && $5 == (kind == "unknown" ? $6 : 0) && $7 == 0 { print $2, $3, $4 }' "$scratch/wrk" |
            grep . ||
            { say 'some requests did not get the expected status'; cat "$scratch/wrk" >&2; exit 1; }
    fi
}

# row LABEL KIND CLIENTS: prints a row of the table: the medians of both, and the median of the ratios of all rounds.
row() {
    : > "$scratch/rounds"
    for round in $(seq "$rounds"); do
        case $2 in keep | reprice | create | keyed) sql "$bench" -c 'vacuum listing' -c checkpoint ;; esac
        if [ $((round % 2)) = 1 ]; then
            direct=$(measure "$2" "$3" pgbench)
            served=$(measure "$2" "$3" wrk)
        else
            served=$(measure "$2" "$3" wrk)
            direct=$(measure "$2" "$3" pgbench)
        fi
        echo "$direct $served" >> "$scratch/rounds"
    done
    column() { awk "{ print $1 }" "$scratch/rounds" | median; }
    [ "$3" = 1 ] && clients='1 client' || clients="$3 clients"
    printf '| %-42s | %6.0f | %6.0f | %5.2f | %6.2f | %6.2f |\n' "$1, $clients" "$(column '$1')" "$(column '$2')" \
        "$(column '$2 / $1')" "$(column '$3 / 1000')" "$(column '$4 / 1000')" | tee -a $result
}

say 'warming up'
measure history 32 pgbench >/dev/null
measure listing 32 pgbench >/dev/null
measure history 32 wrk >/dev/null
measure listing 32 wrk >/dev/null
echo "PostgreSQL $(sql "$bench" -c 'show server_version') with $(echo "$PG_SETTINGS" | sed 's/-c //g'); $cores cores;
500,000 listings, 5 million prices; medians of $rounds rounds of $seconds s." | tee $result
{
    echo
    echo "| $(printf %-42s 'requests per second') | pgbench | service | ratio | median ms | 99 % ms |"
    echo '|---|---:|---:|---:|---:|---:|'
} | tee -a $result
for count in 1 32 128; do row 'prices of a listing' history $count; done
for count in 1 32 128; do row 'a listing' listing $count; done
row 'always the same listing' hot 32
row 'an unknown listing' unknown 32
row '100 listings of a large city' common 32
row '100 listings of a small town' rare 32
row 'PUT with the same price' keep 32
for count in 32 128; do row 'PUT with a new price' reprice $count; done
# A second instance, which needs an API key.
(
    serve 18081 keys listing_bench
    trap 'kill $!' EXIT
    api=http://127.0.0.1:18081
    KEY=$(sql "$bench" -c 'select create_api_key(administrator => true)')
    export KEY
    row 'PUT with a new price, API key' reprice 32
)
for count in 32 128; do row 'POST' create $count; done
row 'POST with an Idempotency-Key' keyed 32

# The change feed. page ADDRESS: reads a page. Prints its milliseconds, and keeps the address of the next one.
page() {
    curl --silent --fail --dump-header "$scratch/head" --output /dev/null --write-out '%{time_total}\n' "$api$1" |
        awk '{ print $1 * 1000 }'
    sed -n 's/^link: <\(.*\)>.*/\1/p' "$scratch/head" > "$scratch/next"
}
# pages COUNT: the next pages. Prints the milliseconds of each.
pages() { for _ in $(seq "$1"); do page "$(cat "$scratch/next")"; done; }
# median_of NAME: prints a row with the median of the milliseconds.
median_of() { printf '| %-42s | %6.2f |\n' "$1" "$(median)" | tee -a $result; }
{
    echo
    echo "| $(printf %-42s 'a page of 1,000 changes') |     ms |"
    echo '|---|---:|'
} | tee -a $result
echo '/changes' > "$scratch/next"
pages 100 | median_of 'at the start of 5 million prices'
page '/changes?after=now' > /dev/null
say 'changing a million prices in one transaction'
sql "$bench" -c 'begin' -c 'update listing set price = price + 1' -c 'update listing set price = price + 1' -c 'commit'
pages 100 | median_of 'at the start of an import of a million'
pages 400 > /dev/null
pages 100 | median_of 'inside that import'
for _ in $(seq 50); do
    page '/changes?after=now' > /dev/null
    sql "$bench" -c 'update listing set price = price + 1 where id <= 1000'
    pages 1
done | median_of 'at the head'

# Writers without listeners and with 100 of them, in turn. Each listener gets every change.
with_listeners() {
    listeners=
    for _ in $(seq 100); do
        curl --silent --no-buffer --output /dev/null --header 'Accept: text/event-stream' "$api/changes?after=now" &
        listeners="$listeners $!"
    done
    sleep 1
    measure reprice 32 pgbench
    for listener in $listeners; do { kill "$listener" && wait "$listener"; } 2>/dev/null || true; done
}
# ratio LABEL COMMAND COMMAND: prints the median of the second as a ratio to the first. Both run in turn.
ratio() {
    : > "$scratch/rounds"
    for round in $(seq "$rounds"); do
        sql "$bench" -c 'vacuum listing' -c checkpoint
        [ $((round % 2)) = 1 ] || second=$($3)
        first=$($2)
        [ $((round % 2)) = 0 ] || second=$($3)
        echo "${first%% *} ${second%% *}" | awk '{ print $2 / $1 }' >> "$scratch/rounds"
    done
    { echo; echo "$1: $(median < "$scratch/rounds" | cut -c1-5)."; } | tee -a $result
}
ratio 'Writers beside 100 listeners, as a ratio to writers alone' 'measure reprice 32 pgbench' with_listeners
ratio 'POST with an Idempotency-Key, as a ratio to POST' 'measure create 32 wrk' 'measure keyed 32 wrk'

list() { curl --silent --fail --output /dev/null --write-out '%{speed_download}' $api/listings; }
: > "$scratch/rounds"
for round in $(seq "$rounds"); do
    [ $((round % 2)) = 1 ] || served=$(list)
    before=$(now)
    bytes=$(sql "$bench" -c "copy (select $columns from public.listing order by id) to stdout" | wc -c)
    direct=$(echo "$(now) $before $bytes" | awk '{ print $3 / ($1 - $2) / 1000000 }')
    [ $((round % 2)) = 0 ] || served=$(list)
    echo "$direct $served" | awk '{ print $1, $2 / 1000000, $2 / 1000000 / $1 }' >> "$scratch/rounds"
done
column() { awk "{ print $1 }" "$scratch/rounds" | median; }
{
    echo
    echo "All listings in one response: $(column '$2' | cut -c1-5) MB/s, \`copy\` by psql $(column '$1' | cut -c1-5) MB/s, ratio $(column '$3' | cut -c1-4)."
    # Only Linux reports the peak.
    most=$(awk '/^VmHWM/ { printf ", %.0f MB at most", $2 / 1024 }' "/proc/$service/status" 2>/dev/null || true)
    echo "Memory at the end: $(ps -o rss= -p $service | awk '{ printf "%.0f", $1 / 1024 }') MB$most. Start to first answer: $start ms." \
        "Binary: $(wc -c < target/release/listing-api | awk '{ printf "%.1f", $1 / 1048576 }') MB."
} | tee -a $result
