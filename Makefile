# `make demo` and `make test` prepare the machine themselves: see scripts/setup.
.PHONY: demo test test-gpu test-asan lint bench bench-gpu build setup clean

setup:
	@scripts/setup

build: setup
	@scripts/build

demo: build
	@scripts/demo

test: build
	@scripts/test

test-gpu:
	@scripts/test-gpu $(if $(SANITIZE),--sanitize)

test-asan: setup
	@scripts/test-asan

lint:
	@scripts/lint

bench-gpu:
	@scripts/bench-gpu

bench: build
	@scripts/bench

clean:
	rm -rf build build-*
