# Two images: `service` runs the service, `migrate` runs the refinery CLI that migrates the database.

FROM rust:1.95-slim-bookworm AS build
WORKDIR /build
# Builds the dependencies first. Docker builds them again only if one of these three files changes.
COPY Cargo.toml Cargo.lock build.rs ./
RUN mkdir -p src/api sql tests && touch src/lib.rs src/api/openapi.yaml tests/main.rs && echo 'fn main() {}' > src/main.rs \
    && cargo build --release --locked
COPY src src
COPY sql sql
# The placeholders above may be newer than the real files. Touching these makes cargo build them.
RUN touch build.rs src/main.rs src/lib.rs && cargo build --release --locked

# The CLI uses OpenSSL for TLS, the service uses rustls.
FROM rust:1.95-slim-bookworm AS refinery
RUN apt-get update && apt-get install -y --no-install-recommends libssl-dev pkg-config && rm -rf /var/lib/apt/lists/*
RUN cargo install refinery_cli --version 0.10.0 --no-default-features --features postgresql --locked --root /refinery

FROM debian:bookworm-slim AS migrate
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates libssl3 && rm -rf /var/lib/apt/lists/*
COPY --from=refinery /refinery/bin/refinery /usr/local/bin/
COPY sql /sql
USER nobody
ENTRYPOINT ["refinery", "migrate", "-e", "DATABASE_URL", "-p", "/sql", "-g", "-d", "-m"]

FROM debian:bookworm-slim AS service
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates && rm -rf /var/lib/apt/lists/*
COPY --from=build /build/target/release/listing-api /usr/local/bin/
USER nobody
ENTRYPOINT ["listing-api"]
