-- Logs every price of a listing, and every deletion of one. Only triggers write to these tables.
-- squawk-ignore-file constraint-missing-not-valid, adding-foreign-key-constraint, require-concurrent-index-creation
set local search_path = pg_catalog, pg_temp;
set local lock_timeout = '5s';
-- Fails, instead of missing the rows that a policy hides.
set local row_security = off;

create table public.listing_price_log (
    listing_id integer not null,
    -- Named, because the trigger takes the ids of deletions from it.
    id bigint not null generated always as identity (sequence name public.listing_price_log_id_seq),
    old_price numeric(12,2),
    new_price numeric(12,2) not null,
    changed_at timestamptz not null default clock_timestamp(),
    changed_by text not null,
    login_role text,
    xact_id xid8 not null default pg_current_xact_id(),
    -- A history is read from this index alone, in order. There is no index for a lookup by id without the listing.
    primary key (listing_id, id) include (new_price, changed_at),
    constraint listing_price_log_row_is_a_change check (old_price is distinct from new_price)
);

comment on table public.listing_price_log is
    'Every price of every listing. Append-only. Ordered by id within a listing.';
comment on column public.listing_price_log.listing_id is
    'The listing. Its id cannot change.';
comment on column public.listing_price_log.id is
    'Order within the listing, assigned under its row lock. Imported prices have lower ids.';
comment on column public.listing_price_log.old_price is
    'Price before, in euros: the new_price of the row before. Null for the first price.';
comment on column public.listing_price_log.new_price is
    'Price from changed_at on, in euros.';
comment on column public.listing_price_log.changed_at is
    'Time of the write, not of the start or end of its transaction.';
comment on column public.listing_price_log.changed_by is
    'The setting listing.actor if the writer set one, else the role that logged in.';
comment on column public.listing_price_log.login_role is
    'The role that logged in, if changed_by is another name. No writer can choose it.';
comment on column public.listing_price_log.xact_id is
    'The transaction that wrote the row.';

create table public.listing_deletion (
    listing_id integer not null,
    id bigint not null,
    last_price numeric(12,2) not null,
    deleted_at timestamptz not null default clock_timestamp(),
    deleted_by text not null,
    login_role text,
    xact_id xid8 not null default pg_current_xact_id(),
    primary key (listing_id, id)
);

comment on table public.listing_deletion is
    'Every deletion of a listing. Its prices are deleted with it. Append-only.';
comment on column public.listing_deletion.listing_id is
    'The listing.';
comment on column public.listing_deletion.id is
    'From the same sequence as listing_price_log.id, so it is greater than that of the last price.';
comment on column public.listing_deletion.last_price is
    'Price at the deletion, in euros.';
comment on column public.listing_deletion.deleted_at is
    'Time of the deletion.';
comment on column public.listing_deletion.deleted_by is
    'As listing_price_log.changed_by.';
comment on column public.listing_deletion.login_role is
    'As listing_price_log.login_role.';
comment on column public.listing_deletion.xact_id is
    'The transaction that deleted the listing.';

-- Prunes and imports, because they explain where a history begins, and replaced names, because they change it. Restarts of the
-- change feed, because they end the cursors of its clients.
create table public.listing_price_log_maintenance (
    id bigint generated always as identity primary key,
    task text not null,
    performed_at timestamptz not null default clock_timestamp(),
    performed_by text not null default session_user,
    row_count bigint not null,
    pruned_before timestamptz,
    detail text,
    constraint listing_price_log_maintenance_task_is_known check (
        task in ('prune', 'import', 'replace_actor', 'restart_change_feed')
    )
);

comment on table public.listing_price_log_maintenance is
    'What the maintenance functions did to the log. Append-only.';
comment on column public.listing_price_log_maintenance.id is
    'Number of the task.';
comment on column public.listing_price_log_maintenance.task is
    'prune, import, replace_actor or restart_change_feed.';
comment on column public.listing_price_log_maintenance.performed_at is
    'When the task ran.';
comment on column public.listing_price_log_maintenance.performed_by is
    'The role that had logged in.';
comment on column public.listing_price_log_maintenance.row_count is
    'Number of rows removed, added or changed.';
comment on column public.listing_price_log_maintenance.pruned_before is
    'For a prune: the time before which only the last price of each listing was kept.';
comment on column public.listing_price_log_maintenance.detail is
    'An import: its table. replace_actor: the new name. restart_change_feed: the new epoch.';

-- Runs with the rights of its owner, so writers need no rights on the log and cannot write to it in any other way. With the
-- fixed search_path, a writer cannot substitute a function, an operator or a temporary table.
create function public.log_listing_price() returns trigger
    language plpgsql
    security definer
    set search_path = pg_catalog, pg_temp
as $$
declare
    actor text := current_setting('listing.actor', true);
    login_role text;
