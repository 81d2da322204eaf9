# What people type. Every target does its own set-up and is safe to run twice.
PREFIX  ?= /usr
# Options of the benchmark, such as BENCH='--shape mixed --link 100mbit --repetitions 3'.
BENCH   ?=
# The same of the measurement of preparing, such as PREPARED='--guests idle --repetitions 5'.
PREPARED ?=
SCAN_COST ?=
SWITCHOVER ?=
POSTCOPY ?=
LEAKS ?=
# Which cells of the fault matrix, such as FAULTS='--cells link-cut,:barrier,source-qemu:finish', or
# FAULTS='--resume --cells ...' to run these again and keep the others.
FAULTS  ?=
# Which guests are recorded (debian or demo), where recorded streams are, one directory a mix, and
# options of recording and replaying, such as RECORD='--memory 1024 --redis-data 300',
# REPLAY='--ablation --link 100mbit --link 1gbit' and ABLATION='--sets debian --repetitions 3'.
MIX      ?= debian
RECORDED ?= $(CARGO_TARGET_DIR)/streams
STREAMS  ?= $(RECORDED)/$(MIX)
RECORD   ?=
REPLAY   ?= --ablation
ABLATION ?=
# Options of the model, such as SCALING='--cores 32 --memory 8 --guests 100,200'.
SCALING  ?=
DESTDIR ?=
CARGO   ?= cargo
# `CARGO_TARGET_DIR` moves everything that is built, the lab's cache included.
export CARGO_TARGET_DIR ?= $(CURDIR)/target
export VMGANG_LAB_CACHE ?= $(CARGO_TARGET_DIR)/lab
# What the lab lays over its hosts' roots: exactly what `make install` installs.
export VMGANG_INSTALL_TREE ?= $(CARGO_TARGET_DIR)/install

# The version of packages; what comes after it tells builds of one version apart, such as +b1.
VERSION ?= $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)

.DEFAULT_GOAL := help
.PHONY: help setup build install deb deb-files test test-debian test-slow test-versions test-packages test-library test-report test-virt-manager lint demo bench prepared scan-cost switchover postcopy simulate simulate-jobs simulate-sessions fault-matrix leaks record replay tls-cost ablation scaling deny fuzz stage stage-tests

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: ## Debian packages that building needs (nothing else is put on the machine)
	@sh packaging/setup.sh

build: setup ## vmgang, vmgangd and vmgang-hook, optimised
	$(CARGO) build --release --locked -p vmgang-service -p vmgang-cli -p vmgang-hook --bins --example manuals

include packaging/install.mk

install: build ## programs, unit, D-Bus and polkit files, configuration (PREFIX, DESTDIR)
	@$(MAKE) --no-print-directory install-files

stage: build
	@rm -rf "$(VMGANG_INSTALL_TREE)"
	@$(MAKE) --no-print-directory install DESTDIR="$(VMGANG_INSTALL_TREE)" PREFIX=/usr >/dev/null

deb: build ## the Debian package, in the build directory's deb/
	@$(MAKE) --no-print-directory deb-files BUILD_DIR="$(CARGO_TARGET_DIR)/release"

deb-files:
	@sh packaging/setup.sh dpkg-dev binutils
	@rm -rf "$(CARGO_TARGET_DIR)/deb" "$(CARGO_TARGET_DIR)/deb-tree"
	@$(MAKE) --no-print-directory install-files DESTDIR="$(CARGO_TARGET_DIR)/deb-tree" PREFIX=/usr >/dev/null
	packaging/deb/build.sh "$(CARGO_TARGET_DIR)/deb-tree" "$(VERSION)" "$(CARGO_TARGET_DIR)/deb"
	@rm -rf "$(CARGO_TARGET_DIR)/deb-tree"

lint: setup ## formatting and clippy, warnings are errors
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings

# One build for everything that is tested, the programs that the lab's hosts get included: their
# checked arithmetic finds more than their speed would.
stage-tests: setup
	@sh packaging/setup.sh python3
	$(CARGO) build --workspace --bins --tests --examples --locked
	@rm -rf "$(VMGANG_INSTALL_TREE)"
	@$(MAKE) --no-print-directory install-files BUILD_DIR="$(CARGO_TARGET_DIR)/debug" \
	    DESTDIR="$(VMGANG_INSTALL_TREE)" PREFIX=/usr >/dev/null

