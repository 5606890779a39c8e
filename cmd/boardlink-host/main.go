// Command boardlink-host is the carrier's end as a lean program: what `boardlink host` does, with the same flags, in Go 1.18
// without generics and with the standard library only, so that gccgo compiles it for embedded PowerPC
// carriers (docs/ports.md).
package main

import (
	"github.com/boardlink/boardlink/board"
	"github.com/boardlink/boardlink/cmd/internal/lean"
)

func main() { lean.Main(board.Host) }
