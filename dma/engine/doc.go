// Package engine has what DMA engines of different makes share: where their addresses lie (Map), and how copies are
// dealt out to channels, each of which works on one chain at a time (Core). Below it one folder for each make.
//
// In the room: bus addresses as an engine's registers take them, chains, channels. Never in it: how the
// registers became accessible, interrupts beyond the end that the engine's owner passes in, rings,
// devices; when the processor copies (dma.Mover).
package engine
