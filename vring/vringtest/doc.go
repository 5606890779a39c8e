// Package vringtest builds virtqueues for tests: rigs of a driver side and a device
// side over one memory of any kind, and a model of a device's memory that counts.
//
// In the room: memories, the kinds of ring, rigs. Never in it: the tests themselves
// (package vring's own, which run one suite over all that is declared here).
package vringtest
