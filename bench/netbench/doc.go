//go:build linux

// Package netbench measures what joins two network namespaces: boardlink's two processes, and beside them, in turns, the
// limits and the rival: veth, one process that copies between two taps, two processes with a socket between them.
//
// In the room: the paths, from interfaces to processes, the traffic that loads them, what is measured around it, ratios. Never in it:
// flags, printing (cmd/boardlink), how boardlink's ends are started (package trial), checks of every
// byte (package traffic; Config.Verified uses it).
//
// One process and two processes are measuring sticks: as fast as one would write them in Go, with the
// same offloads as boardlink's interfaces, and no part of the product.
package netbench
