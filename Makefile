# nats-presence. `make help` tells what there is.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
ABI := 0
PREFIX ?= /usr/local
DESTDIR ?=
CARGO ?= cargo
PYTHON ?= python3
# Where the library stands as if installed; tests, demo and benches use nothing else of it.
STAGE := $(CURDIR)/build/stage

.PHONY: help
help: ## Tell the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

.PHONY: build
build: ## Build the library, optimised
	$(CARGO) build --release --locked

.PHONY: install
install: build ## Install header, libraries and pkg-config files below PREFIX (default /usr/local)
	install -d $(DESTDIR)$(PREFIX)/include $(DESTDIR)$(PREFIX)/lib/pkgconfig
	install -m 644 include/nats_presence.h $(DESTDIR)$(PREFIX)/include/
	install -m 755 target/release/libnats_presence.so $(DESTDIR)$(PREFIX)/lib/libnats_presence.so.$(VERSION)
	ln -sf libnats_presence.so.$(VERSION) $(DESTDIR)$(PREFIX)/lib/libnats_presence.so.$(ABI)
	ln -sf libnats_presence.so.$(ABI) $(DESTDIR)$(PREFIX)/lib/libnats_presence.so
	install -m 644 target/release/libnats_presence.a $(DESTDIR)$(PREFIX)/lib/
	for name in nats-presence nats-presence-static; do \
	  sed 's/@VERSION@/$(VERSION)/' packaging/$$name.pc.in > $(DESTDIR)$(PREFIX)/lib/pkgconfig/$$name.pc || exit 1; done

.PHONY: stage
stage: ## Install below build/stage, for tests, demo and benches
	@$(MAKE) --no-print-directory install PREFIX= DESTDIR=$(STAGE)

.PHONY: clean
clean: ## Remove all that was built
	rm -rf build target
