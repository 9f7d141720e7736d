-- Exact money, moments in time instead of wall clocks, and the rules that every row has to keep, whoever writes it.

-- Changing the type of a column needs the table to itself. Fail rather than queue behind a long transaction, with all
-- readers and writers waiting behind us. The table is read and written anew once, for all of this together:
-- squawk-ignore-file changing-column-type, adding-not-nullable-field, constraint-missing-not-valid
set local lock_timeout = '5s';

alter table public.listing
    -- A float shows 15 reliable digits, more than the 12 of the largest amount: the cast brings back the price that was
    -- meant (0.1 + 0.2 is 0.30).
    alter column price type numeric(12,2) using round(price::numeric, 2),
    -- The dates were UTC by convention. A missing one is the other one, or now.
    alter column created_date type timestamptz
        using coalesce(created_date at time zone 'UTC', updated_date at time zone 'UTC', now()),
    alter column created_date set default now(),
    alter column created_date set not null,
    alter column updated_date type timestamptz
        using coalesce(updated_date at time zone 'UTC', created_date at time zone 'UTC', now()),
    alter column updated_date set default now(),
    alter column updated_date set not null,
    -- Only rules that older rows keep as well: a check also looks at the next update of a row written long ago, and those
    -- may hold an empty description or a country that is no code. numeric(12,2) itself refuses infinity and amounts over
    -- 9999999999.99, but takes NaN, which counts as greater than every number.
    add constraint listing_price_is_not_negative check (price >= 0),
    add constraint listing_price_is_a_number check (price <> 'NaN'),
    add constraint listing_surface_area_is_not_negative check (surface_area_m2 >= 0),
    add constraint listing_surface_area_is_finite check (surface_area_m2 < 'infinity'),
    add constraint listing_rooms_count_is_not_negative check (rooms_count >= 0),
    add constraint listing_bedrooms_count_is_not_negative check (bedrooms_count >= 0),
    -- Infinity, which a timestamp can be as well, is no date that a client could read.
    add constraint listing_created_date_has_a_year_of_four_digits
        check (created_date >= '0001-01-01 00:00Z' and created_date < '10000-01-01 00:00Z'),
    add constraint listing_updated_date_has_a_year_of_four_digits
        check (updated_date >= '0001-01-01 00:00Z' and updated_date < '10000-01-01 00:00Z'),
    add constraint listing_building_type_is_known check (building_type in ('STUDIO', 'APARTMENT', 'HOUSE'));

-- Older services go on writing timestamps without a zone and mean UTC. PostgreSQL reads those in the zone of the session.
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
                        'Let its owner run this, then migrate again: alter database %I set timezone = ''UTC'';',
                        current_database()
                    );
        end if;
end
$$;

comment on table public.listing is
    'Real-estate listings. Each price they had is in listing_price_log, written by triggers on this table.';
comment on column public.listing.price is
    'Present price in euros. Every change of it is logged by the database itself.';
comment on column public.listing.contact_phone_number is
    'E.164, such as +33123456789. Null where there is none.';
comment on column public.listing.updated_date is
    'When a client last wrote the listing, as that client said. Defaults to the moment of the insert.';
comment on column public.listing.country is
    'ISO 3166-1 alpha-2 in rows written since the rule was made. Older rows may hold anything.';
comment on column public.listing.building_type is
    'STUDIO, APARTMENT or HOUSE.';
