package main

import (
	"bytes"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/boardlink/boardlink/board/loopback"
	"github.com/boardlink/boardlink/trial/netns/netnstest"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// One bad input: one line that names it, status 2 where the user is at fault, nothing left behind.
type badInput struct {
	name   string
	args   string // $D is the box's directory; split at spaces
	how    string // of become
	status int    // 0 means 2
	want   string // in the line
	setup  func(t *testing.T, b *box)
}

func (c badInput) run(t *testing.T) {
	b := newBox(t)
	if c.setup != nil {
		c.setup(t, b)
	}
	var args []string
	for _, a := range strings.Fields(c.args) {
		if a == "''" {
			a = ""
		}
		args = append(args, strings.ReplaceAll(a, "$D", b.dir))
	}
	status, stdout, stderr := b.run(c.how, args...)
	if c.status == 0 {
		c.status = 2
	}
	if status != c.status {
		t.Errorf("exit status %d, want %d", status, c.status)
	}
	if stdout != "" {
		t.Errorf("standard output: %q", stdout)
	}
	if strings.Count(stderr, "\n") != 1 || !strings.HasSuffix(stderr, "\n") {
		t.Errorf("standard error is not one line:\n%s", stderr)
	}
	line := strings.ReplaceAll(stderr, b.dir, "$D")
	if !strings.HasPrefix(line, "boardlink") || !strings.Contains(line, c.want) {
		t.Errorf("%q does not tell of %q", line, c.want)
	}
	if len(line) > 350 {
		t.Errorf("a line of %d characters: %s", len(line), line)
	}
	for _, raw := range []string{"strconv.", "netip.", "panic", "0x0,", "%!", "<path>:"} {
		if strings.Contains(line, raw) {
			t.Errorf("%q in the line: %s", raw, line)
		}
	}
	t.Log(strings.TrimSpace(line))
}

// link makes an interface in the box.
func link(l netlink.Link) func(*testing.T, *box) {
	return func(t *testing.T, b *box) {
		t.Helper()
		err := b.ns.Do(func() error {
			h, err := netlink.NewHandle()
			if err != nil {
				return err
			}
			defer h.Close()
			return h.LinkAdd(l)
		})
		if err != nil {
			t.Fatal(err)
		}
		b.ifcs = append(b.ifcs, l.Attrs().Name)
		if v, ok := l.(*netlink.Veth); ok {
			b.ifcs = append(b.ifcs, v.PeerName)
		}
	}
}

// serve serves a board in the test itself.
func serve(t *testing.T, b *box, name string) {
	t.Helper()
	s, err := loopback.NewServer(loopback.ServerConfig{Path: b.path(name), Size: 1 << 20, Vectors: 4})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve() }()
	t.Cleanup(func() {
		s.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// foreign serves a socket that is no ivshmem server: it answers with these bytes, and is silent then.
func foreign(answer string, hangUp bool) func(*testing.T, *box) {
	return func(t *testing.T, b *box) {
		t.Helper()
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: b.own("s")})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		done := make(chan struct{})
		go func() {
			defer close(done)
			var cs []net.Conn
			for {
				c, err := l.Accept()
				if err != nil {
					for _, c := range cs {
						c.Close()
					}
					return
				}
				c.Write([]byte(answer))
				if hangUp {
					c.Close()
				}
				cs = append(cs, c)
			}
		}()
		t.Cleanup(func() { l.Close(); <-done })
	}
}

func TestBadInput(t *testing.T) {
	netnstest.Need(t)
	const h = "host --status none --board loopback:$D/s "
	const a = "agent --status none --board loopback:$D/s "
	long := strings.Repeat("x", 120)
	file := func(t *testing.T, b *box) {
		if err := os.WriteFile(b.own("s"), []byte("precious"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	busy := func(t *testing.T, b *box) {
		p := b.start(nil, "", "host", "--board", "loopback:"+b.path("other"), "-i", "bl0", "--status", "none")
		until(t, 5*time.Second, "a first program", func() bool { return strings.Contains(p.err.String(), "waiting for the board") })
		t.Cleanup(func() { p.end(unix.SIGTERM, 5*time.Second) })
		b.ifcs = append(b.ifcs, "bl0")
		t.Cleanup(func() { p.end(unix.SIGTERM, 5*time.Second); b.ifcs = []string{"lo"} })
	}
	for _, c := range []badInput{
		{name: "command", args: "bogus", want: "bogus"},
		{name: "flag", args: "host --bogus", want: "--bogus"},
		{name: "no board", args: "host", want: "--board"},
		{name: "board spec", args: "host --status none --board bogus", want: "loopback"},
		{name: "board kind", args: "agent --status none --board bogus:/x", want: "loopback"},
		{name: "board path missing", args: "host --status none --board loopback:", want: "path"},
		{name: "board path long", args: "host --status none --board loopback:/" + long, want: "107"},
		{name: "vhost-user option", args: "host --status none --board vhost-user:/x,server", want: "mode=0660"},
		{name: "vhost-user option of an agent", args: "agent --status none --board vhost-user:/x,queues=2", want: "PATH[,server][,mode=0660]"},
		{name: "vhost-user placement", args: "agent --status none --board vhost-user:/x --placement push", want: "--placement push: not with a vhost-user back end"},
		{name: "vhost-user with two devices", args: "host --status none --board vhost-user:/x --net name=a --net name=b", want: "--board of its own"},
		{name: "vhost-user with a tun", args: "host --status none --board vhost-user:/x --link tun", want: "tap"},
		{name: "vhost-user with a disk and a network", args: "host --status none --board vhost-user:/x --disk name=a,file=/none --net name=b", want: "--board of its own"},
		{name: "vhost-user with a disk and entropy", args: "host --status none --board vhost-user:/x --disk name=a,file=/none --rng=board=0", want: "2 devices: there is one for each socket"},
		{name: "vhost-user with entropy", args: "host --status none --board vhost-user:/x --rng", want: "board=N makes it the source of entropy"},
		{name: "vhost-user queues of a disk", args: "host --status none --board vhost-user:/x,queues=2 --disk name=a,file=/none", want: "queues= is for networks"},
		{name: "vhost-user at a file", args: "host --status none --board vhost-user:/proc/version", want: "is not a socket"},
		{name: "board is a file", args: h, want: "not a socket", setup: file},
		{name: "board is a directory", args: "agent --status none --board loopback:$D", want: "not a socket"},
		{name: "board fd", args: "host --status none --board loopback:fd=99", want: "fd=99"},
		{name: "board fd number", args: "host --status none --board loopback:fd=x", want: "number"},
		{name: "a mail server", args: h, want: "not an ivshmem server", setup: foreign("220 mail ESMTP\r\n", false)},
		{name: "another protocol version", args: a, want: "version", setup: foreign("\x07\x00\x00\x00\x00\x00\x00\x00", false)},
		{name: "side taken", args: a, want: "process", setup: func(t *testing.T, b *box) {
			serve(t, b, "s")
			p := b.start(nil, "", "agent", "--board", "loopback:"+b.path("s"), "-i", "bl0", "--status", "none")
			until(t, 5*time.Second, "a first agent", func() bool { return strings.Contains(p.err.String(), "board opened") })
			b.ifcs = append(b.ifcs, "bl0")
			t.Cleanup(func() { p.end(unix.SIGTERM, 5*time.Second); b.ifcs = []string{"lo"} })
		}},

		{name: "interface is a veth", args: h + "-i v0", want: "v0", setup: link(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "v0"}, PeerName: "v1"})},
		{name: "interface is lo", args: a + "-i lo", want: "already"},
		{name: "interface is a tun", args: h + "-i t0", want: "tun", setup: link(&netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "t0"}, Mode: netlink.TUNTAP_MODE_TUN})},
		{name: "interface is a tap", args: a + "-i t0 --link tun", want: "tap", setup: link(&netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "t0"}, Mode: netlink.TUNTAP_MODE_TAP})},
		{name: "interface is busy", args: a + "-i bl0", want: "another process", setup: busy},
		{name: "second interface is busy", args: a + "--net name=bl1 --net name=bl0", want: "another process", setup: busy},
		{name: "interface name long", args: h + "-i sixteencharacter", want: "15"},
		{name: "interface name", args: h + "-i a/b", want: "'/'"},
		{name: "no tun device", args: h, how: "notun", want: "/dev/net/tun"},
		{name: "no tun device, plain", args: a + "--no-offload", how: "notun", want: "/dev/net/tun"},
		{name: "no tun device, loopback", args: "loopback", how: "notun", want: "/dev/net/tun"},
		{name: "no capability", args: h, how: "nonetadmin", want: "CAP_NET_ADMIN"},
		{name: "no capability, agent", args: a, how: "nonetadmin", want: "CAP_NET_ADMIN"},
		{name: "no capability, plain", args: a + "--no-offload", how: "nonetadmin", want: "CAP_NET_ADMIN"},
		{name: "no rights", args: h, how: "tun=0600 nobody", want: "/dev/net/tun"},
		{name: "no rights, loopback", args: "loopback", how: "tun=0600 nobody", want: "/dev/net/tun"},
		{name: "no rights but for the device", args: h, how: "tun=0666 nobody", want: "CAP_NET_ADMIN"},

		{name: "address", args: h + "--addr 10.0.0.1", want: "10.0.0.1/24"},
		{name: "address of nobody", args: h + "--addr 224.0.0.1/4", want: "224.0.0.1/4"},
		{name: "second address", args: h + "--addr 10.0.0.1/24 --addr 0.0.0.0/8", want: "0.0.0.0/8"},
		{name: "IPv6 address and a small MTU", args: h + "--addr fd00::1/64 --mtu 1000", want: "1280"},
		{name: "MTU small", args: h + "--mtu 67", want: "68"},
		{name: "MTU large", args: a + "--mtu 65522", want: "65521"},
		{name: "MTU no number", args: h + "--mtu x", want: "--mtu"},
		{name: "MAC", args: h + "--mac 02:00", want: "--mac"},
		{name: "MAC of a group", args: a + "--mac 03:00:00:00:00:01", want: "--mac"},
		{name: "board's MAC", args: h + "--board-mac x", want: "--board-mac"},
		{name: "MAC of a tun", args: h + "--link tun --mac 02:00:00:00:00:01", want: "tun has no MAC"},
		{name: "link type", args: h + "--link tub", want: "--link"},
		{name: "feature", args: h + "--deny nonsense", want: "nonsense"},
		{name: "feature that is needed", args: a + "--deny version_1", want: "version_1"},
		{name: "feature that follows another flag", args: h + "--deny raw_ip", want: "--link"},
		{name: "queue size", args: a + "--queue-size 100", want: "power of two"},
		{name: "queue size 1", args: a + "--queue-size 1", want: "power of two"},
		{name: "queue size large", args: h + "--queue-max 65536", want: "--queue-max"},
		{name: "DMA mode", args: h + "--dma maybe", want: "--dma"},
		{name: "DMA length", args: h + "--dma-min -1", want: "--dma-min"},
		{name: "receive buffer", args: a + "--rx-buffer 10", want: "--rx-buffer"},
		{name: "memory", args: h + "--memory tape", want: "--memory"},
		{name: "beat", args: h + "--beat 1us", want: "--beat"},
		{name: "lost", args: h + "--lost 1", want: "--lost"},
		{name: "name", args: h + "--name ''", want: "--name"},

		{name: "net empty", args: h + "--net ''", want: "--net"},
		{name: "net no value", args: h + "--net foo", want: "KEY=VALUE"},
		{name: "net key", args: h + "--net foo=1", want: "no such key"},
		{name: "net twice", args: h + "--net name=a --net name=a", want: "two devices"},
		{name: "queues", args: h + "--queues 17", want: "--queues"},
		{name: "busy-poll", args: h + "--busy-poll 1h", want: "--busy-poll"},
		{name: "busy-poll no time", args: a + "--busy-poll never", want: "auto, off"},
		{name: "cpu", args: h + "--cpu x", want: "--cpu"},
		{name: "cpu that is not there", args: a + "--cpu 1023", want: "1023"},
		{name: "rng without a key", args: h + "--rng=64K", want: "KEY=VALUE"},
		{name: "rng rate", args: h + "--rng=rate=2G", want: "rate: \"2G\": 64 to 1073741824"},
		{name: "rng of no board", args: h + "--rng=board=1", want: "no board 1"},
		{name: "rng twice", args: h + "--rng=rate=1M --rng=rate=2M", want: "board 0 has one already"},
		{name: "rng credit", args: a + "--rng=credit=9", want: "0 to 8"},
		{name: "rng of the other side", args: a + "--rng=rate=1M", want: "credit, every and class"},
		{name: "console no key", args: h + "--console con0", want: "KEY=VALUE"},
		{name: "console of the board's end", args: h + "--console exec=/bin/sh", want: "log, scrollback"},
		{name: "console name", args: h + "--console name=a/b", want: "letters"},
		{name: "console scrollback", args: h + "--console scrollback=1K", want: "4096 to"},
		{name: "console of no board", args: h + "--console board=1", want: "no board 1"},
		{name: "console twice", args: h + "--console name=a --console name=a", want: "two consoles"},
		{name: "console path twice", args: h + "--console log=/tmp/x --console pty=/tmp/x", want: "/tmp/x"},
		{name: "console log nowhere", args: h + "--console log=$D/no/log", want: "no such file"},
		{name: "console pty is a file", args: h + "--console pty=$D/s", want: "not a symbolic link", setup: file},
		{name: "console without an end", args: a + "--console name=a", want: "pty=PATH, kmsg, exec=COMMAND"},
		{name: "console with two ends", args: a + "--console kmsg,pty=/x", want: "one of"},
		{name: "console quote", args: a + "--console exec=sh,'", want: "quote"},
		{name: "console program", args: a + "--console exec=$D/none", want: "$D/none: no such file"},
		{name: "console of nobody", args: "console con0 --status $D/none", want: "no program listens"},
		{name: "console follow", args: "console con0 -f", want: "--log"},
		{name: "console take over", args: "console con0 --read-only --take-over", want: "--take-over"},
		{name: "console back", args: "console con0 --back x", want: "--back"},
		{name: "class", args: h + "--class urgent", want: "control, interactive or bulk"},
		{name: "class of --rng", args: a + "--rng=class=urgent", want: "control, interactive or bulk"},
		{name: "disk without a key", args: h + "--disk root.img", want: "KEY=VALUE"},
		{name: "disk without a name", args: h + "--disk file=/none", want: "name=NAME is missing"},
		{name: "disk without an image", args: h + "--disk name=root", want: "file=PATH is missing"},
		{name: "disk key", args: h + "--disk name=root,size=1G", want: "size: no such key; a host has name file"},
		{name: "disk empty", args: h + "--disk name=root,file=", want: "file: must not be empty"},
		{name: "disk serial", args: h + "--disk name=root,file=/none,serial=123456789012345678901", want: "21 bytes: 20 are possible"},
		{name: "disk cache", args: h + "--disk name=root,file=/none,cache=off", want: "neither none nor writeback"},
		{name: "disk queues", args: h + "--disk name=root,file=/none,queues=0", want: "1 to 16"},
		{name: "disk ro", args: h + "--disk name=root,file=/none,ro=maybe", want: "true nor false"},
		{name: "disk class", args: h + "--disk name=root,file=/none,class=urgent", want: "control, interactive or bulk"},
		{name: "disk of no board", args: h + "--disk name=root,file=/none,board=1", want: "no board 1"},
		{name: "disk of both kinds", args: h + "--disk name=root,file=/none,nbd=/none", want: "file and nbd: a disk lies on one of them"},
		{name: "disk NBD direct", args: h + "--disk name=root,nbd=/none,direct", want: "direct: is for files"},
		{name: "disk NBD export", args: h + "--disk name=root,file=/none,nbd-export=x", want: "nbd-export: is for nbd=PATH"},
		{name: "disk NBD server that is missing", args: h + "--disk name=root,nbd=/none.sock", want: "--disk name=root: nbd /none.sock: connect: no such file or directory"},
		{name: "disk twice", args: h + "--disk name=a,file=/x --disk name=a,file=/y", want: "disk of that name already"},
		{name: "disk without a use", args: a + "--disk name=root", want: "export=PATH"},
		{name: "disk key of the other side", args: a + "--disk name=root,file=/x", want: "file: no such key; an agent has name"},
		{name: "disk queues of an agent", args: a + "--disk name=root,export=/x,queues=17", want: "1 to 16"},
		{name: "disk export that is no socket", args: a + "--disk name=root,export=/etc/passwd", want: "--disk name=root: export=/etc/passwd: exists and is not a socket"},
		{name: "disk export that is a directory", args: a + "--disk name=root,export=/tmp/", want: "--disk name=root: export=/tmp/: it is a directory"},
		{name: "disk image that is missing", args: h + "--disk name=root,file=/none.img", want: "--disk name=root: open /none.img: no such file or directory"},
		{name: "disk image that is a directory", args: h + "--disk name=root,file=/", want: "/ is neither a file nor a block device"},
		{name: "queues below 0", args: a + "--queues -1", want: "--queues"},
		{name: "net queues", args: a + "--net name=a,queues=0", want: "1 to 16"},
		{name: "net queues no number", args: h + "--net name=a,queues=x", want: "1 to 16"},
		{name: "net link", args: h + "--net name=a,link=x", want: "tap nor tun"},
		{name: "net addr", args: h + "--net name=a,addr=x", want: "10.0.0.1/24"},
		{name: "net mtu", args: h + "--net name=a,mtu=x", want: "number"},
		{name: "net mac", args: h + "--net name=a,mac=x", want: "MAC"},
		{name: "net bool", args: h + "--net name=a,offload=x", want: "true nor false"},
		{name: "net second", args: h + "--net name=a --net name=b,mtu=3", want: "68"},

		{name: "status is a file", args: "host --board loopback:$D/b --status $D/s", want: "not a socket", setup: file},
		{name: "status is taken", args: "host --board loopback:$D/b --status $D/s", want: "--status", setup: foreign("", false)},
		{name: "status path long", args: "host --board loopback:$D/s --status /tmp/" + long, want: "107"},

		{name: "serve no path", args: "serve", want: "path"},
		{name: "serve a file", args: "serve $D/s", want: "not a socket", setup: file},
		{name: "serve a path in use", args: "serve $D/s", want: "another server", setup: foreign("", false)},
		{name: "serve no directory", args: "serve $D/no/s", want: "folder"},
		{name: "serve size", args: "serve $D/s --size 3M", want: "power of two"},
		{name: "serve size word", args: "serve $D/s --size big", want: "16M"},
		{name: "serve size zero", args: "serve $D/s --size 0", want: "16M"},
		{name: "serve size huge", args: "serve $D/s --size 2147483647G", want: "power of two"},
		{name: "serve vectors", args: "serve $D/s --vectors 0", want: "vectors"},
		{name: "serve mode", args: "serve $D/s --mode 888", want: "--mode"},

		{name: "agent packed push", args: "agent --board loopback:$D/s --ring packed --placement push", want: "--ring packed"},
		{name: "agent ring", args: "agent --board loopback:$D/s --ring round", want: "--ring"},

		{name: "host interface not in UTF-8", args: "host --board loopback:$D/s -i a\xffb", want: "0xff (at byte 1)"},
		{name: "agent with the host's identity", args: "agent --board loopback:$D/s --machine-id x", want: "it is the host's"},

		{name: "status of nobody", args: "status $D/s", status: 1, want: "no program listens"},
		{name: "status of a file", args: "status $D/s", status: 1, want: "no program listens", setup: file},
		{name: "status of a stranger", args: "status $D/s", status: 1, want: "no boardlink program", setup: foreign("220 mail ESMTP\r\n", true)},
		{name: "status of a stranger that waits", args: "status $D/s", status: 1, want: "no boardlink program", setup: foreign("220 mail ESMTP\r\n", false)},
		{name: "status of another's program", args: "status $D/s", status: 1, how: "nobody", want: "permission denied", setup: func(t *testing.T, b *box) {
			foreign("", false)(t, b)
			if err := os.Chmod(b.path("s"), 0o600); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "status of a silent stranger", args: "status $D/s", status: 1, want: "no answer", setup: foreign("", false)},

		{name: "loopback MTU", args: "loopback --mtu 1279", want: "1280"},
		{name: "loopback MTU of a tun", args: "loopback --mtu 65536 --link tun", want: "65535"},
		{name: "loopback duration", args: "loopback --duration 1ms", want: "--duration"},
		{name: "loopback devices", args: "loopback --nets 17", want: "16"},
		{name: "loopback queues", args: "loopback --queues 17", want: "16"},
		{name: "loopback one cpu", args: "loopback --cpu 0", want: "two processors"},
		{name: "loopback busy-poll", args: "loopback --busy-poll 0", want: "--busy-poll"},
		{name: "loopback door", args: "loopback --door back", want: "--door"},
		{name: "loopback tun over a door", args: "loopback --door vhost-user --link tun", want: "--link tun: not with --door vhost-user"},
		{name: "loopback placement over a door", args: "loopback --door vhost-user --placement window", want: "--placement window: not with"},
		{name: "loopback unknown device", args: "loopback --devices net,tape", want: "disk, rng"},
		{name: "loopback number of devices", args: "loopback --devices 3", want: "--nets 3"},
		{name: "loopback without a network", args: "loopback --devices disk", want: "net is missing"},
		{name: "loopback disk over a door", args: "loopback --door vhost-user --devices net,disk", want: "one device"},
		{name: "loopback devices over a door", args: "loopback --door vhost-user --nets 2", want: "one device"},
		{name: "loopback memory over a door", args: "loopback --door vhost-user --memory uncached", want: "--memory uncached: not with"},
		{name: "loopback window over a door", args: "loopback --door vhost-user --window 4M", want: "--window 4M: not with"},
		{name: "loopback no queues", args: "loopback --queues 0", want: "--queues"},
		{name: "loopback window for the queues", args: "loopback --window 1M --mtu 65000 --queues 8", want: "fewer queue pairs (--queues)"},
		{name: "loopback packed push", args: "loopback --ring packed --placement push", want: "--ring packed"},
		{name: "loopback ring", args: "loopback --ring round", want: "--ring"},
		{name: "loopback window", args: "loopback --window 3M", want: "--window"},
		{name: "loopback window small", args: "loopback --window 32K", want: "--window"},
		{name: "loopback window for the MTU", args: "loopback --window 64K --mtu 65000", want: "a window at least 8 times as large, or an MTU of at most 1"},
		{name: "loopback window for the devices", args: "loopback --window 256K --mtu 65000 --nets 8", want: "no more than 1 of the 8 devices"},
		{name: "loopback placement", args: "loopback --placement moon", want: "--placement"},
		{name: "loopback argument", args: "loopback extra", want: "extra"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			c.run(t)
		})
	}
}

