# boardlink. `make test` installs what it needs and checks everything; see `make help`.

GO ?= go
FUZZTIME ?= 30s
GOBENCH ?= .
BENCHTIME ?= 1s

# The tree may belong to another user (sudo make): no version control in what is only run.
RUNTESTS = $(GO) run -buildvcs=false ./internal/runtests

ARCHES = amd64 arm64 ppc64 ppc64le riscv64 386 arm

.PHONY: build test test-ports lint race fuzz bench gobench ports ports-ppc clean help

build: ## the program, static, as bin/boardlink
	CGO_ENABLED=0 $(GO) build -trimpath -o bin/boardlink ./cmd/boardlink

test: ## everything: set-up by apt, checks, tests, race, fuzzing, other machines; SUDO=1: tests as root
	@$(RUNTESTS) $(if $(SUDO),-sudo)

lint: ## gofmt, go vet, staticcheck, the rules of the house
	@$(RUNTESTS) -only gofmt,vet,lint,house

test-ports: ## other machines: builds, tests and links under emulators, with a table of the results
	@$(RUNTESTS) -only ports,foreign,cross $(if $(SUDO),-sudo)

race: ## the tests under the race detector
	@$(RUNTESTS) -only race $(if $(SUDO),-sudo)

fuzz: ## every fuzz target, FUZZTIME=30s each
	@$(RUNTESTS) -only fuzz -fuzztime $(FUZZTIME)

bench: ## what links, rings, doorbells and copies do here, in .cache/bench, within ten minutes
	@CGO_ENABLED=0 $(GO) build -trimpath -o bin/boardlink ./cmd/boardlink 2>/dev/null || \
		CGO_ENABLED=0 $(GO) build -buildvcs=false -trimpath -o bin/boardlink ./cmd/boardlink
	bin/boardlink bench all --dir .cache/bench $(if $(BENCH),--only $(BENCH))

gobench: ## every benchmark in Go's harness, GOBENCH=regexp BENCHTIME=1s
	$(GO) test -run '^$$' -bench '$(GOBENCH)' -benchtime $(BENCHTIME) ./...

ports: ## the program for every architecture, as bin/boardlink-ARCH
	@set -e; for a in $(ARCHES); do \
		echo "CGO_ENABLED=0 GOOS=linux GOARCH=$$a $(GO) build -trimpath -o bin/boardlink-$$a ./cmd/boardlink"; \
		CGO_ENABLED=0 GOOS=linux GOARCH=$$a $(GO) build -trimpath -o bin/boardlink-$$a ./cmd/boardlink; \
	done

# 64-bit PowerPC below POWER8 and 32-bit PowerPC, by gccgo: docs/ports.md.
GCCGO_VERSION ?= -12

ports-ppc: ## the lean programs for old PowerPC, by gccgo-12, as bin/boardlink-agent-ppc and so on
	@set -e; for t in powerpc:ppc powerpc64:ppc64; do c=$${t%:*}-linux-gnu; a=$${t#*:}; for p in agent host; do \
		echo "gccgo: bin/boardlink-$$p-$$a-gccgo"; \
		CGO_ENABLED=1 GOOS=linux GOARCH=$$a CC=$$c-gcc$(GCCGO_VERSION) GCCGO=$$c-gccgo$(GCCGO_VERSION) AR=$$c-ar $(GO) build -buildvcs=false \
			-compiler=gccgo -gccgoflags='-O2 -static' -modfile=internal/house/testdata/go118/go.mod \
			-o bin/boardlink-$$p-$$a-gccgo ./cmd/boardlink-$$p; \
	done; done

clean: ## remove what was built and the logs of the tests
	rm -rf bin .cache

help: ## this list
	@sed -n 's/^\([a-z-]*\): ## /\1\t/p' Makefile | while IFS="$$(printf '\t')" read -r t h; do printf '  make %-10s %s\n' "$$t" "$$h"; done
