-- The price history: every price that a listing has had, written by the database and by nothing else.

-- Creating a trigger waits for the writers under way. Fail rather than queue behind a long one. New writers wait until the
-- log is filled, so nothing is gained by building it in steps:
-- squawk-ignore-file constraint-missing-not-valid, adding-foreign-key-constraint, require-concurrent-index-creation
set local lock_timeout = '5s';

create table public.listing_price_log (
    id bigint generated always as identity primary key,
    listing_id integer not null,
    old_price numeric(12,2),
    new_price numeric(12,2) not null,
    changed_at timestamptz not null default clock_timestamp(),
    changed_by text not null,
    xact_id xid8 not null default pg_current_xact_id(),
    constraint listing_price_log_row_is_a_change check (old_price is distinct from new_price)
);

comment on table public.listing_price_log is
    'Every price of every listing, oldest first by id. Written by the triggers on listing, append-only, deleted with its '
    'listing. Within a listing each old_price is the new_price of the row before; listing_price_log_problem shows where not.';
comment on column public.listing_price_log.id is
    'Order within a listing: given out under the lock of the listing''s row. Order by this, never by a time.';
comment on column public.listing_price_log.listing_id is
    'The listing. Its id cannot change while it has a history.';
comment on column public.listing_price_log.old_price is
    'Price before, in euros. Null in the first row of a listing.';
comment on column public.listing_price_log.new_price is
    'Price from changed_at on, in euros.';
comment on column public.listing_price_log.changed_at is
    'When the row was written, not when its transaction began or ended. In backfilled rows the updated_date of the listing.';
comment on column public.listing_price_log.changed_by is
    'The setting listing.actor where the writer''s session or transaction had one, else the role that had logged in. '
    '''backfill'' in the rows that stand for prices older than the log.';
comment on column public.listing_price_log.xact_id is
    'The transaction that wrote the row. Those below pg_snapshot_xmin(pg_current_snapshot()) have ended, so a consumer that '
    'remembers how far it came by this misses no row. Within a listing the order is still that of id.';

-- Runs as its owner, so that writers need no right on the log and cannot write it in any other way. With the fixed
-- search_path and full names a writer cannot put a function, an operator or a temporary table of its own in between.
create function public.log_listing_price() returns trigger
    language plpgsql
    security definer
    set search_path = pg_catalog, pg_temp
as $$
begin
    -- On insert, old is null as a whole.
    insert into public.listing_price_log (listing_id, old_price, new_price, changed_by)
    values (new.id, old.price, new.price, coalesce(nullif(current_setting('listing.actor', true), ''), session_user));
    return null;
end
$$;

comment on function public.log_listing_price() is
    'Appends the new price of a listing to listing_price_log. Serves the two triggers on listing and nothing else.';
revoke all on function public.log_listing_price() from public;

create trigger listing_price_logged_on_insert
    after insert on public.listing
    for each row
    execute function public.log_listing_price();

-- Not "update of price": that looks at the statement, and misses a price that another trigger changed.
create trigger listing_price_logged_on_update
    after update on public.listing
    for each row
    when (old.price is distinct from new.price)
    execute function public.log_listing_price();

comment on trigger listing_price_logged_on_insert on public.listing is
    'Opens the price history of a new listing.';
comment on trigger listing_price_logged_on_update on public.listing is
    'Appends to the price history when the price is another one than before, whoever changed it. A trigger of yours that '
    'changes the price has to be a BEFORE trigger: an AFTER trigger would be logged ahead of what it followed.';

-- The triggers hold their lock until this transaction ends, so no price slips between them and this backfill. It is dated by
-- the last moment at which the price is known to have held, and never ahead of the changes to come.
insert into public.listing_price_log (listing_id, new_price, changed_at, changed_by)
select id, price, least(updated_date, now()), 'backfill'
from public.listing
order by id;

-- After the backfill: checking all rows at once is much cheaper than one by one.
alter table public.listing_price_log
    add constraint listing_price_log_listing_id_fkey
    -- Restrict, because without it an id could change where the same statement puts another listing in its place.
    foreign key (listing_id) references public.listing (id) on update restrict on delete cascade;

create index listing_price_log_listing_id_id_new_price_changed_at_idx
    on public.listing_price_log (listing_id, id) include (new_price, changed_at);

comment on index public.listing_price_log_listing_id_id_new_price_changed_at_idx is
    'Holds all that a price history shows, so that reading one does not touch the table.';

create function public.refuse_listing_price_log_change() returns trigger
    language plpgsql
    set search_path = pg_catalog, pg_temp
as $$
begin
    raise exception 'listing_price_log is append-only: % is refused', lower(tg_op)
        using
            errcode = 'insufficient_privilege',
            hint = 'A wrong price is corrected by updating listing. Old rows are removed by listing_price_log_prune().';
end
$$;

comment on function public.refuse_listing_price_log_change() is
    'Refuses what its trigger on listing_price_log is fired for.';
revoke all on function public.refuse_listing_price_log_change() from public;

create trigger listing_price_log_refused_on_update_and_truncate
    before update or truncate on public.listing_price_log
    for each statement
    execute function public.refuse_listing_price_log_change();

comment on trigger listing_price_log_refused_on_update_and_truncate on public.listing_price_log is
    'Keeps anybody, the owner too, from rewriting history.';
