# make demo   boots a Linux guest and shows it
# make test   runs every test
# Both get what they need by themselves, on Debian and Ubuntu with apt-get, and say what they install.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
GO ?= go
GOFLAGS_BUILD := -trimpath
TEST_FLAGS ?=
export CGO_ENABLED = 0

.DEFAULT_GOAL := build
.PHONY: build demo test check bench soak fixtures clean

build:
	$(GO) build $(GOFLAGS_BUILD) -o bin/ ./cmd/smartvm

demo: build
	$(GO) build $(GOFLAGS_BUILD) -o bin/ ./internal/tools/demo ./internal/tools/lab
	bin/demo

fixtures:
	@$(GO) run ./internal/tools/fixtures >/dev/null

# The race detector needs cgo.
test: fixtures
	CGO_ENABLED=1 $(GO) test -race -shuffle=on -timeout 30m $(TEST_FLAGS) ./...

# 500 cycles of start, kill and remove.
soak: fixtures
	SMARTVM_SOAK=500 $(GO) test -run Soak -v .

check:
	$(GO) vet ./...
	GOARCH=arm64 $(GO) vet ./...
	cd bench && $(GO) vet ./...
	$(GO) tool -modfile=tools/go.mod staticcheck ./...
	@unformatted=$$($(GO) tool -modfile=tools/go.mod gofumpt -l .); \
	  if [ -n "$$unformatted" ]; then echo "gofumpt would change:"; echo "$$unformatted"; exit 1; fi
	$(GO) mod tidy -diff
	$(GO) test -run 'House|Docs' .

bench: build fixtures
	cd bench && $(GO) run . -out results.json

clean:
	rm -rf bin bench/results.json
