-- The login role of Grafana. `docker compose up` runs this after the migration, with the password in the environment.
\getenv password PASSWORD
select 'create role grafana in role listing_auditor' where to_regrole('grafana') is null \gexec
alter role grafana login password :'password';
alter role grafana set statement_timeout = '10s';
