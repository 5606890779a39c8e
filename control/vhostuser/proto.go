package vhostuser

import (
	"encoding/binary"
	"fmt"
	"unsafe"
)

// Request is the number of a front end's message (specification, "Front-end message types").
type Request uint32

// The requests that this back end knows, or names in its errors.
const (
	GetFeatures         Request = 1
	SetFeatures         Request = 2
	SetOwner            Request = 3
	ResetOwner          Request = 4
	SetMemTable         Request = 5
	SetLogBase          Request = 6
	SetLogFD            Request = 7
	SetVringNum         Request = 8
	SetVringAddr        Request = 9
	SetVringBase        Request = 10
	GetVringBase        Request = 11
	SetVringKick        Request = 12
	SetVringCall        Request = 13
	SetVringErr         Request = 14
	GetProtocolFeatures Request = 15
	SetProtocolFeatures Request = 16
	GetQueueNum         Request = 17
	SetVringEnable      Request = 18
	SendRARP            Request = 19
	NetSetMTU           Request = 20
	GetConfig           Request = 24
	SetConfig           Request = 25
	ResetDevice         Request = 34
	GetMaxMemSlots      Request = 36
	AddMemReg           Request = 37
	RemMemReg           Request = 38
	SetStatus           Request = 39
	GetStatus           Request = 40
)

var requestNames = map[Request]string{
	GetFeatures: "GET_FEATURES", SetFeatures: "SET_FEATURES", SetOwner: "SET_OWNER", ResetOwner: "RESET_OWNER",
	SetMemTable: "SET_MEM_TABLE", SetLogBase: "SET_LOG_BASE", SetLogFD: "SET_LOG_FD", SetVringNum: "SET_VRING_NUM",
	SetVringAddr: "SET_VRING_ADDR", SetVringBase: "SET_VRING_BASE", GetVringBase: "GET_VRING_BASE",
	SetVringKick: "SET_VRING_KICK", SetVringCall: "SET_VRING_CALL", SetVringErr: "SET_VRING_ERR",
	GetProtocolFeatures: "GET_PROTOCOL_FEATURES", SetProtocolFeatures: "SET_PROTOCOL_FEATURES", GetQueueNum: "GET_QUEUE_NUM",
	SetVringEnable: "SET_VRING_ENABLE", SendRARP: "SEND_RARP", NetSetMTU: "NET_SET_MTU", GetConfig: "GET_CONFIG",
	SetConfig: "SET_CONFIG", ResetDevice: "RESET_DEVICE", GetMaxMemSlots: "GET_MAX_MEM_SLOTS", AddMemReg: "ADD_MEM_REG",
	RemMemReg: "REM_MEM_REG", SetStatus: "SET_STATUS", GetStatus: "GET_STATUS",
}

// String returns the specification's name, without its prefix.
func (r Request) String() string {
	if s := requestNames[r]; s != "" {
		return s
	}
	return fmt.Sprintf("request %d", uint32(r))
}

// Protocol feature bits (specification, "Protocol features").
const (
	protoMQ           uint64 = 1 << 0
	protoLog          uint64 = 1 << 1 // LOG_SHMFD
	protoRARP         uint64 = 1 << 2
	protoReplyAck     uint64 = 1 << 3
	protoMTU          uint64 = 1 << 4
	protoConfig       uint64 = 1 << 9
	protoResetDevice  uint64 = 1 << 13
	protoMemSlots     uint64 = 1 << 15
	protoStatus       uint64 = 1 << 16
	featProtocol      uint64 = 1 << 30 // VHOST_USER_F_PROTOCOL_FEATURES, a virtio feature bit
	featLogAll        uint64 = 1 << 26 // VHOST_F_LOG_ALL, a virtio feature bit
	featureBlockBytes        = 8
)

var protoNames = [...]struct {
	bit  uint64
	name string
}{{protoMQ, "mq"}, {protoLog, "log_shmfd"}, {protoRARP, "rarp"}, {protoReplyAck, "reply_ack"}, {protoMTU, "mtu"}, {protoConfig, "config"},
	{protoResetDevice, "reset_device"}, {protoMemSlots, "mem_slots"}, {protoStatus, "status"}}

