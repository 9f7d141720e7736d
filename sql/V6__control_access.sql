-- Decides who may do what: roles, API keys, owners of listings, and the rights on every object.
--
-- listing_api is for the service, listing_auditor for people who look. Neither can log in: make login roles members of them.
set local search_path = pg_catalog, pg_temp;
set local lock_timeout = '5s';

-- Roles belong to the whole cluster, so they may exist already.
do $$
declare
    role_name text;
begin
    foreach role_name in array array['listing_api', 'listing_auditor'] loop
        if to_regrole(role_name) is null then
            begin
                execute format('create role %I nologin', role_name);
            exception
                when duplicate_object or unique_violation then
                    null; -- A migration of another database in this cluster created it a moment ago.
                when insufficient_privilege then
                    raise exception '% may not create the role %', current_user, role_name
                        using
                            errcode = 'insufficient_privilege',
                            hint = 'Let an administrator run this, then migrate again: '
                                'create role listing_api nologin; create role listing_auditor nologin;';
            end;
        end if;
    end loop;
end
$$;

create table public.api_key (
    id bigint generated always as identity primary key,
    owner text,
    key_sha256 bytea not null unique,
    created_at timestamptz not null default clock_timestamp(),
    revoked_at timestamptz,
    note text,
    -- As for listing.owner.
    constraint api_key_owner_is_a_name check (owner <> '' and owner = btrim(owner) and owner !~ '[[:cntrl:]]'),
    -- The log shows administrators' keys as admin:1, admin:2 and so on.
    constraint api_key_owner_does_not_look_like_an_administrator check (owner !~* '^admin[^[:alnum:]]*:'),
    constraint api_key_sha256_has_32_bytes check (octet_length(key_sha256) = 32)
);

comment on table public.api_key is
    'Who may write through a service with AUTH=keys. Contains hashes, no keys.';
comment on column public.api_key.id is
    'Number of the key, for revoke_api_key(). The log shows an administrator''s key as admin:NUMBER.';
comment on column public.api_key.owner is
    'The key may change the listings of this owner. Null: an administrator''s key, for all listings.';
comment on column public.api_key.key_sha256 is
    'SHA-256 of the key. Keys are random, so there is nothing to guess and no need for a salt.';
comment on column public.api_key.created_at is
    'When the key was created.';
comment on column public.api_key.revoked_at is
    'Since when the key is refused. Null: it is valid.';
comment on column public.api_key.note is
    'What the key is for.';

create function public.create_api_key(owner text default null, note text default null, administrator boolean default false)
    returns text
    language plpgsql
    set search_path = pg_catalog, pg_temp
as $$
declare
    secret text;
begin
    -- An owner that is null by accident must not create an administrator's key.
    if (create_api_key.owner is null) is distinct from create_api_key.administrator then
        raise exception 'a key needs either an owner or administrator => true'
            using errcode = 'invalid_parameter_value';
    end if;
    -- Each uuid has 122 random bits from the server's secure source. The hash of three keeps 256, without an extension. One
    -- statement, so that neither the key nor its hash is a parameter of another statement, which a log might show.
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
    'Creates a key and returns it, this one time. For the owner of the tables.';

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
    -- A mistyped id must not look like success.
    if not found then
        raise exception 'there is no key %', revoke_api_key.key_id
            using errcode = 'no_data_found';
    end if;
    return revoked;
end
$$;

comment on function public.revoke_api_key(bigint) is
    'Refuses a key from the commit on. Returns since when it is refused. For the owner of the tables.';

-- Runs with the rights of its owner, so auditors need no right on the table with the hashes.
create function public.list_api_keys()
    returns table (id bigint, owner text, created_at timestamptz, revoked_at timestamptz, note text)
    language sql
    stable
    security definer
    set search_path = pg_catalog, pg_temp
begin atomic
    select api_key.id, api_key.owner, api_key.created_at, api_key.revoked_at, api_key.note
    from public.api_key
    order by api_key.id;
end;

comment on function public.list_api_keys() is
    'All keys, also the revoked ones, without their hashes.';

-- Runs with the rights of its owner, so the service can look up a key by its hash and read nothing else of the table.
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
    'The valid keys among those with these hashes. For the service.';

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
    'Gives listings to an owner, or to none if null. Returns how many. For the owner of the tables.';

-- The rights on every object but listing. Other roles have none. The owner has all.
create view public.listing_access as
select
    *,
    case kind when 'function' then to_regprocedure(object)::oid else to_regclass(object)::oid end as object_id
