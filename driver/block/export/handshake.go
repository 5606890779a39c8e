package export

import (
	"encoding/binary"
	"fmt"
	"io"
	"time"

	"github.com/boardlink/boardlink/driver/block"
	"github.com/boardlink/boardlink/nbd"
)

// maxOptions limits how many options a client may send.
const maxOptions = 64

// handshake is the fixed newstyle handshake. It returns nil when the transmission phase begins.
func (c *conn) handshake() error {
	var b [nbd.GreetingLen]byte
	binary.BigEndian.PutUint64(b[0:], nbd.MagicInit)
	binary.BigEndian.PutUint64(b[8:], nbd.MagicOption)
	binary.BigEndian.PutUint16(b[16:], nbd.FlagFixedNewstyle|nbd.FlagNoZeroes)
	if err := c.sock.write(b[:]); err != nil {
		return err
	}
	if err := c.sock.readFull(b[:4]); err != nil {
		return err
	}
	flags := binary.BigEndian.Uint32(b[:])
	if bad := flags &^ (nbd.ClientFixedNewstyle | nbd.ClientNoZeroes); bad != 0 {
		return fmt.Errorf("%w: the client sets the handshake flags %#x, which are not known", nbd.ErrProtocol, bad)
	}
	for i := 0; i < maxOptions; i++ {
		var head [nbd.OptionLen]byte
		if err := c.sock.readFull(head[:]); err != nil {
			return err
		}
		var o nbd.Option
		if err := o.Parse(head[:]); err != nil {
			return err
		}
		if o.Length > nbd.MaxOptionData {
			return fmt.Errorf("%w: option %d with %d bytes: at most %d go", nbd.ErrProtocol, o.Option, o.Length, nbd.MaxOptionData)
		}
		data := make([]byte, o.Length)
		if err := c.sock.readFull(data); err != nil {
			return err
		}
		begin, err := c.option(o.Option, data, flags&nbd.ClientNoZeroes != 0)
		if err != nil || begin {
			return err
		}
	}
	return fmt.Errorf("%w: the client sends more than %d options", nbd.ErrProtocol, maxOptions)
}

// answer sends the reply to an option.
func (c *conn) answer(option, kind uint32, data []byte) error {
	b := make([]byte, nbd.OptionReplyLen, nbd.OptionReplyLen+len(data))
	(&nbd.OptionReply{Option: option, Type: kind, Length: uint32(len(data))}).Put(b)
	return c.sock.write(append(b, data...))
}

// option acts on an option. begin tells that the transmission phase begins.
func (c *conn) option(option uint32, data []byte, noZeroes bool) (begin bool, err error) {
	switch option {
	case nbd.OptAbort:
		_ = c.answer(option, nbd.RepAck, nil) // the client need not wait for it
		return false, io.EOF
	case nbd.OptList:
		if len(data) != 0 {
			return false, c.answer(option, nbd.RepErrInvalid, []byte("LIST has no data"))
		}
		name := c.s.cfg.Name
		b := make([]byte, 4, 4+len(name))
		binary.BigEndian.PutUint32(b, uint32(len(name)))
		if err := c.answer(option, nbd.RepServer, append(b, name...)); err != nil {
			return false, err
		}
		return false, c.answer(option, nbd.RepAck, nil)
	case nbd.OptExportName:
		// This option has no way to say no.
		if !c.known(string(data)) {
			return false, fmt.Errorf("the client asks for the export %q: there is %q", data, c.s.cfg.Name)
		}
		info, ok := c.learn()
		if !ok {
			return false, errNotReady
		}
		b := make([]byte, 10, 10+nbd.ExportNamePad)
		binary.BigEndian.PutUint64(b, info.Size)
		binary.BigEndian.PutUint16(b[8:], flagsOf(info))
		if !noZeroes {
			b = b[:cap(b)]
		}
		return true, c.sock.write(b)
	case nbd.OptInfo, nbd.OptGo:
		g, err := nbd.ParseGo(data)
		if err != nil {
			return false, c.answer(option, nbd.RepErrInvalid, []byte(err.Error()))
		}
		if !c.known(g.Name) {
			return false, c.answer(option, nbd.RepErrUnknown, []byte(fmt.Sprintf("there is no export %q, but %q", g.Name, c.s.cfg.Name)))
		}
		info, ok := c.learn()
		if !ok {
			return false, c.answer(option, nbd.RepErrUnknown, []byte(errNotReady.Error()))
		}
		if err := c.answer(option, nbd.RepInfo, (&nbd.ExportInfo{Size: info.Size, Flags: flagsOf(info)}).Encode()); err != nil {
			return false, err
		}
		s := sizesOf(info)
		if err := c.answer(option, nbd.RepInfo, s.Encode()); err != nil {
			return false, err
		}
		return option == nbd.OptGo, c.answer(option, nbd.RepAck, nil)
	}
	return false, c.answer(option, nbd.RepErrUnsup, nil)
}

// errNotReady: there is no disk to be served yet.
var errNotReady = fmt.Errorf("the host has not offered the disk for %v", readyTime)

func (c *conn) known(name string) bool { return name == "" || name == c.s.cfg.Name }

// learn waits for the disk.
func (c *conn) learn() (block.Info, bool) {
	t := time.NewTimer(readyTime)
	defer t.Stop()
	select {
	case <-c.s.cfg.Disk.Ready():
	case <-t.C:
	case <-c.s.quit:
	}
	var ok bool
	c.info, ok = c.s.cfg.Disk.Info()
	return c.info, ok
}

// flagsOf returns the transmission flags of a disk. A flush covers what was written by any connection, and all of them see the same
// content.
func flagsOf(i block.Info) uint16 {
	f := nbd.HasFlags | nbd.SendFlush | nbd.SendFUA | nbd.CanMultiConn
	if i.ReadOnly {
		return f | nbd.ReadOnly
	}
	if i.Discard {
		f |= nbd.SendTrim
	}
	if i.WriteZeroes {
		f |= nbd.SendWriteZeroes
	}
	return f
}

// sizesOf returns what requests of a disk should be multiples of.
func sizesOf(i block.Info) nbd.BlockSize {
	s := nbd.BlockSize{Min: i.BlockSize, Preferred: 4096, Max: nbd.MaxPayload}
	if p := i.Preferred; p > s.Preferred && p <= s.Max && p&(p-1) == 0 {
		s.Preferred = p
	}
	if s.Preferred < s.Min {
		s.Preferred = s.Min
	}
	return s
}
