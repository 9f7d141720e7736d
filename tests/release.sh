#!/bin/sh
# Verifies that this checkout can be released as the version of Cargo.toml. `make release-check` runs it.
set -eu
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' Cargo.toml | head -n 1)
problems=0
problem() { echo "release: $*" >&2; problems=$((problems + 1)); }

[ -z "$(git status --porcelain)" ] || problem 'the checkout has changes that are not committed'
grep -qx "  version: $version" src/api/openapi.yaml || problem "src/api/openapi.yaml does not have the version of Cargo.toml, $version"
grep -q "newTag: $version}" docs/deploying.md || problem "docs/deploying.md does not name the images of $version"
grep -qEx "## $version - [0-9]{4}-[0-9]{2}-[0-9]{2}" CHANGELOG.md ||
    problem "CHANGELOG.md has no heading '## $version - <year>-<month>-<day>'"
tag=$(git describe --tags --exact-match 2>/dev/null || echo "v$version")
[ "$tag" = "v$version" ] || problem "the tag is $tag, not v$version"
cargo build --release --locked
built=$(target/release/listing-api --version)
expected="listing-api $version (commit $(git rev-parse --short=8 HEAD)"
case $built in "$expected"*) ;; *) problem "the program is '$built', not '$expected…'" ;; esac
cargo test --locked --test tests -- docs::every_link || problem 'a link of the docs leads nowhere'
[ $problems = 0 ] || exit 1
echo "release: $built can be released"
