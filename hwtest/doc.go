// Package hwtest runs whole links over PCI functions: in virtual machines here, on a real machine's board by
//
//	go test ./hwtest -board ivshmem:0000:00:04.0 -peer 10.1.0.2
//
// In the room: those tests. Below it what they stand on: vm (machines), guest (what runs in them), trial (both ends on
// one machine), traffic and remote (what crosses the link), netns, models (chips), ports (other
// architectures); and the benchmarks dmabench, ringbench, packetbench, doorbench and netbench, on benchkit.
package hwtest
