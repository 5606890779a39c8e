package lean

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/boardlink/boardlink/session"
)

// Log writes lines of name=value, as boardlink does. Any goroutine may use it.
type Log struct {
	debug bool

	mu sync.Mutex
	w  io.Writer
}

var _ session.Logger = (*Log)(nil)

// Debug writes a line where the program was started with -v.
func (l *Log) Debug(msg string, args ...interface{}) {
	if l.debug {
		l.line("DEBUG", msg, args)
	}
}

// Info writes a line.
func (l *Log) Info(msg string, args ...interface{}) { l.line("INFO", msg, args) }

// Warn writes a line about what an operator may have to look at.
func (l *Log) Warn(msg string, args ...interface{}) { l.line("WARN", msg, args) }

// Error writes a line about what failed.
func (l *Log) Error(msg string, args ...interface{}) { l.line("ERROR", msg, args) }

func (l *Log) line(level, msg string, args []interface{}) {
	var b strings.Builder
	b.WriteString("time=" + time.Now().Format("2006-01-02T15:04:05.000Z07:00") + " level=" + level + " msg=" + quote(msg))
	for i := 0; i+1 < len(args); i += 2 {
		b.WriteString(" " + fmt.Sprint(args[i]) + "=" + quote(fmt.Sprint(args[i+1])))
	}
	b.WriteByte('\n')
	l.mu.Lock()
	defer l.mu.Unlock()
	io.WriteString(l.w, b.String())
}

// quote quotes what is not plain.
func quote(s string) string {
	for _, r := range s {
		if r <= ' ' || r == '"' || r == '=' || r >= 0x7f {
			return strconv.Quote(s)
		}
	}
	if s == "" {
		return `""`
	}
	return s
}