# cargo-nextest gives one summary for everything and runs each test in a process of its own;
# without it, plain `cargo test` runs the same tests.
test: lint stage-tests ## everything: unit, property, session and lab tests with real VMs
	@if $(CARGO) nextest --version >/dev/null 2>&1; then \
	    $(CARGO) nextest run --workspace --locked; \
	else \
	    $(CARGO) test --workspace --locked --exclude vmgang-lab --exclude vmgang-e2e && \
	    $(CARGO) test --locked -p vmgang-lab -p vmgang-e2e -- --test-threads=1 \
	        --skip every_role_serves_moves --skip slowly_ --skip packages_install_ --skip examples_empty_ --skip virt_manager_ --skip browser_; \
	fi

test-debian: stage ## the lab's Debian guests: four roles boot, serve, move and notice damage
	$(CARGO) nextest run --locked -p vmgang-lab --ignore-default-filter -E 'binary(debian)'

test-slow: stage-tests ## what takes QEMU minutes: a guest that is slowed down until it converges
	$(CARGO) nextest run --workspace --locked --ignore-default-filter \
	    -E 'package(vmgang-e2e) & test(slowly_)'

# Each set of versions is run to its end, whatever fails in it.
test-versions: stage-tests ## the end-to-end tests with other versions of libvirt and QEMU: docs/compatibility.md
	@failed=0; \
	VMGANG_LAB_DEBIAN=own $(CARGO) nextest run --workspace --locked \
	    -E 'package(vmgang-e2e)' || failed=1; \
	VMGANG_LAB_DEBIAN=upgrade $(CARGO) nextest run --workspace --locked \
	    -E 'package(vmgang-e2e) & binary(/^(round_trip|features|prepare|failure|bad_input)$$/)' || failed=1; \
	exit $$failed

test-packages: stage-tests ## the packages on a clean Debian: installed, upgraded, purged; rpmbuild
	@$(MAKE) --no-print-directory deb-files BUILD_DIR="$(CARGO_TARGET_DIR)/debug"
	$(CARGO) nextest run --locked -p vmgang-e2e --ignore-default-filter -E 'binary(packages)'

test-library: stage-tests ## the examples for programs: a host is emptied in Python, Rust and with Ansible
	$(CARGO) nextest run --workspace --locked --ignore-default-filter \
	    -E 'package(vmgang-e2e) & binary(library)'

test-virt-manager: stage-tests ## "Migrate gang..." in a real virt-manager; its pictures are left in the build directory
	$(CARGO) nextest run --workspace --locked --ignore-default-filter \
	    -E 'package(vmgang-e2e) & binary(virt_manager)'

test-report: stage-tests ## the page about a job in a headless Chromium, at a phone's and a desk's width
	@sh packaging/setup.sh chromium fonts-dejavu-core
	$(CARGO) nextest run --workspace --locked --ignore-default-filter \
	    -E 'package(vmgang-e2e) & binary(report)'

demo: stage ## four guests move together from one host to another, beside stock virsh
	$(CARGO) build --release --locked -q -p vmgang-lab -p vmgang-bench
	@"$(CARGO_TARGET_DIR)/release/demo"

bench: stage ## the published tables, all contenders interleaved: docs/benchmarks/tables (BENCH)
	$(CARGO) build --release --locked -q -p vmgang-lab -p vmgang-bench
	@"$(CARGO_TARGET_DIR)/release/bench" $(BENCH)

prepared: stage ## what preparing saves, and what is saved by what is there already (PREPARED)
	$(CARGO) build --release --locked -q -p vmgang-lab -p vmgang-bench
	@"$(CARGO_TARGET_DIR)/release/prepared" --json "$(CARGO_TARGET_DIR)/prepared.json" $(PREPARED)

switchover: stage ## pauses and spread by way of letting a gang go, and what holding costs (SWITCHOVER)
	$(CARGO) build --release --locked -q -p vmgang-lab -p vmgang-bench
	@"$(CARGO_TARGET_DIR)/release/switchover" --json "$(CARGO_TARGET_DIR)/switchover.json" $(SWITCHOVER)

postcopy: stage ## how long guests wait for pages after a switch to post-copy (POSTCOPY)
	$(CARGO) build --release --locked -q -p vmgang-lab -p vmgang-bench
	@"$(CARGO_TARGET_DIR)/release/postcopy" --json "$(CARGO_TARGET_DIR)/postcopy.json" $(POSTCOPY)