// A file that is in the way is never touched.
func TestFilesAreKept(t *testing.T) {
	b := newBox(t)
	p := b.own("s")
	if err := os.WriteFile(p, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"serve", p}, {"host", "--status", "none", "--board", "loopback:" + p}, {"host", "--board", "loopback:" + b.path("x"), "--status", p}} {
		b.run("", args...)
		if got, err := os.ReadFile(p); err != nil || !bytes.Equal(got, []byte("precious")) {
			t.Fatalf("%v: the file is %q, %v", args, got, err)
		}
	}
}

// Everybody's first question is --help: it fits a terminal and tells the defaults.
func TestHelp(t *testing.T) {
	b := newBox(t)
	for cmd, want := range map[string][]string{
		"":         {"loopback", "host", "agent", "serve", "status"},
		"loopback": {"3s", "tap", "1500", "16M", "--json", "-v"},
		"host":     {"loopback:", "board0", "1500", "100ms", "10)", "1024", "-host"},
		"agent":    {"loopback:", "board0", "256", "16384"},
		"serve":    {"16M", "8", "0600"},
		"status":   {"--json", filepath.Base("boardlink")},
	} {
		t.Run(cmd, func(t *testing.T) {
			args := append(strings.Fields(cmd), "--help")
			t.Setenv("COLUMNS", "80")
			status, out, stderr := b.run("", args...)
			if status != 0 || stderr != "" {
				t.Errorf("status %d, %q", status, stderr)
			}
			for _, l := range strings.Split(out, "\n") {
				if len([]rune(l)) > 80 {
					t.Errorf("a line of %d characters: %s", len(l), l)
				}
			}
			for _, w := range want {
				if w != "-host" && !strings.Contains(out, w) {
					t.Errorf("no %q in:\n%s", w, out)
				}
			}
		})
	}
}
