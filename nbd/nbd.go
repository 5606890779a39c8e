// Package nbd has the numbers and the messages of the network block device protocol: the fixed newstyle handshake, and the
// transmission phase with simple replies (https://github.com/NetworkBlockDevice/nbd, doc/proto.md).
//
// It must not know sockets or disks: who sends and receives is elsewhere. All numbers of the protocol are big-endian.
package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Magic numbers.
const (
	MagicInit     uint64 = 0x4e42444d41474943 // "NBDMAGIC": what a server begins with
	MagicOption   uint64 = 0x49484156454f5054 // "IHAVEOPT": the newstyle handshake, and each option
	MagicReply    uint64 = 0x3e889045565a9    // the reply to an option
	MagicRequest  uint32 = 0x25609513
	MagicSimple   uint32 = 0x67446698 // a simple reply
	MagicChunk    uint32 = 0x668e33ef // a chunk of a structured reply
	MagicOldstyle uint64 = 0x00420281861253
)

// Handshake flags of the server, and those that a client answers with.
const (
	FlagFixedNewstyle uint16 = 1 << 0
	FlagNoZeroes      uint16 = 1 << 1

	ClientFixedNewstyle uint32 = 1 << 0
	ClientNoZeroes      uint32 = 1 << 1
)

// Options of a client.
const (
	OptExportName      uint32 = 1
	OptAbort           uint32 = 2
	OptList            uint32 = 3
	OptStartTLS        uint32 = 5
	OptInfo            uint32 = 6
	OptGo              uint32 = 7
	OptStructuredReply uint32 = 8
	OptListMetaContext uint32 = 9
	OptSetMetaContext  uint32 = 10
)

// Replies to options. Errors have the highest bit.
const (
	RepAck    uint32 = 1
	RepServer uint32 = 2
	RepInfo   uint32 = 3

	RepErrUnsup         uint32 = 1<<31 + 1
	RepErrPolicy        uint32 = 1<<31 + 2
	RepErrInvalid       uint32 = 1<<31 + 3
	RepErrPlatform      uint32 = 1<<31 + 4
	RepErrTLSReqd       uint32 = 1<<31 + 5
	RepErrUnknown       uint32 = 1<<31 + 6
	RepErrShutdown      uint32 = 1<<31 + 7
	RepErrBlockSizeReqd uint32 = 1<<31 + 8
	RepErrTooBig        uint32 = 1<<31 + 9
)

// Information items of RepInfo.
const (
	InfoExport      uint16 = 0 // size and transmission flags
	InfoName        uint16 = 1
	InfoDescription uint16 = 2
	InfoBlockSize   uint16 = 3 // minimum, preferred and maximum
)

// Transmission flags of an export.
const (
	HasFlags        uint16 = 1 << 0
	ReadOnly        uint16 = 1 << 1
	SendFlush       uint16 = 1 << 2
	SendFUA         uint16 = 1 << 3
	Rotational      uint16 = 1 << 4
	SendTrim        uint16 = 1 << 5
	SendWriteZeroes uint16 = 1 << 6
	SendDF          uint16 = 1 << 7
	CanMultiConn    uint16 = 1 << 8
	SendResize      uint16 = 1 << 9
	SendCache       uint16 = 1 << 10
	SendFastZero    uint16 = 1 << 11
)

// Commands.
const (
	CmdRead        uint16 = 0
	CmdWrite       uint16 = 1
	CmdDisc        uint16 = 2
	CmdFlush       uint16 = 3
	CmdTrim        uint16 = 4
	CmdCache       uint16 = 5
	CmdWriteZeroes uint16 = 6
	CmdBlockStatus uint16 = 7
)

// Flags of commands.
const (
	CmdFlagFUA      uint16 = 1 << 0
	CmdFlagNoHole   uint16 = 1 << 1
	CmdFlagDF       uint16 = 1 << 2
	CmdFlagReqOne   uint16 = 1 << 3
	CmdFlagFastZero uint16 = 1 << 4
)

// Errors in replies.
const (
	EPERM     uint32 = 1
	EIO       uint32 = 5
	ENOMEM    uint32 = 12
	EINVAL    uint32 = 22
	ENOSPC    uint32 = 28
	EOVERFLOW uint32 = 75
	ENOTSUP   uint32 = 95
	ESHUTDOWN uint32 = 108
)

// Lengths in bytes, and bounds.
const (
	GreetingLen     = 18 // MagicInit, MagicOption, handshake flags
	OptionLen       = 16 // header of an option
	OptionReplyLen  = 20 // header of its reply
	RequestLen      = 28
	SimpleReplyLen  = 16
	ExportNamePad   = 124     // zeros behind the answer to OptExportName, unless both sides set NoZeroes
	MaxName         = 4096    // bytes of an export's name
	MaxPayload      = 1 << 25 // bytes that a server has to take in one request
	MaxOptionData   = 1 << 16 // bytes of an option or of its reply that this package's users take
	BlockSizeLen    = 14      // an InfoBlockSize item
	ExportInfoLen   = 12      // an InfoExport item
	MaxInfoRequests = 64      // information items that a client asks for in one option
)

