-- Checks that the database still logs every price, and that the log is complete. Each problem comes with a statement that
-- repairs it.
set local search_path = pg_catalog, pg_temp;
set local lock_timeout = '5s';

-- Reads only the catalogs, so the service reads it at each start.
create view public.listing_setup_problem with (security_invoker = true) as
with expected_trigger (table_name, name, effect, event, action) as (
    values
        (
            'listing', 'listing_price_logged_on_insert', 'first prices are not logged', 'AFTER INSERT',
            'ROW EXECUTE FUNCTION public.log_listing_price()'
        ),
        (
            'listing', 'listing_price_logged_on_update', 'price changes are not logged', 'AFTER UPDATE',
            'ROW WHEN ((old.price IS DISTINCT FROM new.price)) EXECUTE FUNCTION public.log_listing_price()'
        ),
        (
            'listing', 'listing_deletion_logged_on_delete', 'deletions are not logged', 'AFTER DELETE',
            'ROW EXECUTE FUNCTION public.log_listing_price()'
        ),
        (
            'listing_price_log', 'listing_price_log_append_only', 'its rows can be changed',
            'BEFORE DELETE OR UPDATE OR TRUNCATE', 'STATEMENT EXECUTE FUNCTION public.refuse_listing_price_log_change()'
        ),
        (
            'listing_deletion', 'listing_deletion_append_only', 'its rows can be changed',
            'BEFORE DELETE OR UPDATE OR TRUNCATE', 'STATEMENT EXECUTE FUNCTION public.refuse_listing_price_log_change()'
        ),
        (
            'listing_price_log_maintenance', 'listing_price_log_maintenance_append_only', 'its rows can be changed',
            'BEFORE DELETE OR UPDATE OR TRUNCATE', 'STATEMENT EXECUTE FUNCTION public.refuse_listing_price_log_change()'
        )
),
expected as (
    select
        *,
        format('public.%I', table_name)::regclass as table_oid,
        format('CREATE TRIGGER %I %s ON public.%I FOR EACH %s', name, event, table_name, action) as definition
    from expected_trigger
),
-- The rights of other roles than the owner on our objects, their columns included.
held as (
    select
        access.kind,
        access.object,
        access.privileges as expected,
        access.roles,
        acl.grantee,
        acl.privilege_type,
        null as column_name
    from public.listing_access as access
    join pg_class as class on access.kind <> 'function' and class.oid = access.object_id
    cross join aclexplode(class.relacl) as acl
    where acl.grantee <> class.relowner
    union all
    select access.kind, access.object, null, '{}', acl.grantee, acl.privilege_type, attribute.attname
    from public.listing_access as access
    join pg_class as class on access.kind = 'table' and class.oid = access.object_id
    join pg_attribute as attribute on attribute.attrelid = class.oid
    cross join aclexplode(attribute.attacl) as acl
    where acl.grantee <> class.relowner
    union all
    select access.kind, access.object, access.privileges, access.roles, acl.grantee, acl.privilege_type, null
    from public.listing_access as access
    join pg_proc as function on access.kind = 'function' and function.oid = access.object_id
    cross join aclexplode(coalesce(function.proacl, acldefault('f', function.proowner))) as acl
    where acl.grantee <> function.proowner
    union all
    -- On listing, other roles may have any right but TRUNCATE, TRIGGER or REFERENCES.
    select 'table', 'public.listing', null, '{}', acl.grantee, acl.privilege_type, null
    from pg_class as class
    cross join aclexplode(class.relacl) as acl
    left join pg_roles as role on role.oid = acl.grantee
    where class.oid = 'public.listing'::regclass
        and acl.grantee <> class.relowner
        and (
            acl.privilege_type in ('TRUNCATE', 'TRIGGER', 'REFERENCES')
            or role.rolname = 'listing_api' and acl.privilege_type in ('INSERT', 'UPDATE')
            or role.rolname = 'listing_auditor' and acl.privilege_type <> 'SELECT'
        )
    union all
    select 'table', 'public.listing', null, '{}', acl.grantee, acl.privilege_type, attribute.attname
    from pg_attribute as attribute
    join pg_class as class on class.oid = attribute.attrelid
    cross join aclexplode(attribute.attacl) as acl
    left join pg_roles as role on role.oid = acl.grantee
    where class.oid = 'public.listing'::regclass
        and acl.grantee <> class.relowner
        and (
            acl.privilege_type = 'REFERENCES'
            or role.rolname = 'listing_api' and attribute.attname in ('id', 'created_date')
            or role.rolname = 'listing_api' and attribute.attname = 'owner' and acl.privilege_type = 'UPDATE'
            or role.rolname = 'listing_auditor'
        )
)
select
    'trigger missing or altered' as problem,
    format('Trigger %s on %s is missing or altered, so %s.', name, table_name, effect) as explanation,
    format('drop trigger if exists %I on public.%I; %s;', name, table_name, definition) as mend
