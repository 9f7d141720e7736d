-- Serves the change feed of the API, GET /changes, which reads the log by transaction number and by snapshot.
set local search_path = pg_catalog, pg_temp;
set local lock_timeout = '5s';

create function public.restart_change_feed() returns bigint
    language plpgsql
    set search_path = pg_catalog, pg_temp
as $$
declare
    renumbered bigint;
    in_this_table bigint;
begin
    perform set_config('listing.maintenance', 'on', true);
    -- A row that is visible, but whose transaction is not, has its number from another server. This server will give out that
    -- number too. Then the feed would deliver the row late, and an undo would find it.
    update public.listing_price_log
    set xact_id = pg_current_xact_id()
    where xact_id >= pg_snapshot_xmin(pg_current_snapshot())
        and not pg_visible_in_snapshot(xact_id, pg_current_snapshot());
    get diagnostics renumbered = row_count;
    update public.listing_deletion
    set xact_id = pg_current_xact_id()
    where xact_id >= pg_snapshot_xmin(pg_current_snapshot())
        and not pg_visible_in_snapshot(xact_id, pg_current_snapshot());
    get diagnostics in_this_table = row_count;
    perform set_config('listing.maintenance', 'off', true);
    renumbered := renumbered + in_this_table;
    insert into public.listing_price_log_maintenance (task, row_count, detail)
    values ('restart_change_feed', renumbered, gen_random_uuid());
    return renumbered;
end
$$;

comment on function public.restart_change_feed() is
    'Ends all cursors of the change feed. Renumbers rows that come from the future. Returns how many.';

-- Runs with the rights of its owner, so the service needs no right on the names in that table.
create function public.change_feed_epoch() returns text
    language sql
    stable
    security definer
    set search_path = pg_catalog, pg_temp
begin atomic
    select detail
    from public.listing_price_log_maintenance
    where task = 'restart_change_feed'
    order by id desc
    limit 1;
end;

comment on function public.change_feed_epoch() is
    'Changes when restart_change_feed() runs. For the service.';

set local search_path to default;
