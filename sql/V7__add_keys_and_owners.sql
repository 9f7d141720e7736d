-- Who may write, for a service that runs with AUTH=keys: keys, and owners of listings. Whoever writes without the service,
-- as the earlier ones do, needs to know of neither: a listing that names no owner is nobody's.

-- The new column touches no row. Its rule is checked in one pass over the table, too short to be worth a migration of its own:
-- squawk-ignore-file constraint-missing-not-valid
set local lock_timeout = '5s';

alter table public.listing
    -- A name is told apart by whoever reads it in the log: no blanks around it, no line breaks within.
    add column owner text,
    add constraint listing_owner_is_a_name check (owner <> '' and owner = btrim(owner) and owner !~ '[[:cntrl:]]');

comment on column public.listing.owner is
    'Whose it is, as in api_key.owner: with AUTH=keys, only keys of this owner and administrators'' keys change it. Null: '
    'nobody''s, only administrators'' keys. Changed by hand_over_listings().';

-- The service says whose a listing is when it creates it, and looks whose it is when it changes it, but gives none away.
revoke update on public.listing from listing_api;
grant update (
    id,
    name,
    description,
    building_type,
    street_address,
    postal_code,
    city,
    country,
    surface_area_m2,
    rooms_count,
    bedrooms_count,
    price,
    contact_phone_number,
    created_date,
    updated_date
) on public.listing to listing_api;

create table public.api_key (
    id bigint generated always as identity primary key,
    owner text,
    key_sha256 bytea not null unique,
    created_at timestamptz not null default clock_timestamp(),
    revoked_at timestamptz,
    note text,
    -- As on listing.
    constraint api_key_owner_is_a_name check (owner <> '' and owner = btrim(owner) and owner !~ '[[:cntrl:]]'),
    -- The log knows administrators' keys as admin:1, admin:2, and so on. Nobody else shall look like one.
    constraint api_key_owner_does_not_look_like_an_administrator check (owner !~* '^admin[^[:alnum:]]*:'),
    constraint api_key_sha256_has_32_bytes check (octet_length(key_sha256) = 32)
);

-- The database may have default privileges, which let others at each new table. Not at this one.
do $$
declare
    grantee text;
begin
    for grantee in
        select distinct case granted.grantee when 0 then 'public' else quote_ident(role.rolname) end
        from pg_catalog.pg_class as class
        cross join aclexplode(class.relacl) as granted
        left join pg_catalog.pg_roles as role on role.oid = granted.grantee
        where class.oid = 'public.api_key'::regclass
            and granted.grantee <> class.relowner
    loop
        execute format('revoke all on public.api_key from %s', grantee);
    end loop;
end
$$;

comment on table public.api_key is
    'Who may write through a service that runs with AUTH=keys. The keys themselves are nowhere: create_api_key() shows each '
    'once. See list_api_keys(), revoke_api_key(), hand_over_listings().';
comment on column public.api_key.id is
    'Names the key to revoke_api_key(). In the log, an administrator''s key is admin: and this number.';
comment on column public.api_key.owner is
    'Whose listings the key may change, and whose those become that it creates. Stands in the log as changed_by. '
    'Null: an administrator''s key, which may change every listing; those that it creates are nobody''s.';
comment on column public.api_key.key_sha256 is
    'SHA-256 of the key. A key is random throughout, so its hash needs neither salt nor slowness: there is nothing to guess.';
comment on column public.api_key.created_at is
    'When the key was made.';
comment on column public.api_key.revoked_at is
    'Since when the key is refused. Null: it is valid.';
comment on column public.api_key.note is
    'What the key is for, in the words of whoever made it.';

-- By default everybody may execute a function: each of these is taken back.
create function public.create_api_key(owner text default null, note text default null, administrator boolean default false)
    returns text
    language plpgsql
    set search_path = pg_catalog, pg_temp
as $$
declare
    secret text;
