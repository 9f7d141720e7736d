-- Who may do what: listing_api for the service, listing_auditor for people who look. Neither can log in; make login roles
-- members of them. Roles belong to the whole cluster, so they may be there already.
do $$
declare
    role_name text;
begin
    foreach role_name in array array['listing_api', 'listing_auditor'] loop
        if not exists (select from pg_catalog.pg_roles where rolname = role_name) then
            begin
                execute format('create role %I nologin', role_name);
            exception
                when duplicate_object or unique_violation then
                    null; -- A migration of another database in this cluster made it a moment ago.
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

grant usage on schema public to listing_api, listing_auditor;

-- The log is for reading: rows come from the trigger, and go with their listing.
grant select, insert, update, delete on public.listing to listing_api;
grant usage on sequence public.listing_id_seq to listing_api;
grant select on public.listing_price_log to listing_api;

grant select on
    public.listing,
    public.listing_price_log,
    public.listing_price_change,
    public.listing_price_trend,
    public.listing_price_log_problem
to listing_auditor;

-- The service compares the history of migrations with its own at every start. The table is refinery's, made where the
-- search_path of the migrating role says.
grant select on refinery_schema_history to listing_api, listing_auditor;
