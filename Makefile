# make demo   boots a Linux guest and runs CMD in it: make demo CMD='cat /etc/os-release'
# make test   runs every test
# make minimal  makes an image to try things with
# Both get what they need by themselves, on Debian and Ubuntu with apt-get, and say what they install.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
GO ?= go
# Without paths of this checkout, what is compiled in one serves the next.
export GOFLAGS := -trimpath
export CGO_ENABLED = 0

.DEFAULT_GOAL := build
.PHONY: build agent minimal demo test check bench soak fixtures clean

build: agent
	$(GO) build -o bin/ ./cmd/smartvm

# The guest's first program, which the others carry, each that of its own architecture. Without disablethp a kernel that gives
# everybody huge pages (khugepaged) makes 4 MiB resident of what Go has given back.
AGENTS := $(foreach arch,amd64 arm64,internal/agentbin/bin/$(arch)/smartvm-agent)
agent:
	@for agent in $(AGENTS); do \
	  GOARCH=$$(basename $$(dirname $$agent)) $(GO) build -ldflags='-s -w -X=runtime.godebugDefault=disablethp=1' -o $$agent ./cmd/smartvm-agent; done

demo: export CMD := $(CMD)
demo: build
	$(GO) build -o bin/ ./internal/tools/demo ./internal/tools/lab
	bin/demo

fixtures:
	@$(GO) run ./internal/tools/fixtures >/dev/null

# An image of a distribution's kernel and busybox, to try things with: smartvm run minimal
minimal: build
	@paths=$$($(GO) run ./internal/tools/fixtures guest-kernel guest-modules minimal | cut -d' ' -f2-); set -- $$paths; \
	  bin/smartvm image import --kernel "$$1" --modules "$$2" --rootfs "$$3" minimal

# TESTS are flags and packages of internal/tools/testrun: make test TESTS='-run Snapshot .'
TESTS ?=
test: agent fixtures
	$(GO) run ./internal/tools/testrun $(TESTS)

# 500 cycles of start, kill and remove.
soak: agent fixtures
	SMARTVM_SOAK=500 $(GO) test -run Soak -v .

check: agent
	$(GO) vet ./...
	GOARCH=arm64 $(GO) vet ./...
	GOARCH=arm64 $(GO) build -o /dev/null ./cmd/smartvm
	cd bench && $(GO) vet ./... && $(GO) test ./...
	$(GO) tool -modfile=tools/go.mod staticcheck ./...
	@unformatted=$$($(GO) tool -modfile=tools/go.mod gofumpt -l .); \
	  if [ -n "$$unformatted" ]; then echo "gofumpt would change:"; echo "$$unformatted"; exit 1; fi
	$(GO) mod tidy -diff
	$(GO) test -run 'House|Docs' .

bench: build fixtures
	cd bench && $(GO) run . -out results.json

clean:
	rm -rf bin bench/results.json bench/fctools/target $(AGENTS)
