// Command boardlink-agent is the board's end as a lean program: what `boardlink agent` does, with the same flags, in Go 1.18
// without generics and with the standard library only, so that gccgo compiles it for 32-bit PowerPC and
// for 64-bit PowerPC below POWER8 (docs/ports.md).
package main

import (
	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/cmd/internal/lean"
)

func main() { lean.Main(board.Agent) }
