// Package host is the carrier's end of links: a Link for each board, with the devices that it offers, which
// control/msgdev serves to the agent.
//
// It must not know flags, printing or exit codes (cmd/), how a board is reached (board/), what a device is for
// (device/), or what rings look like (vring/).
package host
