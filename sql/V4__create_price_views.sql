-- What a DBA asks of the log, each answer under a name of its own. The views look with the rights of whoever reads them.

set local lock_timeout = '5s';

create view public.listing_price_change with (security_invoker = true) as
select
    id,
    listing_id,
    old_price,
    new_price,
    new_price - old_price as delta,
    round(100 * (new_price - old_price) / nullif(old_price, 0), 2) as percent,
    changed_at as valid_from,
    lead(changed_at) over (partition by listing_id order by id) as valid_to,
    changed_by,
    xact_id
from public.listing_price_log;

comment on view public.listing_price_change is
    'The log with what each change amounts to and how long its price held. Filter by listing_id to read one history.';
comment on column public.listing_price_change.delta is
    'new_price - old_price in euros. Null in the first row of a listing.';
comment on column public.listing_price_change.percent is
    'Change in percent of old_price. Null in the first row of a listing and after a price of 0.';
comment on column public.listing_price_change.valid_from is
    'From this moment on the listing cost new_price.';
comment on column public.listing_price_change.valid_to is
    'Until this moment, exclusive. Null for the present price.';

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
    'What a listing cost at a moment. Null before its first logged price and for a listing that is not there.';

create view public.listing_price_trend with (security_invoker = true) as
select
    date_trunc('month', log.changed_at at time zone 'UTC')::date as month,
    listing.country,
    listing.city,
    listing.building_type,
    count(*) as changes,
    count(*) filter (where log.new_price < log.old_price) as cuts,
    count(*) filter (where log.new_price > log.old_price) as raises,
    round(
        percentile_cont(0.5) within group (
            order by (100 * (log.new_price - log.old_price) / nullif(log.old_price, 0))::double precision
        )::numeric,
        2
    ) as median_percent
from public.listing_price_log as log
join public.listing on listing.id = log.listing_id
where log.old_price is not null
group by 1, 2, 3, 4;

comment on view public.listing_price_trend is
    'Price changes by month (UTC), country, city and building type. First prices are no changes; deleted listings and pruned '
    'rows no longer count.';
comment on column public.listing_price_trend.median_percent is
    'Median change in percent of the old price. Null where every old price was 0.';

create view public.listing_price_log_problem with (security_invoker = true) as
with step as (
    select
        id,
        listing_id,
        old_price,
        new_price,
        lag(id) over history as previous_id,
        lag(new_price) over history as previous_price,
        lead(id) over history is null as is_last
    from public.listing_price_log
    window history as (partition by listing_id order by id)
),
expected_trigger (name, table_name, definition) as (
    values
        (
            'listing_price_logged_on_insert',
            'listing',
            'CREATE TRIGGER listing_price_logged_on_insert AFTER INSERT ON public.listing '
            'FOR EACH ROW EXECUTE FUNCTION public.log_listing_price()'
        ),
        (
            'listing_price_logged_on_update',
            'listing',
            'CREATE TRIGGER listing_price_logged_on_update AFTER UPDATE ON public.listing '
            'FOR EACH ROW WHEN ((old.price IS DISTINCT FROM new.price)) EXECUTE FUNCTION public.log_listing_price()'
        ),
        (
            'listing_price_log_refused_on_update_and_truncate',
            'listing_price_log',
            'CREATE TRIGGER listing_price_log_refused_on_update_and_truncate '
            'BEFORE UPDATE OR TRUNCATE ON public.listing_price_log '
            'FOR EACH STATEMENT EXECUTE FUNCTION public.refuse_listing_price_log_change()'
        )
)
select
    'listing without a log' as problem,
    listing.id as listing_id,
    null::bigint as log_id,
    format('Listing %s has no price in the log: it was inserted while the trigger did not fire.', listing.id) as explanation,
    format(
        'insert into public.listing_price_log (listing_id, new_price, changed_by) '
        'select id, price, ''repair'' from public.listing where id = %1$s '
        'and not exists (select from public.listing_price_log where listing_id = %1$s) for update;',
        listing.id
    ) as mend
from public.listing
where not exists (select from public.listing_price_log as log where log.listing_id = listing.id)
union all
select
    'log without a listing',
    step.listing_id,
    step.id,
    format(
        'Listing %s is gone but its history is not: it was deleted while the foreign key was not enforced.',
        step.listing_id
    ),
    format('delete from public.listing_price_log where listing_id = %s;', step.listing_id)
from step
where step.is_last
    and not exists (select from public.listing where listing.id = step.listing_id)
union all
select
    'last price differs',
    listing.id,
    step.id,
    format(
        'Listing %s costs %s but its last logged price is %s: it was changed while the trigger did not fire.',
        listing.id,
        listing.price,
        step.new_price
    ),
    -- Inserts nothing where the price has changed once more in the meantime: look again then.
    format(
        'insert into public.listing_price_log (listing_id, old_price, new_price, changed_by) '
        'select id, %2$s, price, ''repair'' from public.listing where id = %1$s and price = %3$s for update;',
        listing.id,
        step.new_price,
        listing.price
    )
from step
join public.listing on listing.id = step.listing_id
where step.is_last
    and step.new_price is distinct from listing.price
