#!/bin/sh
# Measures what depends on the size: LISTINGS listings with PRICES prices in all, against a tenth of both. Each round measures both
# databases in turn on one server. `make bench LISTINGS= PRICES=` runs this.
. benches/common.sh
seconds=${SECONDS_EACH:-5}
result=target/size.md
: "${LISTINGS:?is not set}" "${PRICES:?is not set}"
small=$((LISTINGS / 10))_$((PRICES / 10))
large=${LISTINGS}_$PRICES

for size in $small $large; do load "${size%_*}" "${size#*_}"; done
# Otherwise the first rows would measure the disk.
cat "$PG_HOME"/data/base/*/* > /dev/null
serve 18080 off "bench_$small"
serve 18081 off "bench_$large"

# Each of these prints one figure. Its arguments are the port of the service, the number of listings and the URL of the database.
rate() {
    LISTINGS=$2 wrk --threads="$cores" --connections=32 --duration="${seconds}s" --script=benches/speed.lua \
        "http://127.0.0.1:$1" -- "$what" > "$scratch/wrk"
    awk '$1 == "result" && $5 == 0 && $7 == 0 { print $2 }' "$scratch/wrk" | grep . || { cat "$scratch/wrk" >&2; exit 1; }
}
write_rate() { sql "$3" -c 'vacuum listing' -c checkpoint; rate "$@"; }
get() {
    curl --silent --fail --dump-header "$scratch/head" --output /dev/null --write-out '%{time_total}\n' "http://127.0.0.1:$1" \
        > "$scratch/seconds"
    awk '{ print $1 * 1000 }' "$scratch/seconds"
}
history() { get "$1/listings/$(($2 + 1))/prices"; }
# Reads every page of the history. The address of each is in the one before.
pages() {
    next="/listings/$(($2 + 1))/prices?limit=1000"
    while [ "$next" ]; do
        get "$1$next"
        next=$(sed -n 's/^link: <\(.*\)>.*/\1/p' "$scratch/head")
    done | median
}
duration() {
    printf 'begin;\n\\timing on\n%s;\n\\timing off\nrollback;\n' "$what" | sql "$3" | sed -n 's/^Time: \([0-9.]*\).*/\1/p'
}
query() { sql "$3" -c "$what"; }
pages_read() {
    sql "$3" -c "explain (analyze, buffers) select id, new_price, changed_at from listing_price_log where listing_id = 4711
        order by id" |
        awk '/Buffers/ { gsub(/[^0-9]+/, " "); print $1 + $2; exit }'
}

# row LABEL ROUNDS COMMAND [WHAT]: prints a row of the table: the medians of both sizes, and the median of the ratios of all rounds.
# If there are several rounds, one more before them warms the caches.
row() {
    count=$2 command=$3 what=${4:-}
    : > "$scratch/rounds"
    [ "$count" = 1 ] || count=$((count + 1))
    for _ in $(seq "$count"); do
        for size in "18080 $small" "18081 $large"; do
            data=${size#* }
            $command "${size% *}" "${data%_*}" "$server/bench_$data" > "$scratch/figure"
            tr '\n' ' ' < "$scratch/figure" >> "$scratch/rounds"
        done
        echo >> "$scratch/rounds"
    done
    column() { { [ "$count" = 1 ] && cat || sed 1d; } < "$scratch/rounds" | awk "{ print $1 }" | median; }
    echo "$(column '$1') $(column '$2') $(column '$2 / $1')" | awk -v label="$1" '{ form = $1 < 20 ? "%10.1f" : "%10.0f"
        printf "| %-50s | " form " | " form " | %5.2f |\n", label, $1, $2, $3 }' | tee -a $result
}

{
    echo "PostgreSQL $(sql "$server/postgres" -c 'show server_version') with $(echo "$PG_SETTINGS" | sed 's/-c //g'); $cores cores."
    echo
    printf '| %-50s | %10s | %10s | ratio |\n' 'prices' "$(grouped $((PRICES / 10)))" "$(grouped "$PRICES")"
    echo '|---|---:|---:|---:|'
} | tee $result
row 'table of the log, MB' 1 query "select pg_table_size('listing_price_log') / 1e6"
row 'indexes of the log, MB' 1 query "select pg_indexes_size('listing_price_log') / 1e6"
row 'listings with their indexes, MB' 1 query "select pg_total_relation_size('listing') / 1e6"
row 'pages that PostgreSQL reads for a history' 1 pages_read
row 'prices of a listing, requests per second' "$rounds" rate history
row 'a listing, requests per second' "$rounds" rate listing
# The writes change the data. The next run creates the smaller database again, because speed.sh copies one of that size.
sql "$server/bench_$small" -c 'drop table bench_data_are_complete'
row 'PATCH of the price, requests per second' "$rounds" write_rate patch
row '100,000 prices of a listing in one response, ms' "$rounds" history
row 'a page with 1,000 of these prices, ms' 1 pages
row 'listing_price_log_problem, ms' 1 duration 'table listing_price_log_problem'
# All before the third price of the first listing: the first price of each listing.
row 'prune of every tenth price, ms' 1 duration "select prune_price_history((select changed_at from listing_price_log
    where listing_id = 1 order by id offset 2 limit 1))"
