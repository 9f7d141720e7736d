#!/usr/bin/env python3
"""Publishes the changes of GET /changes to JetStream, the persistent part of NATS, each at least once: see docs/bridges.md."""

import asyncio, datetime, json, os, re, sys, urllib.error, urllib.request

import nats
from nats.js.errors import KeyNotFoundError, NotFoundError

API = os.environ.get("API_URL", "http://127.0.0.1:8080")
BROKER = os.environ.get("NATS_URL", "nats://127.0.0.1:4222")
FIRST_PAGE = "/changes?wait=30"


def read(page):
    with urllib.request.urlopen(API + page, timeout=60) as response:
        return json.load(response), re.match("<(.*)>", response.headers["Link"])[1]


def begin():
    """A cursor before all changes. Its time tells consumers that the changes come anew."""
    begun = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="microseconds")
    return {"begun": begun, "page": FIRST_PAGE}


async def publish(stream, changes, begun):
    # One at a time. If one is lost, no later change of its listing is stored before it.
    for change in changes:
        identity = f"{begun}-{change['listing_id']}-{change['id']}"
        headers = {"Nats-Msg-Id": identity, "Begun": begun}
        await stream.publish(f"listing.change.{change['listing_id']}", json.dumps(change).encode(), headers=headers)


async def run():
    async with await nats.connect(BROKER, allow_reconnect=False) as connection:
        stream = connection.jetstream()
        try:
            bucket = await stream.key_value("listing_bridge")
        except NotFoundError:
            await stream.add_stream(name="listing_changes", subjects=["listing.change.*"])
            bucket = await stream.create_key_value(bucket="listing_bridge")
        try:
            entry = await bucket.get("cursor")
            cursor, revision = json.loads(entry.value), entry.revision
        except KeyNotFoundError:
            cursor, revision = begin(), 0
        while True:
            # Runs only after all acknowledgements. Fails if another bridge has moved the cursor.
            revision = await bucket.update("cursor", json.dumps(cursor).encode(), last=revision)
            try:
                changes, cursor["page"] = await asyncio.to_thread(read, cursor["page"])
                await publish(stream, changes, cursor["begun"])
            except urllib.error.HTTPError as error:
                if error.code != 410:
                    raise
                cursor = begin()


async def main():
    while True:
        try:
            await run()
        except Exception as error:
            print(f"bridge: {error!r}, next attempt in a second", file=sys.stderr)
            await asyncio.sleep(1)


asyncio.run(main())
