-- Maintains the log: remove old prices, import older ones, undo a mistake, replace a name. All functions are for the owner of
-- the tables. Those that change the log record it in listing_price_log_maintenance.
--
-- These set listing.maintenance in their bodies: only a superuser may attach a setting of that kind to a function.
set local search_path = pg_catalog, pg_temp;
set local lock_timeout = '5s';

create function public.prunable_prices(before timestamptz) returns setof public.listing_price_log
    language sql
    stable
begin atomic
    -- The last price before that time stays: it is the price at that time.
    select log.*
    from public.listing_price_log as log
    join (
        select listing_id, max(id) as id
        from public.listing_price_log
        where changed_at < prunable_prices.before
        group by listing_id
    ) as kept on kept.listing_id = log.listing_id
    where log.id < kept.id;
end;

comment on function public.prunable_prices(timestamptz) is
    'The prices that prune_price_history() would remove.';

create function public.prune_price_history(before timestamptz) returns bigint
    language plpgsql
    set search_path = pg_catalog, pg_temp
as $$
declare
    removed bigint;
begin
    perform set_config('listing.maintenance', 'on', true);
    delete from public.listing_price_log as log
    using public.prunable_prices(before) as old
    where log.listing_id = old.listing_id and log.id = old.id;
    get diagnostics removed = row_count;
    perform set_config('listing.maintenance', 'off', true);
    if removed > 0 then
        insert into public.listing_price_log_maintenance (task, row_count, pruned_before)
        values ('prune', removed, least(before, clock_timestamp()));
    end if;
    return removed;
end
$$;

comment on function public.prune_price_history(timestamptz) is
    'Removes the prices before a time, except the last of each listing. Returns how many.';

create function public.import_price_history(source regclass, listing_id_column name, price_column name, moment_column name)
    returns table (outcome text, row_count bigint)
    language plpgsql
    set search_path = pg_catalog, pg_temp
    -- A time without a zone means UTC.
    set timezone = 'UTC'
    -- A policy would hide rows, and run code of the owner of the table.
    set row_security = off
as $$
declare
    imported bigint;