// ErrProtocol: the other side does not keep to the protocol. The connection is to be closed.
var ErrProtocol = errors.New("breaks the NBD protocol")

// Request is a command of the transmission phase. A CmdWrite is followed by Length bytes of data.
type Request struct {
	Flags  uint16
	Type   uint16
	Cookie uint64 // comes back in the reply
	Offset uint64 // bytes
	Length uint32 // bytes
}

// Put writes the request to b, of at least RequestLen bytes.
func (r *Request) Put(b []byte) {
	binary.BigEndian.PutUint32(b[0:], MagicRequest)
	binary.BigEndian.PutUint16(b[4:], r.Flags)
	binary.BigEndian.PutUint16(b[6:], r.Type)
	binary.BigEndian.PutUint64(b[8:], r.Cookie)
	binary.BigEndian.PutUint64(b[16:], r.Offset)
	binary.BigEndian.PutUint32(b[24:], r.Length)
}

// Parse reads a request from b, of at least RequestLen bytes. The error matches ErrProtocol.
func (r *Request) Parse(b []byte) error {
	if m := binary.BigEndian.Uint32(b); m != MagicRequest {
		return fmt.Errorf("%w: a request begins with %#x, want %#x", ErrProtocol, m, MagicRequest)
	}
	r.Flags, r.Type = binary.BigEndian.Uint16(b[4:]), binary.BigEndian.Uint16(b[6:])
	r.Cookie, r.Offset, r.Length = binary.BigEndian.Uint64(b[8:]), binary.BigEndian.Uint64(b[16:]), binary.BigEndian.Uint32(b[24:])
	return nil
}

// SimpleReply is the reply to a request. That to a CmdRead without an error is followed by the data.
type SimpleReply struct {
	Error  uint32
	Cookie uint64
}

// Put writes the reply to b, of at least SimpleReplyLen bytes.
func (r *SimpleReply) Put(b []byte) {
	binary.BigEndian.PutUint32(b[0:], MagicSimple)
	binary.BigEndian.PutUint32(b[4:], r.Error)
	binary.BigEndian.PutUint64(b[8:], r.Cookie)
}

// Parse reads a reply from b, of at least SimpleReplyLen bytes. The error matches ErrProtocol.
func (r *SimpleReply) Parse(b []byte) error {
	if m := binary.BigEndian.Uint32(b); m != MagicSimple {
		return fmt.Errorf("%w: a reply begins with %#x, want %#x", ErrProtocol, m, MagicSimple)
	}
	r.Error, r.Cookie = binary.BigEndian.Uint32(b[4:]), binary.BigEndian.Uint64(b[8:])
	return nil
}

// Option is the header of an option. Length bytes of data follow.
type Option struct {
	Option uint32
	Length uint32
}

// Put writes the header to b, of at least OptionLen bytes.
func (o *Option) Put(b []byte) {
	binary.BigEndian.PutUint64(b[0:], MagicOption)
	binary.BigEndian.PutUint32(b[8:], o.Option)
	binary.BigEndian.PutUint32(b[12:], o.Length)
}

// Parse reads a header from b, of at least OptionLen bytes. The error matches ErrProtocol; it does not bound Length.
func (o *Option) Parse(b []byte) error {
	if m := binary.BigEndian.Uint64(b); m != MagicOption {
		return fmt.Errorf("%w: an option begins with %#x, want %#x", ErrProtocol, m, MagicOption)
	}
	o.Option, o.Length = binary.BigEndian.Uint32(b[8:]), binary.BigEndian.Uint32(b[12:])
	return nil
}

// OptionReply is the header of a reply to an option. Length bytes of data follow.
type OptionReply struct {
	Option uint32
	Type   uint32 // a Rep value
	Length uint32
}

// Put writes the header to b, of at least OptionReplyLen bytes.
func (o *OptionReply) Put(b []byte) {
	binary.BigEndian.PutUint64(b[0:], MagicReply)
	binary.BigEndian.PutUint32(b[8:], o.Option)
	binary.BigEndian.PutUint32(b[12:], o.Type)
	binary.BigEndian.PutUint32(b[16:], o.Length)
}

// Parse reads a header from b, of at least OptionReplyLen bytes. The error matches ErrProtocol; it does not bound Length.
func (o *OptionReply) Parse(b []byte) error {
	if m := binary.BigEndian.Uint64(b); m != MagicReply {
		return fmt.Errorf("%w: the reply to an option begins with %#x, want %#x", ErrProtocol, m, MagicReply)
	}
	o.Option, o.Type, o.Length = binary.BigEndian.Uint32(b[8:]), binary.BigEndian.Uint32(b[12:]), binary.BigEndian.Uint32(b[16:])
	return nil
}

// Go is the data of OptGo and OptInfo.
type Go struct {
	Name  string
	Infos []uint16 // what the client asks for besides InfoExport
}

// Encode returns the data of the option.
func (g *Go) Encode() []byte {
	b := make([]byte, 4+len(g.Name)+2+2*len(g.Infos))
	binary.BigEndian.PutUint32(b, uint32(len(g.Name)))
	n := 4 + copy(b[4:], g.Name)
	binary.BigEndian.PutUint16(b[n:], uint16(len(g.Infos)))
	for i, v := range g.Infos {
		binary.BigEndian.PutUint16(b[n+2+2*i:], v)
	}
	return b
}