// The header (specification, "Header"): request, flags, payload size, each a 32-bit number. All
// numbers are in the machine's own byte order.
const (
	headerLen     = 12
	flagVersion   = 1      // the version, in bits 0 and 1
	versionMask   = 3      //
	flagReply     = 1 << 2 // the message is a reply
	flagNeedReply = 1 << 3 // REPLY_ACK: the front end waits for an acknowledgement
)

const (
	// maxPayload is the longest payload that is read, in bytes. The longest of a message that this
	// back end knows is that of GET_CONFIG: 12 + 256.
	maxPayload = 4096
	// maxFDs is how many descriptors a message may carry (specification, "Communication": at most
	// 8, those of SET_MEM_TABLE).
	maxFDs = 8
	// maxTable is how many regions SET_MEM_TABLE may name.
	maxTable = 8
	// maxSlots is how many regions there may be with CONFIGURE_MEM_SLOTS.
	maxSlots = 64
	// maxConfig is the longest piece of a configuration space in a message, in bytes.
	maxConfig = 256
	// noFD is the bit of SET_VRING_KICK, CALL and ERR that tells that no descriptor comes with it;
	// the queue's index is in the bits of indexMask.
	noFD      uint64 = 1 << 8
	indexMask uint64 = 0xff
)

// native is the machine's byte order.
var native = func() binary.ByteOrder {
	one := uint16(1)
	if *(*byte)(unsafe.Pointer(&one)) == 1 {
		return binary.LittleEndian
	}
	return binary.BigEndian
}()

// message is one message of a front end, with the descriptors that came with it. Whoever takes a
// descriptor out of fds sets its place to -1; close closes the others.
type message struct {
	req     Request
	flags   uint32
	payload []byte
	fds     []int
	closer  *closer // of fds
}

// needReply tells whether the front end waits for an acknowledgement.
func (m *message) needReply() bool { return m.flags&flagNeedReply != 0 }

// takeFD returns descriptor i, which is the caller's from then on; -1 where there is none.
func (m *message) takeFD(i int) int {
	if i >= len(m.fds) {
		return -1
	}
	fd := m.fds[i]
	m.fds[i] = -1
	return fd
}

// close closes the descriptors that nobody took, and returns their number.
func (m *message) close() (n int) {
	for _, fd := range m.fds {
		if fd >= 0 {
			m.closer.close(fd)
			n++
		}
	}
	m.fds = nil
	return n
}

// want checks the length of the payload.
func (m *message) want(n int) error {
	if len(m.payload) != n {
		return m.errorf(ErrLength, "a payload of %d bytes, %d are wanted", len(m.payload), n)
	}
	return nil
}

// errorf makes an error about the message.
func (m *message) errorf(code error, format string, args ...interface{}) error {
	return &Error{Request: m.req, Code: code, Detail: fmt.Sprintf(format, args...)}
}

// u64 reads a payload of one number.
func (m *message) u64() (uint64, error) {
	if err := m.want(8); err != nil {
		return 0, err
	}
	return native.Uint64(m.payload), nil
}

// vringState is the payload of SET_VRING_NUM, SET_VRING_BASE, GET_VRING_BASE and SET_VRING_ENABLE.
type vringState struct{ index, num uint32 }

func (m *message) vringState() (s vringState, err error) {
	if err := m.want(8); err != nil {
		return s, err
	}
	return vringState{native.Uint32(m.payload), native.Uint32(m.payload[4:])}, nil
}

func (s vringState) encode() []byte {
	b := make([]byte, 8)
	native.PutUint32(b, s.index)
	native.PutUint32(b[4:], s.num)
	return b
}

// vringAddr is the payload of SET_VRING_ADDR. desc, used and avail are addresses of the front end's
// process; for a packed ring avail is the driver area, used the device area.
type vringAddr struct {
	index, flags      uint32
	desc, used, avail uint64
	log               uint64 // guest physical address for the dirty log
}

const vringAddrLen = 40

func (m *message) vringAddr() (a vringAddr, err error) {
	if err := m.want(vringAddrLen); err != nil {
		return a, err
	}
	b := m.payload
	return vringAddr{index: native.Uint32(b), flags: native.Uint32(b[4:]), desc: native.Uint64(b[8:]), used: native.Uint64(b[16:]),
		avail: native.Uint64(b[24:]), log: native.Uint64(b[32:])}, nil
}

