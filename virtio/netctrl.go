package virtio

import (
	"fmt"
	"strconv"
)

// Commands of a network device's control queue (virtio 1.2, 5.1.6.5): class, command, data, all of it readable; then the
// device's acknowledgement, one byte.
const (
	NetCtrlMQ         uint8 = 4 // class VIRTIO_NET_CTRL_MQ
	NetCtrlMQPairsSet uint8 = 0 // its command VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET: le16 pairs in use

	NetCtrlOK  uint8 = 0 // VIRTIO_NET_OK
	NetCtrlErr uint8 = 1 // VIRTIO_NET_ERR
)

// NetPairsMax is the largest number of queue pairs that a device may have (virtio 1.2, 5.1.6.5.5).
const NetPairsMax = 0x8000

// NetCtrlPairsLen is the length in bytes of the command that EncodeNetCtrlPairs makes.
const NetCtrlPairsLen = 4

// EncodeNetCtrlPairs returns the command that puts so many queue pairs into use, 1 to NetPairsMax.
func EncodeNetCtrlPairs(pairs uint16) [NetCtrlPairsLen]byte {
	return [NetCtrlPairsLen]byte{NetCtrlMQ, NetCtrlMQPairsSet, byte(pairs), byte(pairs >> 8)}
}

// DecodeNetCtrlPairs reads the command that a driver sent, which has length bytes of which b are the
// first. max is the device's number of queue pairs. An error says what is wrong: it is another command, or
// not one that a driver may send; it is to be answered by NetCtrlErr.
func DecodeNetCtrlPairs(b []byte, length uint32, max int) (int, error) {
	if len(b) < 2 || length < 2 {
		return 0, fmt.Errorf("a command of %d bytes: class and command need 2", length)
	}
	if b[0] != NetCtrlMQ || b[1] != NetCtrlMQPairsSet {
		return 0, fmt.Errorf("command %d of class %d is not known", b[1], b[0])
	}
	if len(b) < NetCtrlPairsLen || length != NetCtrlPairsLen {
		return 0, fmt.Errorf("VQ_PAIRS_SET of %d bytes: it has %d", length, NetCtrlPairsLen)
	}
	n := int(b[2]) | int(b[3])<<8
	if n < 1 || n > max {
		return 0, fmt.Errorf("VQ_PAIRS_SET %d: there are %d queue pairs", n, max)
	}
	return n, nil
}

// Numbers of a network device's virtqueues (virtio 1.2, 5.1.2): receiveq1 0, transmitq1 1, receiveq2 2 ..., and the
// control queue behind those of as many pairs as the device has, or of one where VIRTIO_NET_F_MQ is not negotiated.

// NetQueueRX returns the number of the receive queue of a pair, from 0.
func NetQueueRX(pair int) int { return 2 * pair }

// NetQueueTX returns the number of the transmit queue of a pair, from 0.
func NetQueueTX(pair int) int { return 2*pair + 1 }

// NetQueueCtrl returns the number of the control queue behind so many pairs.
func NetQueueCtrl(pairs int) int { return 2 * pairs }

// NetQueueName returns the name of a queue of a device with so many pairs, as errors and status show it: "rx0", "tx0", "rx1",
// ..., "ctrl".
func NetQueueName(queue, pairs int) string {
	switch {
	case queue == NetQueueCtrl(pairs):
		return "ctrl"
	case queue%2 == 0:
		return "rx" + strconv.Itoa(queue/2)
	}
	return "tx" + strconv.Itoa(queue/2)
}
