//go:build linux

// Command tool is what the tests of hwtest/vm run in their machines.
package main

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() {
	arg := func(i int) string {
		if i < len(os.Args) {
			return os.Args[i]
		}
		return ""
	}
	switch arg(1) {
	case "say": // its arguments to standard output, its environment and folder to standard error
		fmt.Println(strings.Join(os.Args[2:], " "))
		dir, _ := os.Getwd()
		fmt.Fprintln(os.Stderr, dir, os.Getenv("TOOL"))
	case "exit":
		code, _ := strconv.Atoi(arg(2))
		fmt.Fprintln(os.Stderr, "as asked")
		os.Exit(code)
	case "cat":
		io.Copy(os.Stdout, os.Stdin)
	case "pour": // that many bytes
		n, _ := strconv.Atoi(arg(2))
		line := strings.Repeat("0123456789abcde", 1000) + "\n"
		for n > 0 {
			k := min(n, len(line))
			os.Stdout.WriteString(line[:k])
			n -= k
		}
	case "wait": // for a signal, and name it
		c := make(chan os.Signal, 1)
		signal.Notify(c, syscall.SIGTERM, syscall.SIGUSR1)
		fmt.Println("ready")
		fmt.Println(<-c)
	case "orphan": // leave a child behind that ends soon after us
		c := exec.Command(os.Args[0], "sleep", "100ms")
		if err := c.Start(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		fmt.Println(c.Process.Pid)
	case "sleep":
		d, err := time.ParseDuration(arg(2))
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(2)
		}
		time.Sleep(d)
	default:
		fmt.Fprintln(os.Stderr, "usage: tool say|exit|cat|pour|wait|orphan|sleep ARGUMENTS")
		os.Exit(2)
	}
}
