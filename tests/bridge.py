#!/usr/bin/env python3
"""Kills the bridge to NATS, NATS, the service and PostgreSQL in turn while prices change, and verifies what the stream holds.

Run it with `make bridge`, which sets the variables.
"""

import asyncio, collections, json, os, random, shutil, signal, socket, subprocess, sys, tempfile, threading, time, urllib.request

import nats

ROUNDS = int(os.environ.get("ROUNDS", "3"))
CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DB = os.path.join(CHECKOUT, "tests/db.sh")
HOME = os.path.join(CHECKOUT, ".postgres-bridge")
ENVIRONMENT = {**os.environ, "PG_HOME": HOME, "PG_SETTINGS": "-c fsync=off"}
ENVIRONMENT.pop("DATABASE_URL", None)
LISTING = {
    "name": "Loft", "description": "Under the roof", "building_type": "APARTMENT", "latest_price_eur": 100,
    "postal_address": {"street_address": "1 rue Oberkampf", "postal_code": "75011", "city": "Paris", "country": "FR"},
    "surface_area_m2": 42.5, "rooms_count": 2, "bedrooms_count": 1,
}
# A price of a transaction that rolls back ends in .13. The long transaction begins before the short ones and commits after them.
TRANSACTIONS = """
begin; update listing set price = price + 1.5 where id % 7 = {0}; savepoint s; update listing set price = 0.13 where id % 5 = {0};
rollback to s; update listing set price = price + 1 where id % 11 = {0}; commit;
begin; update listing set price = 9.13 where id % 3 = 0; delete from listing where id % 3 = 1; rollback;
"""
# Each kill comes soon after many changes, so that it hits the bridge while it publishes.
MANY_LISTINGS = """
insert into listing (name, street_address, postal_code, city, country, description, building_type, price, surface_area_m2,
    rooms_count, bedrooms_count)
select 'Loft', 'street', '75011', 'Paris', 'FR', 'roof', 'HOUSE', 100, 40, 2, 1 from generate_series(1, 2000)
"""
MANY_CHANGES = "update listing set price = price + 2 where id <= 2000"
LONG_TRANSACTION = "begin; update listing set price = price + 0.25 where id % 13 = {0}; select pg_sleep(1); commit;"


def call(*command, **options):
    return subprocess.run(command, env=ENVIRONMENT, check=True, text=True, stdout=subprocess.PIPE, **options).stdout.strip()


def free_port():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


def psql(sql, check=True):
    command = [DB, "run", "psql", "-XAtq", "-v", "ON_ERROR_STOP=1", SUPERUSER]
    done = subprocess.run(command, env=ENVIRONMENT, input=sql, text=True, capture_output=True, check=check)
    return [line.split("|") for line in done.stdout.splitlines()]


class Part:
    """A process that is killed and started again."""

    def __init__(self, command, **variables):
        self.command, self.environment = command, {**os.environ, **variables}
        self.log = open(os.path.join(FOLDER, os.path.basename(command[-1]) + ".log"), "ab")
        self.start()

    def start(self):
        self.process = subprocess.Popen(self.command, env=self.environment, stdout=self.log, stderr=self.log)

    def kill(self):
        self.process.kill()
        self.process.wait()


class Postgres:
    def kill(self):
        with open(f"{HOME}/data/postmaster.pid") as file:
            postmaster = file.readline().strip()
        children = subprocess.run(["pgrep", "-P", postmaster], text=True, stdout=subprocess.PIPE).stdout.split()
        for process in map(int, [postmaster, *children]):
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.2)
        os.remove(f"{HOME}/data/postmaster.pid")

    def start(self):
        call(DB, "up")


