#!/bin/sh
# Updates the containers of compose.yaml to this checkout. If the migration fails, the running containers keep serving.
set -eu
cd "$(dirname "$0")/../.."
GIT_COMMIT=$(git rev-parse HEAD)
export GIT_COMMIT
docker compose build
docker compose run --rm migrate
# With the profile `proxy` there are two instances. The second is replaced when the first serves again.
for instance in $(docker compose config --services | grep -x 'service2\{0,1\}'); do
    docker compose up --detach --wait --no-deps "$instance"
done