// ParseGo reads the data of OptGo or OptInfo, all of it. The error matches ErrProtocol and is to be answered by RepErrInvalid.
func ParseGo(b []byte) (g Go, err error) {
	if len(b) < 6 {
		return g, fmt.Errorf("%w: an option GO or INFO of %d bytes, want 6 at least", ErrProtocol, len(b))
	}
	name := uint64(binary.BigEndian.Uint32(b))
	if name > MaxName || name > uint64(len(b)-6) {
		return g, fmt.Errorf("%w: an option GO or INFO of %d bytes with a name of %d (at most %d)", ErrProtocol, len(b), name, MaxName)
	}
	g.Name = string(b[4 : 4+name])
	b = b[4+name:]
	n := int(binary.BigEndian.Uint16(b))
	if len(b)-2 != 2*n || n > MaxInfoRequests {
		return g, fmt.Errorf("%w: an option GO or INFO asks for %d items (at most %d) in %d bytes", ErrProtocol, n, MaxInfoRequests, len(b)-2)
	}
	for i := 0; i < n; i++ {
		g.Infos = append(g.Infos, binary.BigEndian.Uint16(b[2+2*i:]))
	}
	return g, nil
}

// ExportInfo is the InfoExport item.
type ExportInfo struct {
	Size  uint64 // bytes
	Flags uint16 // HasFlags and others
}

// Encode returns the item.
func (e *ExportInfo) Encode() []byte {
	b := make([]byte, ExportInfoLen)
	binary.BigEndian.PutUint16(b, InfoExport)
	binary.BigEndian.PutUint64(b[2:], e.Size)
	binary.BigEndian.PutUint16(b[10:], e.Flags)
	return b
}

// BlockSize is the InfoBlockSize item, in bytes.
type BlockSize struct {
	Min, Preferred, Max uint32
}

// Encode returns the item.
func (s *BlockSize) Encode() []byte {
	b := make([]byte, BlockSizeLen)
	binary.BigEndian.PutUint16(b, InfoBlockSize)
	binary.BigEndian.PutUint32(b[2:], s.Min)
	binary.BigEndian.PutUint32(b[6:], s.Preferred)
	binary.BigEndian.PutUint32(b[10:], s.Max)
	return b
}

// ParseInfo reads an item of RepInfo: an ExportInfo, a BlockSize, or neither where it is of another type. The error matches
// ErrProtocol.
func ParseInfo(b []byte) (e *ExportInfo, s *BlockSize, err error) {
	if len(b) < 2 {
		return nil, nil, fmt.Errorf("%w: an information item of %d bytes", ErrProtocol, len(b))
	}
	switch t := binary.BigEndian.Uint16(b); {
	case t == InfoExport && len(b) == ExportInfoLen:
		return &ExportInfo{Size: binary.BigEndian.Uint64(b[2:]), Flags: binary.BigEndian.Uint16(b[10:])}, nil, nil
	case t == InfoBlockSize && len(b) == BlockSizeLen:
		return nil, &BlockSize{binary.BigEndian.Uint32(b[2:]), binary.BigEndian.Uint32(b[6:]), binary.BigEndian.Uint32(b[10:])}, nil
	case t == InfoExport || t == InfoBlockSize:
		return nil, nil, fmt.Errorf("%w: an information item of type %d with %d bytes", ErrProtocol, t, len(b))
	}
	return nil, nil, nil
}

// Errno returns the error of a reply as one of the system; nil for 0. A number that the protocol does not have counts as EINVAL, as
// the protocol says.
func Errno(e uint32) error {
	switch e {
	case 0:
		return nil
	case EPERM:
		return unix.EPERM
	case EIO:
		return unix.EIO
	case ENOMEM:
		return unix.ENOMEM
	case ENOSPC:
		return unix.ENOSPC
	case EOVERFLOW:
		return unix.EOVERFLOW
	case ENOTSUP:
		return unix.EOPNOTSUPP
	case ESHUTDOWN:
		return unix.ESHUTDOWN
	}
	return unix.EINVAL
}

// ErrorOf returns the error of a reply that stands for err; 0 for nil, EIO for what the protocol has no number for.
func ErrorOf(err error) uint32 {
	if err == nil {
		return 0
	}
	for _, e := range [...]struct {
		errno error
		reply uint32
	}{{unix.EPERM, EPERM}, {unix.EROFS, EPERM}, {unix.EACCES, EPERM}, {unix.ENOMEM, ENOMEM}, {unix.EINVAL, EINVAL}, {unix.ENOSPC, ENOSPC},
		{unix.EDQUOT, ENOSPC}, {unix.EFBIG, ENOSPC}, {unix.EOVERFLOW, EOVERFLOW}, {unix.EOPNOTSUPP, ENOTSUP}, {unix.ESHUTDOWN, ESHUTDOWN}} {
		if errors.Is(err, e.errno) {
			return e.reply
		}
	}
	return EIO
}
