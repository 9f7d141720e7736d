// The story of a listing, told by the generated TypeScript client.

import createClient from "openapi-fetch";
import type { components, paths } from "./api.js";

declare const process: { env: { ADDRESS: string; KEY: string } };

function equal(actual: unknown, expected: unknown) {
  const [left, right] = [JSON.stringify(actual), JSON.stringify(expected)];
  if (left !== right) throw new Error(`${left} is not ${right}`);
}

function present<T>(value: T | null | undefined): T {
  if (value === null || value === undefined) throw new Error("a value is missing");
  return value;
}

/** The `after` of the next page. */
function next(response: Response): string | undefined {
  const path = response.headers.get("link")?.match(/<(.*)>/)?.[1];
  return path && (new URL(path, process.env.ADDRESS).searchParams.get("after") ?? undefined);
}

const { ADDRESS: baseUrl, KEY: key } = process.env;
const options = { baseUrl, headers: { authorization: `Bearer ${key}` } };
const api = createClient<paths, "application/json">(options);
const now = await api.GET("/changes", { params: { query: { after: "now" } } });

const loft: components["schemas"]["ListingWrite"] = {
  name: "Loft",
  postal_address: { street_address: "1 rue Oberkampf", postal_code: "75011", city: "Paris", country: "FR" },
  description: "Under the roof",
  building_type: "APARTMENT",
  latest_price_eur: 480000.1,
  surface_area_m2: 42.5,
  rooms_count: 2,
  bedrooms_count: 1,
  contact_phone_number: "+33123456789",
};
const header = { "Idempotency-Key": crypto.randomUUID() };
const created = await api.POST("/listings", { params: { header }, body: loft });
const listing = present(created.data);
const repeated = await api.POST("/listings", { params: { header }, body: loft });
equal(repeated.data, listing);
equal(repeated.response.headers.get("idempotent-replayed"), "true");
const other = await api.POST("/listings", { params: { header }, body: { ...loft, name: "Flat" } });
equal([other.response.status, other.error?.message], [422, "idempotency-key: was used with another body, use a new key"]);
const second = present((await api.POST("/listings", { body: { ...loft, latest_price_eur: "500000" } })).data);

const ids: number[] = [];
let after: string | undefined;
do {
  const query = { city: "Paris", max_price: 500000, min_bedrooms: 1, limit: 1, after: Number(after ?? 0) };
  const page = await api.GET("/listings", { params: { query } });
  ids.push(...present(page.data).map((found) => found.id));
  after = next(page.response);
} while (after);
equal(ids, [listing.id, second.id]);

const path = { id: listing.id };
const match = { "If-Match": present(created.response.headers.get("etag")) };
const cheaper = { params: { path, header: match }, body: { latest_price_eur: 465000 } };
const patched = await api.PATCH("/listings/{id}", cheaper);
equal(patched.data?.latest_price_eur, 465000);
const late = await api.PATCH("/listings/{id}", cheaper);
equal(late.error, { message: `if-match: listing ${listing.id} has changed, read it again` });
const known = { "If-None-Match": present(patched.response.headers.get("etag")) };
const unchanged = await api.GET("/listings/{id}", { params: { path, header: known } });
equal(unchanged.response.status, 304);
// The whole object back.
const replaced = await api.PUT("/listings/{id}", { params: { path }, body: { ...present(patched.data), name: "Attic" } });
equal(replaced.data?.name, "Attic");

const history = present((await api.GET("/listings/{id}/prices", { params: { path } })).data);
equal(history.map((price) => price.price_eur), [480000.1, 465000]);
const at = present(history[0]).created_date;
const inForce = await api.GET("/listings/{id}/prices", { params: { path, query: { at } } });
equal(inForce.data, [history[0]]);
const charts = createClient<paths, "image/svg+xml">(options);
const chart = await charts.GET("/listings/{id}/prices.svg", { params: { path }, parseAs: "text" });
equal(chart.data?.startsWith("<svg"), true);

const deleted = await api.DELETE("/listings/{id}", { params: { path } });
equal(deleted.response.status, 204);
const gone = await api.GET("/listings/{id}", { params: { path } });
equal([gone.response.status, gone.error?.message], [404, `listing ${listing.id} does not exist`]);
await api.DELETE("/listings/{id}", { params: { path: { id: second.id } } });

const changes: components["schemas"]["Change"][] = [];
let cursor = next(now.response);
while (changes.length < 2) {
  const page = await api.GET("/changes", { params: { query: { after: cursor, wait: 10 } } });
  changes.push(...present(page.data));
  cursor = next(page.response);
}
equal(changes.map((change) => "deleted" in change), [true, true]);
equal(changes[0]?.previous_price_eur, 465000);
console.log("The TypeScript client works.");
