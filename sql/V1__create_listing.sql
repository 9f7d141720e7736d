-- Creates the listing table, or adopts the one of the earlier services.
--
-- Every migration sets the search_path, so that it calls no function and no operator that another role placed in public. The
-- last statement resets the path, because refinery then writes to its own table.
--
-- PostgreSQL parses the whole file before it runs the first statement. To let version 13 reach that statement, this file uses
-- no newer grammar.
-- squawk-ignore-file prefer-timestamp-tz, changing-column-type, adding-not-nullable-field, constraint-missing-not-valid, require-concurrent-index-creation
set local search_path = pg_catalog, pg_temp;

do $$
begin
    if current_setting('server_version_num')::integer < 150000 then
        raise exception 'PostgreSQL 15 or later is required, this server is %', current_setting('server_version')
            using hint = 'Upgrade the server with pg_upgrade, or dump the database and restore it on a newer server.';
    end if;
end
$$;

-- Changing the type of a column needs an exclusive lock. If a long transaction holds the table, the migration fails instead of
-- blocking every other session behind it.
set local lock_timeout = '5s';

-- A role that may create objects in public can place functions and operators there, which other sessions then call.
do $$
declare
    revoke_statements text;
    existing record;
begin
    select string_agg(
        format('revoke create on schema public from %s;', coalesce(quote_ident(role.rolname), 'public')),
        ' '
        order by role.rolname nulls first
    )
    into revoke_statements
    from pg_namespace as schema
    cross join aclexplode(coalesce(schema.nspacl, acldefault('n', schema.nspowner))) as granted
    left join pg_roles as role on role.oid = granted.grantee
    where schema.nspname = 'public'
        and granted.privilege_type = 'CREATE'
        and coalesce(not role.rolsuper and role.rolname not in ('pg_database_owner', current_user), true)
        and granted.grantee <> (select datdba from pg_database where datname = current_database());
    if revoke_statements is not null then
        raise exception 'other roles may create objects in the schema public'
            using
                errcode = 'insufficient_privilege',
                hint = 'Let a superuser or the owner of the schema run this, then migrate again: ' || revoke_statements;
    end if;
    if to_regclass('public.refinery_schema_history') is null then
        raise exception 'refinery did not create its table in the schema public'
            using hint = format(
                'Run this, then migrate again: alter role %I in database %I set search_path = public;',
                current_user,
                current_database()
            );
    end if;
    -- The owner of a table chooses its types, checks, defaults and triggers. They run with the rights of the migrating role.
    for existing in
        select class.relname as name, role.rolname as owner
        from pg_class as class
        join pg_roles as role on role.oid = class.relowner
        where class.oid in (
                to_regclass('public.refinery_schema_history'),
                to_regclass('public.listing'),
                to_regclass('public.listing_price_log')
            )
            and not role.rolsuper
            and role.rolname <> current_user
        order by class.relname = 'refinery_schema_history' desc, class.relname
    loop
        raise exception 'the table % belongs to %', existing.name, existing.owner
            using
                errcode = 'insufficient_privilege',
                hint = case existing.name
                    when 'refinery_schema_history' then
                        'Run this, then migrate again: drop table public.refinery_schema_history;'
                    else format(
                        'Migrate as %I. Or inspect the types, checks, defaults and triggers of the table, run this, then '
                        'migrate again: alter table public.%I owner to %I;',
                        existing.owner,
                        existing.name,
                        current_user
                    )
                end;
    end loop;
end
$$;

-- Exactly as the earlier services created it. The rest of this file converts it.
create table if not exists public.listing (
    id serial primary key,
    name varchar not null,
    description varchar not null,
    building_type varchar not null,
    street_address varchar not null,
    postal_code varchar not null,
    city varchar not null,
    country varchar not null,
    surface_area_m2 double precision not null,
    rooms_count integer not null,
    bedrooms_count integer not null,
    price double precision not null,
    contact_phone_number varchar,
    created_date timestamp,
    updated_date timestamp
);

