# The service in a small image, and in another one the CLI that migrates its database.

FROM rust:1.95-slim-bookworm AS build
WORKDIR /build
# The dependencies first: they are built again only when these two files change.
COPY Cargo.toml Cargo.lock build.rs ./
RUN mkdir -p src sql tests && touch src/lib.rs src/openapi.yaml tests/main.rs && echo 'fn main() {}' > src/main.rs \
    && cargo build --release --locked
COPY src src
COPY sql sql
# The stand-ins above may be newer than the files in their places.
RUN touch build.rs src/main.rs src/lib.rs && cargo build --release --locked

# The CLI speaks TLS by OpenSSL, the service by rustls.
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
