# Two images: `service` runs the service, `migrate` runs the refinery CLI that migrates the database. Needs BuildKit.

FROM rust:1.95-slim-bookworm AS build
WORKDIR /build
# Cargo.toml names the file of the tests, which no image needs.
RUN mkdir tests && touch tests/main.rs
COPY Cargo.toml Cargo.lock build.rs ./
COPY src src
COPY sql sql
# The commit that --version names.
ARG GIT_COMMIT
# The caches keep compiled dependencies between builds. Cargo decides by the times of files what changed, and a cache may be that
# of another checkout. Touching these files makes Cargo always build the program itself.
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/build/target,sharing=locked \
    touch build.rs src/lib.rs src/main.rs && cargo build --release --locked && cp target/release/listing-api /usr/local/bin/
# The program, the libraries that it links, and the certificate authorities that it trusts by default.
RUN mkdir /image && ldd /usr/local/bin/listing-api | grep -o '/[^ ]*' | xargs \
    cp --parents --dereference -t /image /usr/local/bin/listing-api /etc/ssl/certs/ca-certificates.crt

FROM scratch AS service
COPY --from=build /image /
USER 65534:65534
ENTRYPOINT ["/usr/local/bin/listing-api"]

# The CLI uses OpenSSL for TLS, the service uses rustls.
FROM rust:1.95-slim-bookworm AS refinery
RUN apt-get update && apt-get install -y --no-install-recommends libssl-dev pkg-config && rm -rf /var/lib/apt/lists/*
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    cargo install refinery_cli --version 0.10.0 --no-default-features --features postgresql --locked --root /refinery

FROM debian:bookworm-slim AS migrate
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates libssl3 && rm -rf /var/lib/apt/lists/*
COPY --from=refinery /refinery/bin/refinery /usr/local/bin/
COPY sql /sql
USER 65534:65534
ENTRYPOINT ["refinery", "migrate", "-e", "DATABASE_URL", "-p", "/sql", "-g", "-d", "-m"]
