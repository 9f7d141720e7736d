#!/bin/sh
# Sends valid and invalid requests that schemathesis generates from the OpenAPI document, and checks the responses against it.
# Run it with `make fuzz`.
set -eu

PYTHONPATH=$(dirname "$(dirname "$SCHEMATHESIS")") python3 "$SCHEMATHESIS" --config-file tests/schemathesis.toml run "$ADDRESS/openapi.yaml" \
    --checks all --seed 20261120 --max-examples 400 --generation-database none --no-color \
    --header "Authorization: Bearer $KEY"
