-- The login role of the service. `docker compose up` runs this after the migration, with the password in the environment.
\getenv password PASSWORD
select 'create role listing_service in role listing_api' where to_regrole('listing_service') is null \gexec
alter role listing_service login password :'password';
-- Keeps the hashes of API keys out of the log of PostgreSQL.
alter role listing_service set log_parameter_max_length = 0;
alter role listing_service set log_parameter_max_length_on_error = 0;
