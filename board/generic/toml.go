package generic

import (
	"fmt"
	"reflect"
	"sort"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Problem is one thing that is wrong with a description.
type Problem struct {
	Line   int    `json:"line,omitempty"` // from 1 on; 0: no line stands for it
	Key    string `json:"key,omitempty"`  // "host.window.size"
	Reason string `json:"problem"`        // the value, the bound, what to write instead
}

// String returns "line 7: host.window.size: ...".
func (p Problem) String() string {
	s := p.Reason
	if p.Key != "" {
		s = p.Key + ": " + s
	}
	if p.Line != 0 {
		s = "line " + strconv.Itoa(p.Line) + ": " + s
	}
	return s
}

// Check reads a description and returns everything that is wrong with it, in the order of its lines. It needs no hardware.
// The Config is what could be read.
//
// The language is the part of TOML 1.0 that descriptions need: tables, integers, strings of one line, booleans, arrays of
// integers.
func Check(data []byte) (*Config, []Problem) {
	p := &parser{c: new(Config), lines: map[string]int{}}
	p.parse(string(data))
	if len(p.problems) == 0 {
		// What could not be read would be reported a second time as missing.
		for _, e := range p.c.problems() {
			p.problems = append(p.problems, Problem{Line: p.line(e.Key), Key: e.Key, Reason: e.Reason})
		}
	}
	sort.SliceStable(p.problems, func(i, j int) bool { return p.problems[i].Line < p.problems[j].Line })
	return p.c, p.problems
}

// parser reads a description line by line; after an error it goes on with the next line.
type parser struct {
	c        *Config
	problems []Problem
	lines    map[string]int // of tables and keys
	n        int            // the line that is read
	table    string         // "host.window"
	into     reflect.Value  // the table's struct; invalid where the table is unknown
	rest     []string       // lines that follow
}

func (p *parser) bad(key, format string, args ...interface{}) {
	p.problems = append(p.problems, Problem{p.n, key, fmt.Sprintf(format, args...)})
}

// line returns the line of a key, of a key that is missing that of its table.
func (p *parser) line(key string) int {
	for {
		if n := p.lines[key]; n != 0 {
			return n
		}
		i := strings.LastIndexByte(key, '.')
		if i < 0 {
			return 0
		}
		key = key[:i]
	}
}

func (p *parser) parse(text string) {
	p.into = reflect.ValueOf(p.c).Elem()
	p.rest = strings.Split(strings.Replace(text, "\r\n", "\n", -1), "\n")
	for len(p.rest) > 0 {
		s := p.next()
		for i, c := range s {
			if c == utf8.RuneError || c < ' ' && c != '\t' || c == 0x7f {
				p.bad("", "byte %#02x at column %d: a description is text in UTF-8, without control characters", s[i], i+1)
				s = ""
				break
			}
		}
		if s = strings.Trim(s, " \t"); s == "" || s[0] == '#' {
			continue
		}
		if s[0] == '[' {
			p.header(s)
		} else {
			p.assign(s)
		}
	}
}

func (p *parser) next() string {
	s := p.rest[0]
	p.rest = p.rest[1:]
	p.n++
	return s
}

// header reads [host.window].
func (p *parser) header(s string) {
	p.into = reflect.Value{}
	end := strings.IndexByte(s, ']')
	if strings.HasPrefix(s, "[[") || end < 0 {
		p.bad("", "%s: a table is written as [host.window]", s)
		return
	}
	if tail := strings.Trim(s[end+1:], " \t"); tail != "" && tail[0] != '#' {
		p.bad("", "%q behind the table's name: each key is a line of its own", tail)
		return
	}
	var parts []string
	for _, part := range strings.Split(s[1:end], ".") {
		parts = append(parts, strings.Trim(part, " \t"))
	}
	p.table = strings.Join(parts, ".")
	if n := p.lines[p.table]; n != 0 {
		p.bad(p.table, "the table is there already, in line %d", n)
		return
	}
	v := reflect.ValueOf(p.c).Elem()
	at := ""
	for _, part := range parts {
		f := field(v, part)
		if !f.IsValid() || !isTable(f.Type()) {
			p.bad(p.table, "there is no such table; there are %s", strings.Join(tables(v.Type(), at), ", "))
			return
		}
		if f.Kind() == reflect.Ptr {
			if f.IsNil() {
				f.Set(reflect.New(f.Type().Elem()))
			}
			f = f.Elem()
		}
		v = f
		at += part + "."
	}
	p.lines[p.table] = p.n
	p.into = v
}

// assign reads key = value.
func (p *parser) assign(s string) {
	i := strings.IndexByte(s, '=')
	if i < 0 {
		p.bad("", "%q is not of the form key = value", s)
		return
	}
	key, value := strings.Trim(s[:i], " \t"), strings.Trim(s[i+1:], " \t")
	path := key
	if p.table != "" {
		path = p.table + "." + key
	}
	if !p.into.IsValid() {
		return // the table is the problem
	}
	f := field(p.into, key)
	if !f.IsValid() || isTable(f.Type()) {
		why := "there is no such key"
		switch {
		case f.IsValid():
			why = fmt.Sprintf("it is a table: write [%s], and its keys below", path)
		case strings.ContainsAny(key, ".\"'"):
			why = "a key is a plain word: write the table in brackets above, as [host.window], then the key"
		default:
			why += "; there are " + strings.Join(keys(p.into.Type()), ", ")
		}
		p.bad(path, "%s", why)
		return
	}
	if n := p.lines[path]; n != 0 {
		p.bad(path, "it stands in line %d already", n)
		return
	}
	p.lines[path] = p.n
	if value == "" || value[0] == '#' {
		p.bad(path, "the value is missing")
		return
	}
	if f.Kind() == reflect.Slice {
		p.array(path, f, value)
		return
	}
	word, tail, err := token(value)
	if err == nil && tail != "" && tail[0] != '#' {
		err = fmt.Errorf("%q behind the value: each key is a line of its own", tail)
	}
	if err == nil {
		err = set(f, word)
	}
	if err != nil {
		p.bad(path, "%v", err)
	}
}

// array reads [1, 2], which may go over several lines.
func (p *parser) array(path string, f reflect.Value, s string) {
	if s[0] != '[' {
		p.bad(path, "%s: a list of numbers is wanted, as [2, 3]", s)
		return
	}
	start := p.n
	fail := func(format string, args ...interface{}) {
		p.problems = append(p.problems, Problem{start, path, fmt.Sprintf(format, args...)})
	}
	list := reflect.MakeSlice(f.Type(), 0, 4)
	s, comma := s[1:], true
	for {
		s = strings.TrimLeft(s, " \t")
		switch {
		case s == "" || s[0] == '#':
			if len(p.rest) == 0 || list.Len() > 1000 {
				fail("the list has no end: ] is missing")
				return
			}
			s = p.next()
			continue
		case s[0] == ']':
			if tail := strings.Trim(s[1:], " \t"); tail != "" && tail[0] != '#' {
				fail("%q behind the list: each key is a line of its own", tail)
				return
			}
			f.Set(list)
			return
		case s[0] == ',' && !comma:
			comma, s = true, s[1:]
			continue
		case !comma || s[0] == ',':
			fail("%q: numbers with commas between them are wanted, as [2, 3]", s)
			return
		}
		word, tail, err := token(s)
		if err == nil {
			e := reflect.New(f.Type().Elem()).Elem()
			if err = set(e, word); err == nil {
				list = reflect.Append(list, e)
			}
		}
		if err != nil {
			fail("%v", err)
			return
		}
		comma, s = false, tail
	}
}

// token splits a value from what follows it.
func token(s string) (word, tail string, err error) {
	switch s[0] {
	case '"':
		for i := 1; i < len(s); i++ {
			switch s[i] {
			case '\\':
				i++
			case '"':
				return s[:i+1], strings.Trim(s[i+1:], " \t"), nil
			}
		}
		return "", "", fmt.Errorf("%s: the closing quotation mark is missing", s)
	case '\'':
		if i := strings.IndexByte(s[1:], '\''); i >= 0 {
			return s[:i+2], strings.Trim(s[i+2:], " \t"), nil
		}
		return "", "", fmt.Errorf("%s: the closing quotation mark is missing", s)
	case '{':
		return "", "", fmt.Errorf("%s: write a table with its name in brackets, as [host.window], and its keys below", s)
	}
	end := strings.IndexAny(s, " \t,]#")
	if end < 0 {
		end = len(s)
	}
	return s[:end], strings.Trim(s[end:], " \t"), nil
}

// set gives a field the value of a token.
func set(f reflect.Value, word string) error {
	switch f.Kind() {
	case reflect.String:
		s, err := unquote(word)
		if err != nil {
			return err
		}
		f.SetString(s)
	case reflect.Bool:
		if word != "true" && word != "false" {
			return fmt.Errorf("%s: true or false is wanted", word)
		}
		f.SetBool(word == "true")
	default:
		n, negative, err := number(word)
		if err != nil {
			return err
		}
		bits := uint(f.Type().Bits())
		signed := f.Kind() == reflect.Int
		max := ^uint64(0) >> (64 - bits)
		if signed {
			max >>= 1
		}
		switch {
		case negative && (!signed || n > max+1), !negative && n > max:
			return fmt.Errorf("%s: 0 to %#x is possible", word, max)
		case signed && negative:
			f.SetInt(-int64(n))
		case signed:
			f.SetInt(int64(n))
		default:
			f.SetUint(n)
		}
	}
	return nil
}

// number reads an integer of TOML.
func number(word string) (n uint64, negative bool, err error) {
	bad := fmt.Errorf("%s: a whole number is wanted, decimal or as 0x1000_0000", word)
	digits := word
	base := 10
	for prefix, b := range map[string]int{"0x": 16, "0o": 8, "0b": 2} {
		if strings.HasPrefix(digits, prefix) {
			base, digits = b, digits[2:]
			break
		}
	}
	if base == 10 {
		if strings.HasPrefix(digits, "-") || strings.HasPrefix(digits, "+") {
			negative, digits = digits[0] == '-', digits[1:]
		}
		if len(digits) > 1 && digits[0] == '0' {
			return 0, false, fmt.Errorf("%s: a decimal number has no leading zero; write 0x or 0o in front of hexadecimal or octal digits", word)
		}
	}
	if digits == "" || strings.HasPrefix(digits, "_") || strings.HasSuffix(digits, "_") || strings.Contains(digits, "__") {
		return 0, false, bad
	}
	n, perr := strconv.ParseUint(strings.Replace(digits, "_", "", -1), base, 64)
	if perr != nil || strings.ContainsAny(digits, "+-") {
		if ne, ok := perr.(*strconv.NumError); ok && ne.Err == strconv.ErrRange {
			return 0, false, fmt.Errorf("%s: more than 64 bits", word)
		}
		return 0, false, bad
	}
	return n, negative, nil
}

func unquote(word string) (string, error) {
	switch word[0] {
	case '\'':
		return word[1 : len(word)-1], nil
	case '"':
	default:
		return "", fmt.Errorf("%s: text is written in quotation marks", word)
	}
	var b strings.Builder
	s := word[1 : len(word)-1]
	for i := 0; i < len(s); i++ {
		if s[i] != '\\' {
			b.WriteByte(s[i])
			continue
		}
		i++
		const from, to = `btnfr"\`, "\b\t\n\f\r\"\\"
		if i < len(s) {
			if k := strings.IndexByte(from, s[i]); k >= 0 {
				b.WriteByte(to[k])
				continue
			}
			if n := map[byte]int{'u': 4, 'U': 8}[s[i]]; n != 0 && i+n < len(s) {
				if r, err := strconv.ParseUint(s[i+1:i+1+n], 16, 32); err == nil && utf8.ValidRune(rune(r)) {
					b.WriteRune(rune(r))
					i += n
					continue
				}
			}
		}
		return "", fmt.Errorf("%s: a backslash that means nothing; use '...' for text with backslashes", word)
	}
	return b.String(), nil
}

func isTable(t reflect.Type) bool {
	return t.Kind() == reflect.Struct || t.Kind() == reflect.Ptr
}

// walk calls f for each key of a struct, those of embedded structs too.
func walk(t reflect.Type, f func(key string, index int, t reflect.StructField)) {
	for i := 0; i < t.NumField(); i++ {
		sf := t.Field(i)
		f(sf.Tag.Get("toml"), i, sf)
	}
}

// field returns the field of a key; not valid where there is none.
func field(v reflect.Value, key string) (found reflect.Value) {
	walk(v.Type(), func(k string, i int, sf reflect.StructField) {
		if sf.Anonymous {
			if f := field(v.Field(i), key); f.IsValid() {
				found = f
			}
		} else if k == key {
			found = v.Field(i)
		}
	})
	return found
}

// keys returns the keys of a table that are no tables.
func keys(t reflect.Type) (names []string) {
	walk(t, func(k string, _ int, sf reflect.StructField) {
		if sf.Anonymous {
			names = append(names, keys(sf.Type)...)
		} else if !isTable(sf.Type) {
			names = append(names, k)
		}
	})
	sort.Strings(names)
	return names
}

// tables returns the names of the tables in a table.
func tables(t reflect.Type, at string) (names []string) {
	walk(t, func(k string, _ int, sf reflect.StructField) {
		if !sf.Anonymous && isTable(sf.Type) {
			names = append(names, "["+at+k+"]")
		}
	})
	sort.Strings(names)
	if len(names) == 0 {
		return []string{"none in [" + strings.TrimSuffix(at, ".") + "]"}
	}
	return names
}
