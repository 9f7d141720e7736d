-- The login role of Grafana. compose.yaml runs this after each migration, with the password in the environment.
\getenv password PASSWORD
select 'create role grafana in role listing_auditor' where to_regrole('grafana') is null \gexec
alter role grafana login password :'password';
alter role grafana set statement_timeout = '10s';