begin
    if actor <> '' then
        -- Any writer can choose the actor. It must not break the output of psql, and it must not cost a price: clean, do not
        -- refuse. The ranges are control characters, line separators and marks that change the direction of text.
        actor := btrim(left(
            regexp_replace(
                left(actor, 1000),
                E'[\\u0001-\\u001f\\u007f-\\u009f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069]+',
                ' ',
                'g'
            ),
            200
        ));
        login_role := nullif(session_user, actor);
    end if;
    -- The last three are the labels of the migration, the import and repairs.
    if coalesce(actor, '') in ('', 'backfill', 'import', 'repair') then
        actor := session_user;
        login_role := null;
    end if;
    if tg_op = 'DELETE' then
        insert into public.listing_deletion (listing_id, id, last_price, deleted_by, login_role)
        values (old.id, nextval('public.listing_price_log_id_seq'), old.price, actor, login_role);
    else
        -- On insert, old is null.
        insert into public.listing_price_log (listing_id, old_price, new_price, changed_by, login_role)
        values (new.id, old.price, new.price, actor, login_role);
    end if;
    return null;
end
$$;

create trigger listing_price_logged_on_insert
    after insert on public.listing
    for each row
    execute function public.log_listing_price();

-- Not "update of price": PostgreSQL compares that with the statement, and misses a price that another trigger changed.
create trigger listing_price_logged_on_update
    after update on public.listing
    for each row
    when (old.price is distinct from new.price)
    execute function public.log_listing_price();

create trigger listing_deletion_logged_on_delete
    after delete on public.listing
    for each row
    execute function public.log_listing_price();

comment on function public.log_listing_price() is
    'Writes listing_price_log and listing_deletion. Serves only the triggers on listing.';
comment on trigger listing_price_logged_on_insert on public.listing is
    'Logs the first price of a listing.';
comment on trigger listing_price_logged_on_update on public.listing is
    'Logs a price that differs from the one before.';
comment on trigger listing_deletion_logged_on_delete on public.listing is
    'Logs the deletion of a listing.';

-- The triggers hold their locks until this transaction ends, so no price is missed between them and this backfill. A backfilled
-- price is dated by the last time at which it is known to have held, but never after the changes to come.
insert into public.listing_price_log (listing_id, new_price, changed_at, changed_by, login_role)
select id, price, least(updated_date, now()), 'backfill', session_user
from public.listing
order by id;

-- After the backfill, because one check of all rows is much cheaper than a check per row.
alter table public.listing_price_log
    add constraint listing_price_log_listing_id_fkey
    -- Without restrict, the id of a listing could change if the same statement gave its id to another listing.
    foreign key (listing_id) references public.listing (id) on update restrict on delete cascade;

-- For the changes of one transaction, or since one. Transaction numbers rise, so this index grows only at its end.
create index listing_price_log_xact_id_idx on public.listing_price_log (xact_id);
create index listing_deletion_xact_id_idx on public.listing_deletion (xact_id);

-- For each read of the change feed.
create index listing_price_log_maintenance_restart_idx on public.listing_price_log_maintenance (id)
    where task = 'restart_change_feed';

-- For the changes of a period. Few bytes, because the rows of the log lie in the order of their time.
create index listing_price_log_changed_at_idx on public.listing_price_log using brin (changed_at)
    with (pages_per_range = 32, autosummarize = on);

comment on index public.listing_price_log_xact_id_idx is
    'Price changes of a transaction.';
comment on index public.listing_deletion_xact_id_idx is
    'Deletions of a transaction.';
comment on index public.listing_price_log_maintenance_restart_idx is
    'The last restart of the change feed.';
comment on index public.listing_price_log_changed_at_idx is
    'Price changes of a period.';

create function public.refuse_listing_price_log_change() returns trigger
    language plpgsql
    set search_path = pg_catalog, pg_temp
as $$
begin
    -- A cascade from listing runs inside the trigger of its foreign key. The maintenance functions set this for themselves.
    if tg_op <> 'TRUNCATE'
        and (tg_op = 'DELETE' and pg_trigger_depth() > 1 or current_setting('listing.maintenance', true) = 'on')
    then
        return null;
    end if;
    raise exception '% is append-only: % is refused', tg_table_name, lower(tg_op)
        using
            errcode = 'insufficient_privilege',
            hint = 'To correct a price, update listing. To remove old prices, call prune_price_history().';
end
$$;

-- Statement triggers: a deletion of a listing pays once, not per price.
create trigger listing_price_log_append_only
    before update or delete or truncate on public.listing_price_log
    for each statement
    execute function public.refuse_listing_price_log_change();

create trigger listing_deletion_append_only
    before update or delete or truncate on public.listing_deletion
    for each statement
    execute function public.refuse_listing_price_log_change();

create trigger listing_price_log_maintenance_append_only
    before update or delete or truncate on public.listing_price_log_maintenance
    for each statement
    execute function public.refuse_listing_price_log_change();

comment on function public.refuse_listing_price_log_change() is
    'Refuses to rewrite history. Serves only the append_only triggers.';
comment on trigger listing_price_log_append_only on public.listing_price_log is
    'Refuses update, delete and truncate, also to the owner. Deleting a listing deletes its prices.';
comment on trigger listing_deletion_append_only on public.listing_deletion is
    'Refuses update, delete and truncate, also to the owner.';
comment on trigger listing_price_log_maintenance_append_only on public.listing_price_log_maintenance is
    'Refuses update, delete and truncate, also to the owner.';

set local search_path to default;