union all
select
    'broken chain',
    step.listing_id,
    step.id,
    format(
        'Row %s of listing %s says that the price before was %s, but row %s before it says %s: what stood between was removed, '
        'or one of the two altered. Bring it back from a backup, or close the gap.',
        step.id,
        step.listing_id,
        coalesce(step.old_price::text, 'nothing'),
        step.previous_id,
        step.previous_price
    ),
    case
        when gap.id is not null and step.old_price is not null then format(
            'insert into public.listing_price_log (id, listing_id, old_price, new_price, changed_at, changed_by) '
            'overriding system value select %s, listing_id, new_price, %s, changed_at, ''repair'' '
            'from public.listing_price_log where id = %s;',
            gap.id,
            step.old_price,
            step.previous_id
        )
        -- The row changes nothing against the one before it.
        when step.previous_price = step.new_price then format(
            'delete from public.listing_price_log where id = %s;',
            step.id
        )
        else format(
            'alter table public.listing_price_log disable trigger user; '
            'update public.listing_price_log set old_price = %s where id = %s; '
            'alter table public.listing_price_log enable trigger user;',
            step.previous_price,
            step.id
        )
    end
from step
left join lateral (
    -- A row that was removed has left its id free.
    select log.id + 1 as id
    from public.listing_price_log as log
    where log.id >= step.previous_id
        and log.id < step.id
        and not exists (select from public.listing_price_log as next where next.id = log.id + 1)
    order by log.id
    limit 1
) as gap on true
where step.previous_id is not null
    and step.old_price is distinct from step.previous_price
union all
select
    'trigger missing or altered',
    null,
    null,
    format(
        'Trigger %s on %s is not as it was made, so %s.',
        expected_trigger.name,
        expected_trigger.table_name,
        case expected_trigger.table_name
            when 'listing' then 'prices go by unlogged'
            else 'the log can be rewritten'
        end
    ),
    format(
        'drop trigger if exists %I on public.%I; %s;',
        expected_trigger.name,
        expected_trigger.table_name,
        expected_trigger.definition
    )
from expected_trigger
where not exists (
    select
    from pg_catalog.pg_trigger
    where tgname = expected_trigger.name
        and tgrelid = format('public.%I', expected_trigger.table_name)::regclass
        -- The function is shown with its schema or without, depending on the reader's search_path.
        and replace(pg_get_triggerdef(oid), 'FUNCTION public.', 'FUNCTION ')
            = replace(expected_trigger.definition, 'FUNCTION public.', 'FUNCTION ')
)
union all
select
    'trigger not enabled',
    null,
    null,
    format('Trigger %s on %s does not fire for every writer.', expected_trigger.name, expected_trigger.table_name),
    format('alter table public.%I enable trigger %I;', expected_trigger.table_name, expected_trigger.name)
from expected_trigger
join pg_catalog.pg_trigger
    on tgname = expected_trigger.name
    and tgrelid = format('public.%I', expected_trigger.table_name)::regclass
-- O fires for every writer but a replication worker, A for that one too; D and R let writers through.
where tgenabled not in ('O', 'A')
union all
select
    'foreign key missing or altered',
    null,
    null,
    'No foreign key lets a history go with its listing and keeps the id of a listing that has one.',
    'alter table public.listing_price_log drop constraint if exists listing_price_log_listing_id_fkey, '
    'add constraint listing_price_log_listing_id_fkey foreign key (listing_id) references public.listing (id) '
    'on update restrict on delete cascade;'
where not exists (
    select
    from pg_catalog.pg_constraint
    where conname = 'listing_price_log_listing_id_fkey'
        and conrelid = 'public.listing_price_log'::regclass
        and confrelid = 'public.listing'::regclass
        and confupdtype = 'r'
        and confdeltype = 'c'
        and convalidated
)
union all
select distinct
    'foreign key not enforced',
    null::integer,
    null::bigint,
    format('The foreign key of the log is not enforced on %s: its triggers there are disabled.', tgrelid::regclass),
    format('alter table %s enable trigger all;', tgrelid::regclass)
from pg_catalog.pg_trigger
join pg_catalog.pg_constraint on pg_constraint.oid = tgconstraint
where conname = 'listing_price_log_listing_id_fkey'
    and conrelid = 'public.listing_price_log'::regclass
    and tgenabled not in ('O', 'A');

comment on view public.listing_price_log_problem is
    'Empty when the log is whole, otherwise a row for each problem. Reads the whole log. Mend one, then look again: the rows '
    'do not know of each other.';
comment on column public.listing_price_log_problem.problem is
    'The kind of problem, in the same words each time.';
comment on column public.listing_price_log_problem.explanation is
    'What is wrong and how it comes about.';
comment on column public.listing_price_log_problem.mend is
    'The statement that mends it, for the owner of the log; where triggers of a foreign key are to be enabled, for a superuser.';

create function public.listing_price_log_prune(before timestamptz) returns bigint
    language sql
begin atomic
    -- The last row before the cut says what the listing cost at the cut: it stays.
    with kept as (
        select listing_id, max(id) as id
        from public.listing_price_log
        where changed_at < listing_price_log_prune.before
        group by listing_id
    ),
    pruned as (
        delete from public.listing_price_log as log
        using kept
        where log.listing_id = kept.listing_id
            and log.id < kept.id
        returning log.id
    )
    select count(*) from pruned;
end;

comment on function public.listing_price_log_prune(timestamptz) is
    'Removes what is older than a moment, all but the last price of each listing before it, and returns how many rows. '
    'listing_price_at answers as before for that moment and every later one. For the owner of the log.';
revoke all on function public.listing_price_log_prune(timestamptz) from public;
