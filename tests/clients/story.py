"""The story of a listing, told by the generated Python client."""

import os
import re
import uuid
from typing import Any, TypeVar

from listing_api_client import AuthenticatedClient
from listing_api_client.api.changes import list_changes
from listing_api_client.api.listings import (
    change_listing,
    create_listing,
    delete_listing,
    get_listing,
    list_listings,
    replace_listing,
)
from listing_api_client.api.prices import get_price_chart, list_prices
from listing_api_client.models import (
    BuildingType,
    Deletion,
    ErrorMessage,
    Listing,
    ListingPatch,
    ListingWrite,
    PostalAddressWrite,
    PriceChange,
)
from listing_api_client.types import UNSET, Response, Unset

T = TypeVar("T")


def of_type(expected: type[T], parsed: object) -> T:
    assert isinstance(parsed, expected), parsed
    return parsed


def following(response: Response[Any]) -> str | Unset:
    """The `after` of the next page."""
    link = re.search("after=([^&>]*)", response.headers.get("link", ""))
    return link[1] if link else UNSET


api = AuthenticatedClient(base_url=os.environ["ADDRESS"], token=os.environ["KEY"])
now = list_changes.sync_detailed(client=api, after="now")

loft = ListingWrite(
    name="Loft",
    postal_address=PostalAddressWrite(
        street_address="1 rue Oberkampf", postal_code="75011", city="Paris", country="FR"
    ),
    description="Under the roof",
    building_type=BuildingType.APARTMENT,
    latest_price_eur=480000.1,
    surface_area_m2=42.5,
    rooms_count=2,
    bedrooms_count=1,
    contact_phone_number="+33123456789",
)
key = str(uuid.uuid4())
created = create_listing.sync_detailed(client=api, body=loft, idempotency_key=key)
listing = of_type(Listing, created.parsed)
repeated = create_listing.sync_detailed(client=api, body=loft, idempotency_key=key)
assert repeated.parsed == listing
assert repeated.headers["idempotent-replayed"] == "true"
# The whole object back, as another listing.
loft = ListingWrite.from_dict(listing.to_dict())
loft.latest_price_eur = "500000"
other = create_listing.sync(client=api, body=loft, idempotency_key=key)
assert other == ErrorMessage("idempotency-key: was used with another body, use a new key")
second = of_type(Listing, create_listing.sync(client=api, body=loft))

ids: list[int] = []
after: str | Unset = "0"
while not isinstance(after, Unset):
    page = list_listings.sync_detailed(
        client=api, city="Paris", max_price=500000, min_bedrooms=1, limit=1, after=int(after)
    )
    ids += [found.id for found in of_type(list, page.parsed)]
    after = following(page)
assert ids == [listing.id, second.id]

etag = created.headers["etag"]
cheaper = ListingPatch(latest_price_eur=465000)
patched = change_listing.sync_detailed(listing.id, client=api, body=cheaper, if_match=etag)
assert of_type(Listing, patched.parsed).latest_price_eur == 465000
late = change_listing.sync(listing.id, client=api, body=cheaper, if_match=etag)
assert late == ErrorMessage(f"if-match: listing {listing.id} has changed, read it again")
unchanged = get_listing.sync_detailed(listing.id, client=api, if_none_match=patched.headers["etag"])
assert unchanged.status_code == 304
whole = ListingWrite.from_dict(of_type(Listing, patched.parsed).to_dict())
whole.name = "Attic"
assert of_type(Listing, replace_listing.sync(listing.id, client=api, body=whole)).name == "Attic"

history = of_type(list, list_prices.sync(listing.id, client=api))
assert [price.price_eur for price in history] == [480000.1, 465000]
in_force = list_prices.sync(listing.id, client=api, at=history[0].created_date)
assert in_force == history[:1], in_force
assert of_type(str, get_price_chart.sync(listing.id, client=api)).startswith("<svg")

assert delete_listing.sync_detailed(listing.id, client=api).status_code == 204
assert get_listing.sync(listing.id, client=api) == ErrorMessage(f"listing {listing.id} does not exist")
delete_listing.sync(second.id, client=api)

changes: list[Deletion | PriceChange] = []
cursor = following(now)
while len(changes) < 2:
    feed = list_changes.sync_detailed(client=api, after=cursor, wait=10)
    changes += of_type(list, feed.parsed)
    cursor = following(feed)
assert [change.listing_id for change in changes] == [listing.id, second.id]
assert of_type(Deletion, changes[0]).previous_price_eur == 465000
print("The Python client works.")