begin
    if not exists (
        select
        from pg_attribute
        where attrelid = source
            and attname = moment_column
            and atttypid in ('date'::regtype, 'timestamp'::regtype, 'timestamptz'::regtype)
    ) then
        raise exception '% has no column % of type date, timestamp or timestamptz', source, moment_column
            using errcode = 'undefined_column';
    end if;
    -- A view, or a cast from a type of another role, would run code of that role with the rights of the caller.
    if not exists (select from pg_class where oid = source and relkind in ('r', 'p'))
        or exists (
            select
            from pg_attribute
            join pg_type on pg_type.oid = atttypid
            where attrelid = source
                and attname in (listing_id_column, price_column)
                and typnamespace <> 'pg_catalog'::regnamespace
        )
    then
        raise exception '% is not a table whose columns have built-in types', source
            using
                errcode = 'wrong_object_type',
                hint = 'Create a table with the columns listing_id integer, price numeric and moment timestamptz, copy the '
                    'prices to it, and import that table.';
    end if;
    -- Until the end of this transaction, no writer adds a price to a history that is being extended, and no prune removes one.
    lock table public.listing, public.listing_price_log in share row exclusive mode;

    drop table if exists pg_temp.source_price, pg_temp.candidate_price, pg_temp.added_price;
    -- Rows with the same time are in the order in which the table returns them.
    execute format(
        $sql$
            create temporary table source_price as
            select
                %2$I::bigint as listing_id,
                round(%3$I::numeric, 2) as price,
                %4$I::timestamptz as moment,
                row_number() over () as position
            from %1$s
        $sql$,
        source, listing_id_column, price_column, moment_column
    );

    create temporary table candidate_price as
    select
        source_price.*,
        first.id as first_id,
        first.new_price as first_price,
        coalesce(first.changed_by = 'backfill', false) as is_backfilled,
        case
            when listing.id is null then 'unknown listing'
            when source_price.price is null or source_price.price not between 0 and 9999999999.99 then 'invalid price'
            when source_price.moment is null or source_price.moment not between '0001-01-01' and now() then 'invalid time'
            when first.old_price is not null then 'the history of the listing was pruned'
            -- A backfilled price stands for all that was before the log, so the next price counts.
            when source_price.moment >= case when first.changed_by = 'backfill' then second.changed_at else first.changed_at end
                then 'not before the first logged price'
        end as outcome
    from source_price
    left join public.listing on listing.id = source_price.listing_id
    left join lateral (
        select log.id, log.old_price, log.new_price, log.changed_at, log.changed_by
        from public.listing_price_log as log
        where log.listing_id = listing.id
        order by log.id
        limit 1
    ) as first on true
    left join lateral (
        select log.changed_at
        from public.listing_price_log as log
        where log.listing_id = listing.id and log.id > first.id
        order by log.id
        limit 1
    ) as second on true;

    create temporary table added_price as
    with change as (
        select *, lag(price) over (partition by listing_id order by moment, position) as old_price
        from candidate_price
        where candidate_price.outcome is null
    ),
    numbered as (
        select *, row_number() over (partition by listing_id order by moment desc, position desc) as distance
        from change
        where price is distinct from old_price
    )
    select *
    from numbered
    -- The log has the last price already, unless it was backfilled.
    where is_backfilled or distance > 1 or price is distinct from first_price;

    insert into public.listing_price_log (listing_id, id, old_price, new_price, changed_at, changed_by, login_role)
    overriding system value
    select listing_id, coalesce(first_id, 0) - distance, old_price, price, moment, 'import', session_user
    from added_price;
    get diagnostics imported = row_count;

    perform set_config('listing.maintenance', 'on', true);
    -- The imported price is dated better than the backfilled one.
    delete from public.listing_price_log as log
    using added_price as added
    where log.listing_id = added.listing_id
        and log.id = added.first_id
        and added.distance = 1
        and added.is_backfilled
        and added.price = added.first_price;
    update public.listing_price_log as log
    set old_price = last.price, changed_at = greatest(log.changed_at, last.moment)
    from (select distinct on (listing_id) * from added_price order by listing_id, distance) as last
    where log.listing_id = last.listing_id and log.id = last.first_id;
    perform set_config('listing.maintenance', 'off', true);

    if imported > 0 then
        insert into public.listing_price_log_maintenance (task, row_count, detail)
        values ('import', imported, source::text);
    end if;
    return query
        select 'imported', imported
        union all
        select candidate_price.outcome, count(*)
        from candidate_price
        where candidate_price.outcome is not null
        group by 1
        union all
        select 'same price as before or after', count(*) - imported
        from candidate_price
        where candidate_price.outcome is null
        having count(*) > imported;
    drop table source_price, candidate_price, added_price;
end
$$;

comment on function public.import_price_history(regclass, name, name, name) is
    'Adds the prices in another table to the log, before the first logged ones. Can be repeated.';

create function public.undo_price_changes(xact_id xid8)
    returns table (listing_id integer, price numeric, restored_price numeric, outcome text)
    language plpgsql
    set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
    -- After these row locks, the next statement sees every price that other transactions committed.
    perform
    from public.listing
    where id in (select log.listing_id from public.listing_price_log as log where log.xact_id = undo_price_changes.xact_id)
    order by id
    for update;

    return query
        with change as (
            select
                log.listing_id,
                (array_agg(log.old_price order by log.id))[1] as old_price,
                (array_agg(log.new_price order by log.id desc))[1] as new_price,
                min(log.id) as first_id,
                max(log.id) as last_id
            from public.listing_price_log as log
            where log.xact_id = undo_price_changes.xact_id
            group by log.listing_id
        ),
        judged as (
            select
                change.listing_id,
                listing.price,
                change.old_price,
                case
                    -- A price that was not logged counts too.
                    when change.new_price <> listing.price or exists (
                        select
                        from public.listing_price_log as later
                        where later.listing_id = change.listing_id and later.id > change.last_id
                    ) then 'changed since'
                    when change.old_price is null then 'first price'
                    -- The transaction may have changed the price before, in a row that is gone.
                    when not exists (
                        select
                        from public.listing_price_log as earlier
                        where earlier.listing_id = change.listing_id and earlier.id < change.first_id
                    ) then 'pruned'
                    when change.old_price = listing.price then 'same price'
                    else 'restored'
                end as outcome
            from change
            join public.listing on listing.id = change.listing_id
        ),
        restored as (
            update public.listing
            set price = judged.old_price
            from judged
            where listing.id = judged.listing_id and judged.outcome = 'restored'
        )
        -- Without a join to restored: the planner would expect one row in each, and its nested loop takes hours for many rows.
        select judged.listing_id, judged.price, case judged.outcome when 'restored' then judged.old_price end, judged.outcome
        from judged
        union all
        select deletion.listing_id, deletion.last_price, null, 'deleted'
        from public.listing_deletion as deletion
        where deletion.xact_id = undo_price_changes.xact_id
        order by 1;