func (a vringAddr) encode() []byte {
	b := make([]byte, vringAddrLen)
	native.PutUint32(b, a.index)
	native.PutUint32(b[4:], a.flags)
	native.PutUint64(b[8:], a.desc)
	native.PutUint64(b[16:], a.used)
	native.PutUint64(b[24:], a.avail)
	native.PutUint64(b[32:], a.log)
	return b
}

const logLen = 16

// log reads SET_LOG_BASE: the size of the log in bytes, and its offset in the file.
func (m *message) log() (size, offset uint64, err error) {
	if err := m.want(logLen); err != nil {
		return 0, 0, err
	}
	return native.Uint64(m.payload), native.Uint64(m.payload[8:]), nil
}

// region describes one memory region: guest physical address, size, address in the front end's
// process, and offset in the file of its descriptor.
type region struct{ guest, size, user, offset uint64 }

const regionLen = 32

func decodeRegion(b []byte) region {
	return region{native.Uint64(b), native.Uint64(b[8:]), native.Uint64(b[16:]), native.Uint64(b[24:])}
}

func (r region) encode(b []byte) {
	native.PutUint64(b, r.guest)
	native.PutUint64(b[8:], r.size)
	native.PutUint64(b[16:], r.user)
	native.PutUint64(b[24:], r.offset)
}

// memTable reads SET_MEM_TABLE. Front ends may send room for all 8 regions.
func (m *message) memTable() ([]region, error) {
	if len(m.payload) < 8 {
		return nil, m.want(8)
	}
	n := native.Uint32(m.payload)
	if n > maxTable {
		return nil, m.errorf(ErrMemory, "%d regions, at most %d are possible", n, maxTable)
	}
	if need := 8 + int(n)*regionLen; len(m.payload) < need {
		return nil, m.errorf(ErrLength, "a payload of %d bytes, %d regions take %d", len(m.payload), n, need)
	}
	rs := make([]region, n)
	for i := range rs {
		rs[i] = decodeRegion(m.payload[8+i*regionLen:])
	}
	return rs, nil
}

// memRegion reads ADD_MEM_REG and REM_MEM_REG: 8 bytes of padding, and a region.
func (m *message) memRegion() (region, error) {
	if err := m.want(8 + regionLen); err != nil {
		return region{}, err
	}
	return decodeRegion(m.payload[8:]), nil
}

// config is the payload of GET_CONFIG and SET_CONFIG: offset, size, flags, and size bytes.
type config struct {
	offset, flags uint32
	data          []byte
}

const configHead = 12

func (m *message) config() (c config, err error) {
	if len(m.payload) < configHead {
		return c, m.errorf(ErrLength, "a payload of %d bytes, %d are wanted at least", len(m.payload), configHead)
	}
	size := native.Uint32(m.payload[4:])
	if size > maxConfig {
		return c, m.errorf(ErrLength, "%d bytes of configuration, at most %d are possible", size, maxConfig)
	}
	if err := m.want(configHead + int(size)); err != nil {
		return c, err
	}
	return config{native.Uint32(m.payload), native.Uint32(m.payload[8:]), m.payload[configHead:]}, nil
}

func (c config) encode() []byte {
	b := make([]byte, configHead, configHead+len(c.data))
	native.PutUint32(b, c.offset)
	native.PutUint32(b[4:], uint32(len(c.data)))
	native.PutUint32(b[8:], c.flags)
	return append(b, c.data...)
}

func encodeU64(v uint64) []byte {
	b := make([]byte, 8)
	native.PutUint64(b, v)
	return b
}

// encodeReply makes the answer to a request.
func encodeReply(r Request, payload []byte) []byte {
	return encodeMessage(r, flagVersion|flagReply, payload)
}

func encodeMessage(r Request, flags uint32, payload []byte) []byte {
	b := make([]byte, headerLen, headerLen+len(payload))
	native.PutUint32(b, uint32(r))
	native.PutUint32(b[4:], flags)
	native.PutUint32(b[8:], uint32(len(payload)))
	return append(b, payload...)
}
