-- Pages of the listings of a city or of a postal code, by id, without passing over all the others.
-- On a big table build both concurrently by hand beforehand (see the README), then this finds them.
-- squawk-ignore-file require-concurrent-index-creation
set local lock_timeout = '5s';

create index if not exists listing_city_id_idx on public.listing (city, id);
create index if not exists listing_postal_code_id_idx on public.listing (postal_code, id);

-- Not the others. Building types and countries are few, so that a page of one is found soon by going along the ids; only one
-- that hardly occurs costs a pass over the table. A range of prices, areas or rooms leaves no order by id to read a page in.
-- And an index on the price would have to follow every change of a price, which now touches no index of this table at all.
comment on index public.listing_city_id_idx is
    'Pages of the listings of a city: GET /listings?city=.';
comment on index public.listing_postal_code_id_idx is
    'Pages of the listings of a postal code: GET /listings?postal_code=.';
