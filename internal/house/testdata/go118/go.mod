module github.com/boardlink/boardlink

go 1.18

require (
	github.com/songgao/water v0.0.0-20200317203138-2b4b6d7c09d8
	golang.org/x/sys v0.6.0
)
