-- Answers the questions of a DBA. Each view and function runs with the rights of its caller.
set local search_path = pg_catalog, pg_temp;
set local lock_timeout = '5s';

create view public.listing_price_change with (security_invoker = true) as
select
    listing_id,
    id,
    old_price,
    new_price,
    new_price - old_price as delta,
    round(100 * (new_price - old_price) / nullif(old_price, 0), 2) as percent,
    changed_at as valid_from,
    lead(changed_at) over (partition by listing_id order by id) as valid_to,
    changed_by,
    login_role,
    xact_id
from public.listing_price_log;

comment on view public.listing_price_change is
    'The log with the amount of each change and the period of each price.';
comment on column public.listing_price_change.delta is
    'new_price - old_price in euros. Null for the first price.';
comment on column public.listing_price_change.percent is
    'Change in percent of old_price. Null for the first price and after a price of 0.';
comment on column public.listing_price_change.valid_from is
    'From this time on the listing cost new_price.';
comment on column public.listing_price_change.valid_to is
    'Until this time, exclusive. Null for the current price.';
comment on column public.listing_price_change.changed_by is
    'As listing_price_log.changed_by.';
comment on column public.listing_price_change.login_role is
    'As listing_price_log.login_role.';
comment on column public.listing_price_change.xact_id is
    'As listing_price_log.xact_id.';

create function public.listing_price_at(listing_id integer, at timestamptz) returns numeric
    language sql
    stable
    parallel safe
return (
    select log.new_price
    from public.listing_price_log as log
    where log.listing_id = listing_price_at.listing_id
        and log.changed_at <= listing_price_at.at
    order by log.id desc
    limit 1
);

comment on function public.listing_price_at(integer, timestamptz) is
    'What a listing cost at a time. Null before its first price.';

-- Cost of the next three: in proportion to the prices of the period, by the index on changed_at.
create function public.listing_price_difference(since timestamptz, until timestamptz)
    returns table (listing_id integer, old_price numeric, new_price numeric, delta numeric, percent numeric, changes bigint)
    language sql
    stable
    parallel safe
begin atomic
    select
        change.listing_id,
        change.first_price,
        change.last_price,
        change.last_price - change.first_price,
        round(100 * (change.last_price - change.first_price) / nullif(change.first_price, 0), 2),
        change.changes
    from (
        select
            log.listing_id,
            (array_agg(log.old_price order by log.id))[1] as first_price,
            (array_agg(log.new_price order by log.id desc))[1] as last_price,
            count(*) as changes
        from public.listing_price_log as log
        where log.changed_at > listing_price_difference.since
            and log.changed_at <= listing_price_difference.until
        group by log.listing_id
    ) as change
    where change.first_price is distinct from change.last_price;
end;

comment on function public.listing_price_difference(timestamptz, timestamptz) is
    'The listings whose price differs between two times. New listings have no old_price.';

create function public.listing_price_trend(since timestamptz default '-infinity', until timestamptz default 'infinity')
    returns table (
        month date,
        country varchar,
        city varchar,
        building_type varchar,
        changes bigint,
        cuts bigint,
        raises bigint,
        median_percent numeric
    )
    language sql
    stable
    parallel safe
begin atomic
    select
        date_trunc('month', log.changed_at at time zone 'UTC')::date,
        listing.country,
        listing.city,
        listing.building_type,
        count(*),
        count(*) filter (where log.new_price < log.old_price),
        count(*) filter (where log.new_price > log.old_price),
        round(
            percentile_cont(0.5) within group (
                order by (100 * (log.new_price - log.old_price) / nullif(log.old_price, 0))::double precision
            )::numeric,
            2
        )
    from public.listing_price_log as log
    join public.listing on listing.id = log.listing_id
    where log.old_price is not null
        and log.changed_at >= listing_price_trend.since
        and log.changed_at < listing_price_trend.until
    group by 1, 2, 3, 4
    order by 1, 2, 3, 4;
end;

comment on function public.listing_price_trend(timestamptz, timestamptz) is
    'Price changes of a period by month (UTC), place and building type. First prices do not count.';

create function public.listing_price_activity(since timestamptz default '-infinity', until timestamptz default 'infinity')
    returns table (
        day date,
        changed_by text,
        login_role text,
        listings bigint,
        first_prices bigint,
        cuts bigint,
        raises bigint,
        delta numeric
    )
    language sql
    stable
    parallel safe
begin atomic
    select
        (log.changed_at at time zone 'UTC')::date,
        log.changed_by,
        coalesce(log.login_role, log.changed_by),
        count(distinct log.listing_id),
        count(*) filter (where log.old_price is null),
        count(*) filter (where log.new_price < log.old_price),
        count(*) filter (where log.new_price > log.old_price),
        sum(log.new_price - log.old_price)
    from public.listing_price_log as log
    where log.changed_at >= listing_price_activity.since
        and log.changed_at < listing_price_activity.until
    group by 1, 2, 3
    order by 1, 2, 3;
end;

comment on function public.listing_price_activity(timestamptz, timestamptz) is
    'Who changed how many prices, and by how much in sum: by day (UTC), changed_by and login_role.';

set local search_path to default;
