#!/bin/sh
# Generates a TypeScript and a Python client from the OpenAPI document that the service serves, checks their types, and runs a
# story with each. Run it with `make clients`.
set -eu

# Beside the node_modules, so that Node.js and TypeScript find openapi-fetch.
typescript=${TSC%/node_modules/*}/clients
rm -rf "$typescript"
mkdir "$typescript"
cp tests/clients/story.mts "$typescript"
"$(dirname "$TSC")/openapi-typescript" "$ADDRESS/openapi.yaml" --output "$typescript/api.d.ts"
"$TSC" --strict --noUncheckedIndexedAccess --target es2022 --module nodenext "$typescript/story.mts"
node "$typescript/story.mjs"

packages=${PYTHON_CLIENT%/bin/*}
python=$packages/clients
rm -rf "$python"
mkdir "$python"
cp tests/clients/story.py "$python"
export PYTHONPATH="$packages" PATH="$packages/bin:$PATH"
python3 "$PYTHON_CLIENT" generate --url "$ADDRESS/openapi.yaml" --config tests/clients/python.yaml --fail-on-warning \
    --meta none --output-path "$python/listing_api_client"
cd "$python"
python3 -m mypy --strict story.py
python3 story.py