from expected
where not exists (
    select
    from pg_trigger
    where tgname = expected.name
        and tgrelid = expected.table_oid
        -- PostgreSQL omits the schema of the function if it is in the search_path of the reader.
        and replace(pg_get_triggerdef(oid), 'FUNCTION public.', 'FUNCTION ')
            = replace(expected.definition, 'FUNCTION public.', 'FUNCTION ')
)
union all
select
    'trigger not enabled',
    format('Trigger %s on %s does not fire for every writer, so %s.', name, table_name, effect),
    format('alter table public.%I enable trigger %I;', table_name, name)
from expected
join pg_trigger on tgname = expected.name and tgrelid = expected.table_oid
-- O fires for every writer except a replication worker, A also for that one.
where tgenabled not in ('O', 'A')
union all
select
    'foreign key missing or altered',
    'The foreign key of listing_price_log, which deletes prices with their listing and keeps its id, is missing or altered.',
    'alter table public.listing_price_log drop constraint if exists listing_price_log_listing_id_fkey, '
    'add constraint listing_price_log_listing_id_fkey foreign key (listing_id) references public.listing (id) '
    'on update restrict on delete cascade;'
where not exists (
    select
    from pg_constraint
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
    format(
        'The foreign key of listing_price_log is not enforced on %s, because its triggers there are disabled.',
        tgrelid::regclass
    ),
    format('alter table %s enable trigger all;', tgrelid::regclass)
from pg_trigger
join pg_constraint on pg_constraint.oid = tgconstraint
where conname = 'listing_price_log_listing_id_fkey'
    and conrelid = 'public.listing_price_log'::regclass
    and tgenabled not in ('O', 'A')
union all
select
    'foreign right',
    format(
        'Role %s has the right %s on %s, which the migrations did not grant.',
        grantee_name,
        lower(privilege_type) || column_list,
        object
    ),
    format('revoke %s on %s %s from %s cascade;', privilege_type || column_list, kind, object, grantee_name)
from held
cross join lateral (
    select
        coalesce((select quote_ident(rolname) from pg_roles where pg_roles.oid = held.grantee), 'public') as grantee_name,
        coalesce(' (' || quote_ident(held.column_name) || ')', '') as column_list
) as named
where lower(held.privilege_type) <> all (coalesce(string_to_array(held.expected, ', '), '{}'))
    or grantee_name <> all (held.roles)
union all
select
    'different owners',
    format(
        '%s belongs to %s, and listing_price_log to %s. The owner of the one can run code with the rights of the other.',
        owned.name,
        owned.owner,
        log_owner.owner
    ),
    format('alter %s %s owner to %s;', owned.kind, owned.name, log_owner.owner)
from (
    select 'table' as kind, pg_class.oid::regclass::text as name, relowner::regrole as owner
    from pg_class
    where relnamespace = 'public'::regnamespace
        and relkind in ('r', 'p', 'v')
        and relname in ('listing', 'listing_deletion', 'listing_price_log_maintenance', 'api_key', 'listing_access', 'idempotency_key')
    union all
    select 'function', pg_proc.oid::regprocedure::text, proowner::regrole
    from public.listing_access
    join pg_proc on kind = 'function' and pg_proc.oid = object_id
) as owned
cross join (select relowner::regrole as owner from pg_class where oid = 'public.listing_price_log'::regclass) as log_owner
where owned.owner <> log_owner.owner
union all
select
    'rule on a table',
    format('Rule %I on %s can replace a write by something else.', rulename, ev_class::regclass),
    format('drop rule %I on %s;', rulename, ev_class::regclass)
from pg_rewrite
where ev_class in ('public.listing'::regclass, 'public.listing_price_log'::regclass, 'public.listing_deletion'::regclass)
union all
select
    'row security on the log',
    format('Row security on %s can hide rows from its readers.', pg_class.oid::regclass),
    format('alter table %1$s disable row level security, no force row level security;', pg_class.oid::regclass)
from pg_class
where relrowsecurity
    and pg_class.oid in ('public.listing_price_log'::regclass, 'public.listing_deletion'::regclass)
union all
select
    'schema public is writable',
    format('Role %s may create functions and operators in the schema public, which other sessions then call.', grantee_name),
    format('revoke create on schema public from %s;', grantee_name)
from pg_namespace as schema
cross join aclexplode(coalesce(schema.nspacl, acldefault('n', schema.nspowner))) as acl
left join pg_roles as role on role.oid = acl.grantee
cross join lateral (select coalesce(quote_ident(role.rolname), 'public') as grantee_name) as named
where schema.nspname = 'public'
    and acl.privilege_type = 'CREATE'
    and coalesce(not role.rolsuper and role.rolname <> 'pg_database_owner', true)
    and acl.grantee not in (
        (select datdba from pg_database where datname = current_database()),
        (select relowner from pg_class where oid = 'public.listing_price_log'::regclass)
    )
union all
select
    'trigger without a search_path',
    format(
        'Trigger %s on %s calls %s, which has no search_path of its own. The service has only pg_catalog in its path, so '
        'names without a schema are not found there.',
        tgname,
        tgrelid::regclass,
        tgfoid::regprocedure
    ),
    format('alter function %s set search_path = pg_catalog, public, pg_temp;', tgfoid::regprocedure)
from pg_trigger
join pg_proc on pg_proc.oid = tgfoid
join pg_language on pg_language.oid = prolang
where tgrelid in ('public.listing'::regclass, 'public.listing_price_log'::regclass, 'public.listing_deletion'::regclass)
    and not tgisinternal
    and lanname not in ('internal', 'c')
    and not exists (select from unnest(proconfig) as setting where setting like 'search\_path=%');

comment on view public.listing_setup_problem is
    'Empty if the triggers, foreign key and rights of the log are as the migrations left them.';
comment on column public.listing_setup_problem.problem is
    'The kind of problem.';
comment on column public.listing_setup_problem.explanation is
    'What is wrong, and its effect.';
comment on column public.listing_setup_problem.mend is
    'The statement that repairs it, for the owner or a superuser.';

create view public.listing_price_log_problem with (security_invoker = true) as
select
    'listing without a price' as problem,
    listing.id as listing_id,
    null::bigint as log_id,
    format(
        'Listing %s has no price in the log. Possible causes: it was inserted while the trigger did not fire; its prices were '
        'removed; its id was changed while the foreign key was not enforced.',
        listing.id
    ) as explanation,
    format(
        'insert into public.listing_price_log (listing_id, new_price, changed_by, login_role) '
        'select id, price, ''repair'', session_user from public.listing where id = %1$s '
        'and not exists (select from public.listing_price_log where listing_id = %1$s) for update;',
        listing.id
    ) as mend
from public.listing
where not exists (select from public.listing_price_log as log where log.listing_id = listing.id)
union all
select problem.problem, finding.listing_id, finding.id, problem.explanation, problem.mend
from (
    -- One pass over the log. A condition on listing_id reaches the index.
    select
        step.*,
        listing.price,
        step.is_last and listing.id is null as is_orphan,
        step.is_last and step.new_price <> listing.price as is_not_current,
        step.previous_id is not null and step.old_price is distinct from step.previous_price as is_broken,
        step.previous_id is null and step.old_price is not null and step.changed_at >= coalesce(
            (select max(pruned_before) from public.listing_price_log_maintenance where task = 'prune'),
            '-infinity'
        ) as is_headless
    from (
        select
            listing_id,
            id,
            old_price,
            new_price,
            changed_at,
            lag(id) over history as previous_id,
            lag(new_price) over history as previous_price,
            lead(id) over history is null as is_last
        from public.listing_price_log
        window history as (partition by listing_id order by id)
    ) as step
    left join public.listing on step.is_last and listing.id = step.listing_id
) as finding
cross join lateral (
    select
        'prices without a listing' as problem,
        format(
            'Listing %s is gone but its prices are not. Possible causes, while the foreign key was not enforced: it was '
            'deleted; its id was changed; its prices were added.',
            finding.listing_id
        ) as explanation,
        format(
            'alter table public.listing_price_log disable trigger user; '
            'delete from public.listing_price_log where listing_id = %s; '
            'alter table public.listing_price_log enable trigger user;',
            finding.listing_id
        ) as mend
    where finding.is_orphan
    union all
    select
        'last price differs',
        format(
            'Listing %s costs %s but its last logged price is %s. Possible causes: its price was changed while the trigger did '
            'not fire, or in an AFTER trigger; rows at the end of its history were removed, altered or added.',
            finding.listing_id,
            finding.price,
            finding.new_price
        ),
        -- Inserts nothing if the price has changed again. Then read this view again.
        format(
            'insert into public.listing_price_log (listing_id, old_price, new_price, changed_by, login_role) '
            'select id, %2$s, price, ''repair'', session_user from public.listing where id = %1$s and price = %3$s for update;',
            finding.listing_id,
            finding.new_price,
            finding.price
        )
    where finding.is_not_current
    union all
    select
        'history without a beginning',
        format(
            'The history of listing %s begins with a change from %s. Possible causes: the rows before it were removed, and not '
            'by prune_price_history(); this row was altered. Restore the history from a backup, or accept the loss.',
            finding.listing_id,
            finding.old_price
        ),
        format(
            'insert into public.listing_price_log (listing_id, id, new_price, changed_at, changed_by, login_role) '
            'overriding system value select listing_id, id - 1, old_price, changed_at, ''repair'', session_user '
            'from public.listing_price_log where listing_id = %s and id = %s;',
            finding.listing_id,
            finding.id
        )
    where finding.is_headless
    union all
    select
        'broken chain',
        format(
            'Row %s of listing %s says that the price before was %s, but row %s before it says %s. Possible causes: rows '
            'between them were removed; one of the two was altered or added; a price was changed while the trigger did not '
            'fire, or in an AFTER trigger. Restore the history from a backup, or close the gap.',
            finding.id,
            finding.listing_id,
            coalesce(finding.old_price::text, 'nothing'),
            finding.previous_id,
            finding.previous_price
        ),
        case
            when finding.old_price is not null and finding.id > finding.previous_id + 1 then format(
                'insert into public.listing_price_log '
                '(listing_id, id, old_price, new_price, changed_at, changed_by, login_role) '
                'overriding system value select listing_id, id + 1, new_price, %s, changed_at, ''repair'', session_user '
                'from public.listing_price_log where listing_id = %s and id = %s;',
                finding.old_price,
                finding.listing_id,
                finding.previous_id
            )
            else format(
                'alter table public.listing_price_log disable trigger user; '
                '%s where listing_id = %s and id = %s; '
                'alter table public.listing_price_log enable trigger user;',
                case
                    -- Compared with the row before it, the row changes nothing.
                    when finding.previous_price = finding.new_price then 'delete from public.listing_price_log'
                    else format('update public.listing_price_log set old_price = %s', finding.previous_price)
                end,
                finding.listing_id,
                finding.id
            )
        end
    where finding.is_broken
) as problem
where finding.is_orphan or finding.is_not_current or finding.is_broken or finding.is_headless
union all
select
    'transaction numbers from the future',
    null,
    null,
    format(
        '%s rows of the log have transaction numbers that this server has not given out yet, because the rows come from another '
        'server. The change feed delivers such a row only when the number is given out. Until then, undo_price_changes() can '
        'confuse two transactions. Call restart_change_feed(): all rows then count as past, and consumers begin anew.',
        number_from_the_future.row_count
    ),
    'select public.restart_change_feed();'
from (
    select count(*) as row_count
    from (
        select xact_id from public.listing_price_log
        union all
        select xact_id from public.listing_deletion
    ) as logged
    where xact_id >= pg_snapshot_xmax(pg_current_snapshot())
        -- The reader may be the writer.
        and xact_id is distinct from pg_current_xact_id_if_assigned()
) as number_from_the_future
where number_from_the_future.row_count > 0
union all
select problem, null::integer, null::bigint, explanation, mend
from public.listing_setup_problem;

comment on view public.listing_price_log_problem is
    'Empty if the log is complete. Reads the whole log, or one history with a condition on listing_id.';
comment on column public.listing_price_log_problem.problem is
    'The kind of problem.';
comment on column public.listing_price_log_problem.listing_id is
    'The listing. Null if the problem concerns all.';
comment on column public.listing_price_log_problem.log_id is
    'The row of the log. Null if the problem concerns no row.';
comment on column public.listing_price_log_problem.explanation is
    'What is wrong, and every known cause.';
comment on column public.listing_price_log_problem.mend is
    'The statement that repairs it, for the owner or a superuser. Repair one, then read the view again.';

create function public.listing_price_log_problem_since(xact_id xid8) returns setof public.listing_price_log_problem
    language sql
    stable
begin atomic
    select problem.*
    from public.listing_price_log_problem as problem
    where problem.listing_id = any (array(
        select log.listing_id
        from public.listing_price_log as log
        where log.xact_id >= listing_price_log_problem_since.xact_id
        union all
        select deletion.listing_id
        from public.listing_deletion as deletion
        where deletion.xact_id >= listing_price_log_problem_since.xact_id
        union all
        -- Reads the whole table. xmin has 32 bits, and age() compares it with the current transaction.
        select listing.id
        from public.listing
        where age(listing.xmin) <= age(listing_price_log_problem_since.xact_id::xid)
    ))
    union all
    select setup.problem, null, null, setup.explanation, setup.mend
    from public.listing_setup_problem as setup;
end;

comment on function public.listing_price_log_problem_since(xid8) is
    'The problems of the listings that were written since a transaction, and of the setup.';

select public.reset_listing_access();

set local search_path to default;