# As many seeds as nobody waits for in `make test`; SEED=N of one of the two replays one and shows what
# happened.
SEEDS ?= 100000
SIMULATORS ?= $(shell nproc)
simulate: simulate-jobs simulate-sessions ## whole migrations in made-up worlds in which everything breaks, by the seed (SEEDS)

simulate-jobs: setup ## coordinator over a made-up tunnel (SEEDS, SEED)
	SEEDS=$(SEEDS) SEED=$(SEED) $(CARGO) test --release --locked -p vmgang-service --test simulation \
	    whatever -- --nocapture

simulate-sessions: setup ## coordinator and both halves of the engine, over a made-up network (SEEDS, SEED)
	SEEDS=$(SEEDS) SEED=$(SEED) JOBS=$(SIMULATORS) \
	    $(CARGO) run --release --locked -q -p vmgang-simulation --bin simulate

leaks: stage ## many migrations back and forth; what the daemons hold must not grow (LEAKS)
	$(CARGO) build --release --locked -q -p vmgang-lab -p vmgang-e2e
	@"$(CARGO_TARGET_DIR)/release/leaks" $(LEAKS)

scan-cost: stage ## what periodic scans cost the guests that are scanned (SCAN_COST)
	$(CARGO) build --release --locked -q -p vmgang-lab -p vmgang-bench
	@"$(CARGO_TARGET_DIR)/release/scan_cost" $(SCAN_COST)

# Far too long for every change: about an hour. Checked arithmetic, as in the tests.
fault-matrix: stage-tests ## what becomes of guests when things break: docs/fault-matrix.md (FAULTS)
	@"$(CARGO_TARGET_DIR)/debug/fault_matrix" --results "$(CARGO_TARGET_DIR)/fault-matrix.jsonl" $(FAULTS)

# Inputs found on the way stay in the build directory; tests/corpus has the seeds.
FUZZ_SECONDS ?= 60
FUZZ_TARGETS ?= $(basename $(notdir $(wildcard tests/fuzz/fuzz_targets/*.rs)))

fuzz: ## every decoder against inputs made to break it (nightly Rust; FUZZ_SECONDS each, FUZZ_TARGETS)
	@$(CARGO) fuzz --version >/dev/null 2>&1 || $(CARGO) install --locked cargo-fuzz
	@for target in $(FUZZ_TARGETS); do \
	    found="$(CARGO_TARGET_DIR)/fuzz/$$target"; mkdir -p "$$found" && \
	    $(CARGO) +nightly fuzz run --fuzz-dir tests/fuzz "$$target" \
	        "$$found" "tests/corpus/$$target" -- \
	        -max_total_time=$(FUZZ_SECONDS) -max_len=20000 -malloc_limit_mb=64 -print_final_stats=1 || exit 1; \
	done

record: setup ## keeps the migration streams of four guests, for replay (MIX, RECORD, STREAMS)
	$(CARGO) build --release --locked -q -p vmgang-lab -p vmgang-bench
	@"$(CARGO_TARGET_DIR)/release/record" --mix "$(MIX)" --dir "$(STREAMS)" $(RECORD)

replay: setup ## recorded streams through both halves of the engine, technique by technique (MIX, REPLAY, STREAMS)
	$(CARGO) build --release --locked -q -p vmgang-bench
	@"$(CARGO_TARGET_DIR)/release/replay" --streams "$(STREAMS)" --json "$(CARGO_TARGET_DIR)/replay.json" $(REPLAY)

tls-cost: setup ## what TLS costs, with it and without in turns (TLS_COST)
	$(CARGO) build --release --locked -q -p vmgang-bench
	@"$(CARGO_TARGET_DIR)/release/tls_cost" --json "$(CARGO_TARGET_DIR)/tls-cost.json" $(TLS_COST)

ablation: setup ## every technique on every mix and link: docs/benchmarks/ablation.* (RECORDED, ABLATION)
	$(CARGO) build --release --locked -q -p vmgang-bench
	@"$(CARGO_TARGET_DIR)/release/ablation" --recorded "$(RECORDED)" $(ABLATION)

scaling: setup ## docs/scaling/: large hosts, computed from what `make bench` has left (SCALING)
	$(CARGO) build --release --locked -q -p vmgang-bench
	@"$(CARGO_TARGET_DIR)/release/scaling" $(SCALING)

deny: ## licences and advisories of the dependencies
	@$(CARGO) deny --version >/dev/null 2>&1 || $(CARGO) install --locked cargo-deny
	$(CARGO) deny check licenses bans sources
	@echo "advisories need github.com: cargo deny check advisories"
