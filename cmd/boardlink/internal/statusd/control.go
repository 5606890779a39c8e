package statusd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"

	"github.com/boardlink/boardlink/ctl"
)

// ErrRefused is what errors of Ask match where the program answers that it does not do what it is asked.
var ErrRefused = errors.New("refused")

// Ask sends a request to the program at path. What follows its answer is said on the connection, which the caller closes.
func Ask(ctx context.Context, path string, req ctl.Request) (*ctl.Conn, net.Conn, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
	if err != nil {
		return nil, nil, explain(path, err)
	}
	if t, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(t) // cannot fail: a socket has deadlines
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	c := ctl.NewConn(conn, conn)
	req.Boardlink = ctl.Version
	err = c.SendLine(req)
	if err == nil {
		_, err = conn.Write([]byte("\n")) // the end of a request, for programs that know HTTP only
	}
	var line string
	if err == nil {
		line, err = c.Line()
	}
	var r ctl.Reply
	switch {
	case err != nil:
		err = fmt.Errorf("%s: no answer: %w", path, err)
	case strings.HasPrefix(line, "HTTP/"):
		err = fmt.Errorf("%s: %w: the program there is of a version that only tells its status", path, ErrRefused)
	default:
		if err = ctl.Decode(line, &r); err != nil {
			err = fmt.Errorf("%s: %w", path, err)
		} else if r.Error != "" {
			err = fmt.Errorf("%s: %w: %s", path, ErrRefused, r.Error)
		}
	}
	if err != nil {
		conn.Close()
		return nil, nil, err
	}
	_ = conn.SetDeadline(noDeadline)
	return c, conn, nil
}
