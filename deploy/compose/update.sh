#!/bin/sh
# Updates the containers of compose.yaml to this checkout. If the migration fails, the running containers keep serving.
set -eu
cd "$(dirname "$0")/../.."
# Empty in a folder without git.
GIT_COMMIT=$(git rev-parse HEAD 2>/dev/null || true)
export GIT_COMMIT
docker compose build
docker compose run --rm --no-deps migrate
# With the profile `proxy` there are two instances. The second is replaced when the first serves again.
for instance in $(docker compose config --services | grep -x 'service2\{0,1\}'); do
    docker compose up --detach --wait --no-deps "$instance"
done
