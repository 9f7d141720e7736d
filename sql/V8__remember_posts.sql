-- Remembers the Idempotency-Key of each POST that had one, so that a repetition makes no second listing.
set local search_path = pg_catalog, pg_temp;
set local lock_timeout = '5s';

create table public.idempotency_key (
    owner text,
    key text not null,
    body_sha256 bytea not null,
    -- No foreign key: the key of a deleted listing makes no new one.
    listing_id integer not null,
    created_at timestamptz not null default clock_timestamp(),
    constraint idempotency_key_is_unique unique nulls not distinct (key, owner)
);

comment on table public.idempotency_key is
    'Which listing a POST with an Idempotency-Key made.';
comment on column public.idempotency_key.owner is
    'The owner of the API key. Null: an administrator''s key, or AUTH=off.';
comment on column public.idempotency_key.key is
    'The key as the client sent it, without quotes.';
comment on column public.idempotency_key.body_sha256 is
    'SHA-256 of the body. With another body, the key is refused.';
comment on column public.idempotency_key.listing_id is
    'The listing, which may be deleted since. Do not give its id to another listing.';
comment on column public.idempotency_key.created_at is
    'When the listing was made.';

create function public.prune_idempotency_keys(older_than interval default '1 day') returns bigint
    language plpgsql
    set search_path = pg_catalog, pg_temp
as $$
declare
    pruned bigint;
begin
    if prune_idempotency_keys.older_than < interval '1 day' then
        raise exception 'clients may rely on a key for a day'
            using errcode = 'invalid_parameter_value';
    end if;
    delete from public.idempotency_key
    where created_at < clock_timestamp() - prune_idempotency_keys.older_than;
    get diagnostics pruned = row_count;
    return pruned;
end
$$;

comment on function public.prune_idempotency_keys(interval) is
    'Removes keys that are older, at least a day. Returns how many. For the owner of the tables.';

select public.reset_listing_access();

set local search_path to default;