do $$
begin
    if pg_get_serial_sequence('public.listing', 'id') is null
        or (
            select atttypid <> 'integer'::regtype
            from pg_attribute
            where attrelid = 'public.listing'::regclass and attname = 'id'
        )
    then
        raise exception 'the column id of the table listing is not of type serial'
            using hint = 'Run this with the sequence that numbers the listings, then migrate again: '
                'alter table public.listing alter id type integer; alter sequence … owned by public.listing.id;';
    end if;
    if (select relkind not in ('r', 'p') from pg_class where oid = to_regclass('public.listing_price_log')) then
        raise exception 'listing_price_log is not a table'
            using hint = 'Rename it, then migrate again.';
    end if;
end
$$;

-- The earlier services write timestamps without a zone and mean UTC. PostgreSQL reads them in the zone of the session.
do $$
begin
    execute format('alter database %I set timezone = %L', current_database(), 'UTC');
exception
    when insufficient_privilege then
        if current_setting('timezone') not in ('UTC', 'Etc/UTC') then
            raise exception 'the time zone of this database is %, and % may not change it',
                current_setting('timezone'), current_user
                using
                    errcode = 'insufficient_privilege',
                    hint = format(
                        'Let the owner of the database run this, then migrate again: alter database %I set timezone = ''UTC'';',
                        current_database()
                    );
        end if;
end
$$;

-- Renames an earlier price log of another shape; V4 imports its rows. Drops its triggers, which would write to the new log and
-- keep the type of the price as it is, and its foreign keys, which would keep listings from being deleted.
do $$
declare
    existing record;
begin
    if to_regclass('public.listing_price_log') is null then
        return;
    end if;
    for existing in
        select tgname as name
        from pg_trigger
        join pg_proc on pg_proc.oid = tgfoid
        where tgrelid = 'public.listing'::regclass
            and not tgisinternal
            and prosrc ~ '\mlisting_price_log\M'
    loop
        execute format('drop trigger %I on public.listing', existing.name);
    end loop;
    for existing in
        select conname as name
        from pg_constraint
        where conrelid = 'public.listing_price_log'::regclass
            and confrelid = 'public.listing'::regclass
    loop
        execute format('alter table public.listing_price_log drop constraint %I', existing.name);
    end loop;
    -- In PostgreSQL 18, not-null constraints have names, which the new table needs.
    for existing in
        select conname as name
        from pg_constraint
        where conrelid = 'public.listing_price_log'::regclass and contype = 'n'
    loop
        execute format(
            'alter table public.listing_price_log rename constraint %I to %I', existing.name, 'earlier_' || existing.name
        );
    end loop;
    -- Indexes and sequences have names that the new table needs.
    for existing in
        select class.oid::regclass as name, 'earlier_' || class.relname as new_name, class.relkind as kind
        from pg_class as class
        where class.relnamespace = 'public'::regnamespace
            and class.relkind in ('i', 'S')
            and class.oid in (
                select indexrelid from pg_index where indrelid = 'public.listing_price_log'::regclass
                union all
                select objid from pg_depend
                where classid = 'pg_class'::regclass and refobjid = 'public.listing_price_log'::regclass
            )
    loop
        execute format(
            'alter %s %s rename to %I',
            case existing.kind when 'S' then 'sequence' else 'index' end,
            existing.name,
            existing.new_name
        );
    end loop;
    alter table public.listing_price_log rename to earlier_listing_price_log;
end
$$;

-- The dates were UTC by convention.
set local timezone = 'UTC';