from (
    values
        ('table', 'public.listing_price_log', 'select', array['listing_api', 'listing_auditor']),
        ('table', 'public.listing_deletion', 'select', array['listing_api', 'listing_auditor']),
        ('table', 'public.listing_price_log_maintenance', 'select', array['listing_auditor']),
        ('table', 'public.listing_price_change', 'select', array['listing_auditor']),
        ('table', 'public.listing_price_log_problem', 'select', array['listing_auditor']),
        ('table', 'public.listing_setup_problem', 'select', array['listing_api', 'listing_auditor']),
        ('table', 'public.listing_access', 'select', array['listing_api', 'listing_auditor']),
        ('table', 'public.api_key', 'select', '{}'),
        ('table', 'public.idempotency_key', 'select, insert', array['listing_api']),
        ('table', 'public.refinery_schema_history', 'select', array['listing_api', 'listing_auditor']),
        ('sequence', 'public.listing_price_log_id_seq', 'usage', '{}'),
        ('sequence', 'public.listing_price_log_maintenance_id_seq', 'usage', '{}'),
        ('sequence', 'public.api_key_id_seq', 'usage', '{}'),
        ('function', 'public.set_listing_updated_date()', 'execute', '{}'),
        ('function', 'public.log_listing_price()', 'execute', '{}'),
        ('function', 'public.refuse_listing_price_log_change()', 'execute', '{}'),
        ('function', 'public.listing_price_at(integer, timestamptz)', 'execute', array['listing_auditor']),
        ('function', 'public.listing_price_difference(timestamptz, timestamptz)', 'execute', array['listing_auditor']),
        ('function', 'public.listing_price_trend(timestamptz, timestamptz)', 'execute', array['listing_auditor']),
        ('function', 'public.listing_price_activity(timestamptz, timestamptz)', 'execute', array['listing_auditor']),
        ('function', 'public.listing_price_log_problem_since(xid8)', 'execute', array['listing_auditor']),
        ('function', 'public.prunable_prices(timestamptz)', 'execute', array['listing_auditor']),
        ('function', 'public.prune_price_history(timestamptz)', 'execute', '{}'),
        ('function', 'public.import_price_history(regclass, name, name, name)', 'execute', '{}'),
        ('function', 'public.undo_price_changes(xid8)', 'execute', '{}'),
        ('function', 'public.replace_actor(text, text)', 'execute', '{}'),
        ('function', 'public.restart_change_feed()', 'execute', '{}'),
        ('function', 'public.change_feed_epoch()', 'execute', array['listing_api']),
        ('function', 'public.prune_idempotency_keys(interval)', 'execute', '{}'),
        ('function', 'public.create_api_key(text, text, boolean)', 'execute', '{}'),
        ('function', 'public.revoke_api_key(bigint)', 'execute', '{}'),
        ('function', 'public.list_api_keys()', 'execute', array['listing_auditor']),
        ('function', 'public.find_api_keys(bytea[])', 'execute', array['listing_api']),
        ('function', 'public.hand_over_listings(integer[], text)', 'execute', '{}'),
        ('function', 'public.reset_listing_access()', 'execute', '{}')
) as access (kind, object, privileges, roles);

comment on view public.listing_access is
    'Which roles have a right on which object. reset_listing_access() grants exactly these.';
comment on column public.listing_access.kind is
    'table (also for a view), sequence or function.';
comment on column public.listing_access.privileges is
    'The privileges that are granted on the object.';
comment on column public.listing_access.roles is
    'The roles that have them. If empty, only the owner has.';
comment on column public.listing_access.object_id is
    'Null if the object does not exist.';

create function public.reset_listing_access() returns void
    language plpgsql
    set search_path = pg_catalog, pg_temp
as $$
declare
    entry record;
    grantee record;
begin
    for entry in
        select
            access.*,
            coalesce(class.relacl, function.proacl, acldefault('f', function.proowner)) as acl,
            coalesce(class.relowner, function.proowner) as owner
        from public.listing_access as access
        left join pg_class as class on access.kind <> 'function' and class.oid = access.object_id
        left join pg_proc as function on access.kind = 'function' and function.oid = access.object_id
        -- A later migration creates the others.
        where access.object_id is not null
    loop
        for grantee in
            select distinct coalesce(quote_ident(role.rolname), 'public') as name
            from (
                select table_acl.grantee
                from aclexplode(entry.acl) as table_acl
                union all
                select column_acl.grantee
                from pg_attribute
                cross join aclexplode(attacl) as column_acl
                where entry.kind <> 'function' and attrelid = entry.object_id
            ) as acl
            left join pg_roles as role on role.oid = acl.grantee
            where acl.grantee <> entry.owner
        loop
            -- With the rights that the grantee passed on.
            execute format('revoke all on %s %s from %s cascade', entry.kind, entry.object, grantee.name);
        end loop;
        if entry.roles <> '{}' then
            execute format(
                'grant %s on %s %s to %s', entry.privileges, entry.kind, entry.object, array_to_string(entry.roles, ', ')
            );
        end if;
    end loop;

    -- Other roles keep their rights on listing, for the earlier services. The service cannot choose an id or a creation date,
    -- because a listing with a chosen id could take the place of a deleted one. And it cannot change an owner.
    revoke all on public.listing from listing_api, listing_auditor;
    grant select on public.listing to listing_api, listing_auditor;
    grant delete on public.listing to listing_api;
    grant insert (
        name, description, building_type, street_address, postal_code, city, country, surface_area_m2, rooms_count,
        bedrooms_count, price, contact_phone_number, owner
    ) on public.listing to listing_api;
    grant update (
        name, description, building_type, street_address, postal_code, city, country, surface_area_m2, rooms_count,
        bedrooms_count, price, contact_phone_number, updated_date
    ) on public.listing to listing_api;
    execute format(
        'revoke all on sequence %1$s from listing_api, listing_auditor; grant usage on sequence %1$s to listing_api',
        pg_get_serial_sequence('public.listing', 'id')
    );
    grant usage on schema public to listing_api, listing_auditor;
end
$$;

comment on function public.reset_listing_access() is
    'Grants exactly the rights in listing_access, and those of our two roles on listing.';

select public.reset_listing_access();

set local search_path to default;
