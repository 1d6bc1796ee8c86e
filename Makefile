# The two that matter: `make serve` and `make test`. Each installs what it lacks, builds and runs.

SHELL := /bin/bash
TARGET := $(or $(CARGO_TARGET_DIR),target)
# As in `make serve ARGS="--cache-size 8G --memory 2G"`.
ARGS ?=
# As in `make bench-core BENCH="--rounds 1 --workloads resident"`.
BENCH ?=
# As in `make bench-traffic TRACES="monday.btr.zst tuesday.btr.zst"`.
TRACES ?=

.PHONY: help serve test check loom fuzz ceph system test-rig
.PHONY: bench bench-push bench-core bench-traffic clean

help:
	@echo 'make serve   build the appliance and serve a disk (ARGS="..." are passed on)'
	@echo 'make test    everything: style, lints, unit, model, loom, fuzz and system tests'
	@echo 'make check   what is fast of it: style, lints, unit and model tests'
	@echo 'make loom    every interleaving of what crosses cores'
	@echo 'make fuzz    each fuzz target for FUZZ_SECONDS (10)'
	@echo 'make ceph    the store client and the appliance on a Ceph that is started for it'
	@echo 'make system  the appliance with real clients (TESTS="..." names some)'
	@echo 'make test-rig  the appliance and a kernel, in emulated machines (JOBS="..." names some)'
	@echo 'make bench   the appliance beside its peers'
	@echo 'make bench-push  reads while a push runs at full rate'
	@echo 'make bench-traffic  what recordings cost in requests to the store (TRACES="...")'
	@echo 'make bench-core  the cost of one access beside other caches (BENCH="..." are passed on)'

serve:
	@tests/install serve
	cargo build --release -p heeler
	exec $(TARGET)/release/heeler serve $(ARGS)

test:
	@tests/install serve test s3 ceph
	@tests/run style lints units no_std loom fuzz s3 ceph system glommio

check:
	@tests/install serve
	@tests/run style lints units

loom:
	@tests/install serve
	@tests/run loom

fuzz:
	@tests/install serve test
	@tests/run fuzz

ceph:
	@tests/install serve test s3 ceph
	@tests/run ceph

system:
	@tests/install serve test s3
	@tests/run s3 system glommio

test-rig:
	@tests/install serve rig
	@tests/run rig

bench:
	@tests/install serve test
	cargo build --release -p heeler
	tests/benches/run

bench-push:
	@tests/install serve test
	cargo build --release -p heeler
	tests/benches/push --out tests/benches/RESULTS-push.md

bench-traffic:
	@tests/install serve
	HEELER_TRAFFIC="$(TRACES)" cargo test -p heeler-tests --test traffic -- recorded --nocapture

bench-core:
	@tests/install serve
	cargo run --release --manifest-path tests/benches/core/Cargo.toml \
		--target-dir $(TARGET)/bench-core -- --out tests/benches/RESULTS-core.md $(BENCH)

clean:
	cargo clean
	cargo clean --manifest-path fuzz/Cargo.toml
