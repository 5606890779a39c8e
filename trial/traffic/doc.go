//go:build linux

// Package traffic shows that a link works: ICMP echo, TCP streams and small UDP packets between
// two endpoints, with every byte checked, and the same as long-lived traffic that lives through
// outages.
//
// In the room: senders, receivers, the patterns they check, counters, the summary of a run.
// Never in it: interfaces, addresses, routes, the link itself; a wish about speed (results are
// measured, never judged by their rate).
//
// What counts as corrupt: data that arrived and is not what was sent, at that place, in that
// stream; and packets that the kernel's own checksums refused in the namespaces of the two
// endpoints during the run (InCsumErrors of /proc/net/snmp), for these would else look like loss.
package traffic
