// Syncmap is the peer of the library's registry: Go's sync.Map with client ids as keys.
//
//	syncmap lookup IDS LOOKUPS
//	syncmap mark IDS ordered|random
//	syncmap memory IDS
package main

import (
	"fmt"
	"log"
	"math/rand"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"time"
)

const idSize = 20

func main() {
	if len(os.Args) < 3 {
		log.Fatal("too few arguments: see benches/run")
	}
	content, err := os.ReadFile(os.Args[2])
	if err != nil {
		log.Fatal(err)
	}
	text := string(content)
	ids := make([]string, len(text)/idSize)
	for i := range ids {
		ids[i] = text[i*idSize : (i+1)*idSize]
	}
	switch os.Args[1] {
	case "lookup":
		lookup(ids)
	case "mark":
		mark(ids)
	case "memory":
		memory(ids)
	}
}

// nsEach calls f n times, and returns the time of one call.
func nsEach(n int, f func(i int)) float64 {
	start := time.Now()
	for i := range n {
		f(i)
	}
	return float64(time.Since(start).Nanoseconds()) / float64(n)
}

// lookup loads the same id again and again, and 100,000 ids in random order.
func lookup(ids []string) {
	lookups, err := strconv.Atoi(os.Args[3])
	if err != nil {
		log.Fatal(err)
	}
	ids = ids[:min(len(ids), 100_000)]
	var online sync.Map
	for _, id := range ids {
		online.Store(id, struct{}{})
	}
	hot := ids[0]
	missing := 0
	hotNS := nsEach(lookups, func(int) {
		if _, ok := online.Load(hot); !ok {
			missing++
		}
	})
	shuffle(ids)
	at := 0
	manyNS := nsEach(lookups, func(int) {
		if _, ok := online.Load(ids[at]); !ok {
			missing++
		}
		if at++; at == len(ids) {
			at = 0
		}
	})
	if missing > 0 {
		log.Fatal("an id was not found")
	}
	fmt.Printf("{\"hot_ns\": %.3f, \"many_ns\": %.3f}\n", hotNS, manyNS)
}

// mark stores all ids, and deletes them. The map refers to the bytes of the ids, and copies none.
func mark(ids []string) {
	if os.Args[3] == "random" {
		shuffle(ids)
	}
	var online sync.Map
	storeNS := nsEach(len(ids), func(i int) { online.Store(ids[i], struct{}{}) })
	deleteNS := nsEach(len(ids), func(i int) { online.Delete(ids[i]) })
	fmt.Printf("{\"online_ns\": %.1f, \"offline_ns\": %.1f}\n", storeNS, deleteNS)
}

// memory stores a copy of each id, because the map has to keep a client's id in memory. Memory that the garbage
// collector can return does not count.
func memory(ids []string) {
	before := resident()
	online := new(sync.Map)
	for _, id := range ids {
		online.Store(strings.Clone(id), struct{}{})
	}
	after := resident()
	if _, ok := online.Load(ids[0]); !ok {
		log.Fatal("an id was not found")
	}
	fmt.Printf("{\"bytes\": %.1f}\n", float64(after-before)/float64(len(ids)))
}

// resident collects garbage, and returns the resident memory of this process in bytes.
func resident() int {
	debug.FreeOSMemory()
	statm, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		log.Fatal(err)
	}
	pages, err := strconv.Atoi(strings.Fields(string(statm))[1])
	if err != nil {
		log.Fatal(err)
	}
	return pages * os.Getpagesize()
}

func shuffle(ids []string) {
	rand.New(rand.NewSource(1)).Shuffle(len(ids), func(i, j int) { ids[i], ids[j] = ids[j], ids[i] })
}