def write_by_api(stop):
    """Creates, changes and deletes listings. A request that fails, because a part is down, is not repeated."""
    ids = []
    while not stop.is_set():
        method = random.choices(["POST", "PATCH", "DELETE"], [len(ids) < 60 or 0.05, 6, 0.2])[0] if ids else "POST"
        path = "/listings" if method == "POST" else f"/listings/{random.choice(ids)}"
        body = LISTING if method == "POST" else {"latest_price_eur": random.randrange(1000)}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(API + path, json.dumps(body).encode(), headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                if method == "POST":
                    ids.append(json.load(response)["id"])
        except OSError:
            time.sleep(0.05)


def write_by_psql(stop, sql):
    while not stop.is_set():
        psql(sql.format(random.randrange(3)), check=False)


def read_log():
    """The id and price of each change that is kept, by listing. A deletion has no price, and its listing no other change."""
    rows = psql("""select listing_id, id, new_price::float8 from listing_price_log
        union all select listing_id, id, null from listing_deletion order by 1, 2""")
    log = collections.defaultdict(list)
    for listing, number, price in rows:
        log[int(listing)].append((int(number), float(price) if price else None))
    return log


async def read_stream(broker):
    """All messages, as `{begun: {listing: [change]}}`."""
    async with await nats.connect(broker) as connection:
        stream = connection.jetstream()
        count = (await stream.stream_info("listing_changes")).state.messages
        messages = await stream.pull_subscribe("listing.change.*", stream="listing_changes")
        runs = collections.defaultdict(lambda: collections.defaultdict(list))
        while count:
            for message in await messages.fetch(min(count, 500)):
                await message.ack()
                change = json.loads(message.data)
                runs[message.headers["Begun"]][change["listing_id"]].append(change)
                count -= 1
        return runs


def differences(log, changes):
    """Why this part of the stream is not the log."""
    for listing in changes.keys() | log.keys():
        have, kept = changes.get(listing, []), log.get(listing, [])
        numbers = [change["id"] for change in have]
        # A repetition is allowed, a change that comes late is not.
        if list(dict.fromkeys(numbers)) != sorted(set(numbers)):
            yield f"listing {listing} is out of order: {numbers}"
        if any(str(change.get("price_eur")).endswith(".13") for change in have):
            yield f"listing {listing} has a price that was rolled back"
        if kept and kept[-1][1] is None:
            have = have[-1:]  # Its prices were delivered before the deletion, or not at all.
        if sorted({(change["id"], change.get("price_eur")) for change in have}) != kept:
            yield f"listing {listing}: the stream has {have}, the log {kept}"


def wait_for_the_log(broker, known):
    """Waits until the newest run of the feed, which must not be a known one, holds the log. Returns all runs."""
    log, until = read_log(), time.monotonic() + 120
    while True:
        runs = asyncio.run(read_stream(broker))
        latest = max(runs)
        found = list(differences(log, runs[latest])) if latest not in known else ["the bridge has not begun anew"]
        if not found:
            return runs
        if time.monotonic() > until:
            sys.exit("\n".join(found[:20]))
        time.sleep(1)


FOLDER = tempfile.mkdtemp()
parts = {}
stop = threading.Event()
call(DB, "down")
try:
    SUPERUSER = call(DB, "up")
    subprocess.run([os.environ["REFINERY"], "migrate", "-e", "URL", "-p", "sql", "-g", "-d", "-m"], check=True,
                   cwd=CHECKOUT, env={**os.environ, "URL": SUPERUSER}, stdout=subprocess.DEVNULL)
    psql(MANY_LISTINGS)
    broker_port, port = free_port(), free_port()
    BROKER, API = f"nats://127.0.0.1:{broker_port}", f"http://127.0.0.1:{port}"
    parts["nats"] = Part(["nats-server", "-a", "127.0.0.1", "-p", str(broker_port), "-js", "-sd", f"{FOLDER}/nats"])
    parts["service"] = Part(["target/debug/listing-api"], DATABASE_URL=call(DB, "login"), LISTEN_ADDR=f"127.0.0.1:{port}",
                            ADMIN_ADDR="127.0.0.1:0", AUTH="off")
    parts["bridge"] = Part([sys.executable, "deploy/nats/bridge.py"], API_URL=API, NATS_URL=BROKER)
    parts["postgres"] = Postgres()
    writers = [threading.Thread(target=write_by_api, args=[stop]) for _ in range(4)]
    writers += [threading.Thread(target=write_by_psql, args=[stop, sql]) for sql in (TRANSACTIONS, LONG_TRANSACTION)]
    for writer in writers:
        writer.start()
    for name in list(parts) * ROUNDS:
        psql(MANY_CHANGES, check=False)
        time.sleep(random.uniform(0.2, 1.2))
        parts[name].kill()
        time.sleep(random.uniform(0, 1))
        parts[name].start()
        print(f"killed and started {name}", flush=True)
    time.sleep(2)
    stop.set()
    for writer in writers:
        writer.join()
    runs = wait_for_the_log(BROKER, [])
    for begun, changes in sorted(runs.items()):
        messages = [(change["listing_id"], change["id"]) for history in changes.values() for change in history]
        print(f"the stream begun at {begun} has {len(messages)} messages, {len(set(messages))} of them distinct")
    psql("select restart_change_feed()")
    # The bridge hears of it at the next change.
    psql("update listing set price = price + 1")
    wait_for_the_log(BROKER, list(runs))
    print("each committed change is in the stream, and again after restart_change_feed()")
finally:
    stop.set()
    for name in ("bridge", "service", "nats"):
        if name in parts:
            parts[name].kill()
    call(DB, "down")
    if sys.exc_info()[0]:
        print(f"the logs are in {FOLDER}", file=sys.stderr)
    else:
        shutil.rmtree(FOLDER)
