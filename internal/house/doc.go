// Package house enforces the rules of the house (docs/architecture.md) as tests: which
// package may import which, what the packages below cmd may use of Go and of
// other modules, documentation of what is exported, what may stand in the tree.
//
// In the room: tests only, and the checkers they are made of, each shown to bite on a small bad
// source. Never in it: anything that a program imports.
package house