-- One statement, so that the table is read and written once.
alter table public.listing
    -- A float shows 15 reliable digits, more than the 12 of the largest amount. The cast returns the price that was meant:
    -- 0.1 + 0.2 is 0.30.
    alter column price type numeric(12,2) using round(price::numeric, 2),
    -- A missing date becomes the other date, or now.
    alter column created_date type timestamptz using coalesce(created_date::timestamptz, updated_date, now()),
    alter column created_date set default now(),
    alter column created_date set not null,
    alter column updated_date type timestamptz using coalesce(updated_date::timestamptz, created_date, now()),
    alter column updated_date set default now(),
    alter column updated_date set not null,
    add column owner text,
    -- Only rules that every older row keeps too. PostgreSQL checks a rule at each update of a row, and an older row may have
    -- an empty description. numeric(12,2) refuses infinity and amounts over 9999999999.99 itself, but not NaN.
    add constraint listing_price_is_not_negative check (price >= 0),
    add constraint listing_price_is_a_number check (price <> 'NaN'),
    add constraint listing_surface_area_is_not_negative check (surface_area_m2 >= 0),
    add constraint listing_surface_area_is_finite check (surface_area_m2 < 'infinity'),
    add constraint listing_rooms_count_is_not_negative check (rooms_count >= 0),
    add constraint listing_bedrooms_count_is_not_negative check (bedrooms_count >= 0),
    -- RFC 3339 has no infinite date and no year of five digits.
    add constraint listing_created_date_has_a_year_of_four_digits
        check (created_date >= '0001-01-01 00:00Z' and created_date < '10000-01-01 00:00Z'),
    add constraint listing_updated_date_has_a_year_of_four_digits
        check (updated_date >= '0001-01-01 00:00Z' and updated_date < '10000-01-01 00:00Z'),
    add constraint listing_building_type_is_known check (building_type in ('STUDIO', 'APARTMENT', 'HOUSE')),
    -- The log shows owners as changed_by.
    add constraint listing_owner_is_a_name check (owner <> '' and owner = btrim(owner) and owner !~ '[[:cntrl:]]');

-- The earlier services, and the new one, set updated_date. psql and imports usually do not.
create function public.set_listing_updated_date() returns trigger
    language plpgsql
    set search_path = pg_catalog, pg_temp
as $$
begin
    -- As text, because a json column of another service has no operator for the comparison of rows.
    if new::text <> old::text then
        new.updated_date := clock_timestamp();
    end if;
    return new;
end
$$;

create trigger listing_updated_date_set_on_update
    before update on public.listing
    for each row
    -- A writer that sets the date does not pay for the comparison of the rows.
    when (new.updated_date is not distinct from old.updated_date)
    execute function public.set_listing_updated_date();

-- Pages of a city or a postal code in the order of id. A hash has no length limit and does not depend on the collation.
--
-- No other index: there are few building types and countries, so a page of one is found soon in the order of id. A range of
-- prices has no order by id. And a change of the price now touches no index of this table.
create index if not exists listing_city_hash_id_idx on public.listing (hashtextextended(city, 0), id);
create index if not exists listing_postal_code_hash_id_idx on public.listing (hashtextextended(postal_code, 0), id);

comment on table public.listing is
    'Real-estate listings. Triggers log each price to listing_price_log.';
comment on column public.listing.building_type is
    'STUDIO, APARTMENT or HOUSE.';
comment on column public.listing.country is
    'ISO 3166-1 alpha-2. Rows of earlier services may hold other text.';
comment on column public.listing.price is
    'Current price in euros. The database logs every change.';
comment on column public.listing.contact_phone_number is
    'E.164, such as +33123456789. Null if there is none.';
comment on column public.listing.updated_date is
    'Time of the last change, unless the writer set another time.';
comment on column public.listing.owner is
    'Owner of the API keys that may change it. Null: only administrators'' keys may.';
comment on function public.set_listing_updated_date() is
    'Sets updated_date to now. Serves only the trigger on listing.';
comment on trigger listing_updated_date_set_on_update on public.listing is
    'Dates a change whose writer did not set updated_date.';
comment on index public.listing_city_hash_id_idx is
    'Pages of the listings of a city.';
comment on index public.listing_postal_code_hash_id_idx is
    'Pages of the listings of a postal code.';

set local timezone to default;
set local search_path to default;
