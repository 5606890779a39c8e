// Package app is what the programs have in common: how an end of a link is described and built.
//
// It must not know how a program prints, or which compiler it is for: boardlink, boardlink-host and
// boardlink-agent all import it.
package app