end
$$;

comment on function public.undo_price_changes(xid8) is
    'Restores the prices that a transaction changed, unless they changed since. The log shows it.';

create function public.replace_actor(old_name text, new_name text) returns bigint
    language plpgsql
    set search_path = pg_catalog, pg_temp
as $$
declare
    replaced bigint;
    in_this_table bigint;
begin
    if new_name is null or new_name !~ '^[^[:cntrl:]]{1,200}$' then
        raise exception 'the new name must have 1 to 200 characters, no control characters'
            using errcode = 'invalid_parameter_value';
    end if;
    perform set_config('listing.maintenance', 'on', true);
    update public.listing_price_log
    set
        changed_by = case changed_by when old_name then new_name else changed_by end,
        login_role = case login_role when old_name then new_name else login_role end
    where changed_by = old_name or login_role = old_name;
    get diagnostics replaced = row_count;
    update public.listing_deletion
    set
        deleted_by = case deleted_by when old_name then new_name else deleted_by end,
        login_role = case login_role when old_name then new_name else login_role end
    where deleted_by = old_name or login_role = old_name;
    get diagnostics in_this_table = row_count;
    replaced := replaced + in_this_table;
    update public.listing_price_log_maintenance
    set
        performed_by = case performed_by when old_name then new_name else performed_by end,
        detail = case when task = 'replace_actor' and detail = old_name then new_name else detail end
    where performed_by = old_name or task = 'replace_actor' and detail = old_name;
    get diagnostics in_this_table = row_count;
    perform set_config('listing.maintenance', 'off', true);
    replaced := replaced + in_this_table;
    -- Not the old name: the purpose is to forget it.
    insert into public.listing_price_log_maintenance (task, row_count, detail)
    values ('replace_actor', replaced, new_name);
    return replaced;
end
$$;

comment on function public.replace_actor(text, text) is
    'Replaces a name in the log, for example to erase a person. Returns the number of rows.';

-- V1 has renamed an earlier price log. Its prices become the beginning of the history.
do $$
declare
    price_column name;
    moment_column name;
begin
    if to_regclass('public.earlier_listing_price_log') is null then
        return;
    end if;
    select name into price_column
    from unnest(array['price_change', 'new_price', 'price', 'price_eur', 'latest_price_eur']) with ordinality as known (name, rank)
    join pg_attribute on attrelid = 'public.earlier_listing_price_log'::regclass and attname = name
    order by rank
    limit 1;
    select name into moment_column
    from unnest(array['updated_time', 'changed_at', 'created_at', 'created_date', 'updated_at', 'updated_date'])
        with ordinality as known (name, rank)
    join pg_attribute on attrelid = 'public.earlier_listing_price_log'::regclass and attname = name
    order by rank
    limit 1;
    if price_column is null
        or moment_column is null
        or not exists (
            select from pg_attribute where attrelid = 'public.earlier_listing_price_log'::regclass and attname = 'listing_id'
        )
    then
        raise exception 'the columns of the existing table listing_price_log are unknown'
            using hint = 'Rename the table, migrate again, then call import_price_history().';
    end if;
    perform public.import_price_history('public.earlier_listing_price_log', 'listing_id', price_column, moment_column);
    comment on table public.earlier_listing_price_log is
        'The price log before the migration. Its prices are in listing_price_log now. May be dropped.';
end
$$;

set local search_path to default;
