# boardlink. `make test` installs what it needs and checks everything; see `make help`.

GO ?= go
FUZZTIME ?= 30s
BENCH ?= .
BENCHTIME ?= 1s

# The tree may belong to another user (sudo make): no version control in what is only run.
RUNTESTS = $(GO) run -buildvcs=false ./internal/runtests

ARCHES = amd64 arm64 ppc64 ppc64le riscv64 386 arm

.PHONY: build test lint race fuzz bench ports clean help

build: ## the program, static, as bin/boardlink
	CGO_ENABLED=0 $(GO) build -trimpath -o bin/boardlink ./cmd/boardlink

test: ## everything: set-up by apt, checks, tests, race, fuzzing, other machines; SUDO=1: tests as root
	@$(RUNTESTS) $(if $(SUDO),-sudo)

lint: ## gofmt, go vet, staticcheck, the rules of the house
	@$(RUNTESTS) -only gofmt,vet,lint,house

race: ## the tests under the race detector
	@$(RUNTESTS) -only race $(if $(SUDO),-sudo)

fuzz: ## every fuzz target, FUZZTIME=30s each
	@$(RUNTESTS) -only fuzz -fuzztime $(FUZZTIME)

bench: ## every benchmark, BENCH=regexp BENCHTIME=1s
	$(GO) test -run '^$$' -bench '$(BENCH)' -benchtime $(BENCHTIME) ./...

ports: ## the program for every architecture, as bin/boardlink-ARCH
	@set -e; for a in $(ARCHES); do \
		echo "CGO_ENABLED=0 GOOS=linux GOARCH=$$a $(GO) build -trimpath -o bin/boardlink-$$a ./cmd/boardlink"; \
		CGO_ENABLED=0 GOOS=linux GOARCH=$$a $(GO) build -trimpath -o bin/boardlink-$$a ./cmd/boardlink; \
	done

clean: ## remove what was built and the logs of the tests
	rm -rf bin .cache

help: ## this list
	@sed -n 's/^\([a-z]*\): ## /\1\t/p' Makefile | while IFS="$$(printf '\t')" read -r t h; do printf '  make %-8s %s\n' "$$t" "$$h"; done