begin
    -- An owner that is null by accident shall not make an administrator.
    if (create_api_key.owner is null) is distinct from create_api_key.administrator then
        raise exception 'a key has an owner, or administrator => true: one of the two'
            using errcode = 'invalid_parameter_value';
    end if;
    -- Each uuid brings 122 random bits, from the source that makes the server's other secrets too; of three, the hash keeps
    -- 256, and no extension is needed. All in one statement, so that neither the key nor its hash becomes the parameter of
    -- another one, which a log might show.
    with new_key as materialized (
        select 'lk_' || encode(
            sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())),
            'hex'
        ) as text
    ),
    stored as (
        insert into public.api_key (owner, key_sha256, note)
        select create_api_key.owner, sha256(convert_to(new_key.text, 'UTF8')), create_api_key.note
        from new_key
    )
    select new_key.text into secret from new_key;
    return secret;
end
$$;

comment on function public.create_api_key(text, text, boolean) is
    'Makes a key and returns it, this once: only its hash is kept. Its owner may have other keys already. '
    'administrator => true in place of an owner makes a key that may change every listing. For the owner of api_key.';
revoke all on function public.create_api_key(text, text, boolean) from public;

create function public.revoke_api_key(key_id bigint) returns timestamptz
    language plpgsql
    set search_path = pg_catalog, pg_temp
as $$
declare
    revoked timestamptz;
begin
    update public.api_key
    set revoked_at = coalesce(revoked_at, clock_timestamp())
    where id = revoke_api_key.key_id
    returning revoked_at into revoked;
    -- Whoever mistypes an id shall not believe that a key is gone.
    if not found then
        raise exception 'there is no key %', revoke_api_key.key_id
            using errcode = 'no_data_found';
    end if;
    return revoked;
end
$$;

comment on function public.revoke_api_key(bigint) is
    'Refuses a key to every request that begins after this has been committed, and returns since when it is refused. '
    'For the owner of api_key.';
revoke all on function public.revoke_api_key(bigint) from public;

create function public.list_api_keys()
    returns table (id bigint, owner text, created_at timestamptz, revoked_at timestamptz, note text)
    language sql
    stable
begin atomic
    select api_key.id, api_key.owner, api_key.created_at, api_key.revoked_at, api_key.note
    from public.api_key
    order by api_key.id;
end;

comment on function public.list_api_keys() is
    'Every key that was ever made, also the revoked ones, without what would let anybody write.';
revoke all on function public.list_api_keys() from public;
grant execute on function public.list_api_keys() to listing_auditor;
-- The function reads with the rights of whoever calls it.
grant select (id, owner, created_at, revoked_at, note) on public.api_key to listing_auditor;

create function public.hand_over_listings(listing_ids integer[], new_owner text) returns bigint
    language sql
begin atomic
    with handed_over as (
        update public.listing
        set owner = hand_over_listings.new_owner
        where id = any (hand_over_listings.listing_ids)
            and owner is distinct from hand_over_listings.new_owner
        returning id
    )
    select count(*) from handed_over;
end;

comment on function public.hand_over_listings(integer[], text) is
    'Makes listings an owner''s, whosesoever they were, or nobody''s where the owner is null, and returns how many that '
    'changed. From its commit on, no key of the owner before changes them. For the owner of listing.';
revoke all on function public.hand_over_listings(integer[], text) from public;

-- Runs as its owner, so that the service can find a key by its hash and read nothing else of the table.
create function public.find_api_keys(hashes bytea[]) returns table (key_sha256 bytea, id bigint, owner text)
    language sql
    stable
    security definer
    set search_path = pg_catalog, pg_temp
begin atomic
    select api_key.key_sha256, api_key.id, api_key.owner
    from public.api_key
    where api_key.key_sha256 = any (find_api_keys.hashes)
        and api_key.revoked_at is null;
end;

comment on function public.find_api_keys(bytea[]) is
    'The valid keys among those with these hashes. For the service, which asks at every request that writes.';
revoke all on function public.find_api_keys(bytea[]) from public;
grant execute on function public.find_api_keys(bytea[]) to listing_api;
