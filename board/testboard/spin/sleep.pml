/*
 * Sleeping across a bus: both sides of one split virtqueue, each of which tells the other of what it has done, and sleeps when it has
 * nothing to do. Can both sleep for ever although one of them has work (a lost wake-up)?
 *
 *	spin -a sleep.pml && gcc -O2 -DSAFETY -o pan pan.c && ./pan -m3000000 -w26
 *
 * says "errors: 0" if not: 21 million states, some 20 seconds, 3 GB. With -DN=1, given to spin, the queue has one descriptor and the search a
 * tenth of that. Each of these, given to spin -a, leaves a step out, and has to be found ("invalid end state"):
 *
 *	-DNO_READBACK	the suppression word is not read back across the bus before the index is looked at again
 *	-DNO_RECHECK	the index is not looked at again
 *	-DNO_FENCE_C	no full barrier between the index and the other side's suppression word
 *	-DNO_FENCE_D	no full barrier behind the suppression word
 *	-DOVERTAKE	a doorbell may overtake the writes posted before it
 *	-DRELAXED	the completion of a read may overtake posted writes (PCI Express: relaxed or ID-based ordering of completions)
 *
 * -DPUSH=0, 1 and -DEVENT=0, 1 choose one placement (window, push), and flags or the event index; without them all are tried.
 *
 * What stands for what: docs/architecture.md, "Sleeping, model-checked".
 */

/* What is modelled of the memory of both machines: the four words, each in the memory of one side. */
#define A  0	/* available index: driver to device */
#define UE 1	/* used event, or the driver area's flags: when the driver wants a call */
#define U  2	/* used index: device to driver */
#define AE 3	/* available event, or the device area's flags: when the device wants a kick */
#define BELL 4	/* not a word: the doorbell of the other side */
#define BACK 5	/* not a word either: the completion of a read by the other side */

#define AGENT 0	/* the board: driver side */
#define HOST  1	/* the carrier: device side */

/* In placement window all is in the board's memory; with push the driver's area lies with the host, which reads it. */
#define home(w) (push && (w == A || w == UE) -> HOST : AGENT)

#ifndef N
#define N 2	/* descriptors */
#endif
#define M (2 * N)	/* what indices wrap at: as 65536 to 32768 */
#define minus(x, y) (((x) + M - (y)) % M)
#define after(x, y) (((x) + (y)) % M)

#ifndef SB
#define SB 2	/* stores that a processor holds back */
#endif
#ifndef POST
#define POST 3	/* posted writes under way in one direction */
#endif

byte mem[4];
bool bell[2];
bool back[2];

/*
 * A store waits in the processor's store buffer (sb), then, where it goes across, in the queue of posted writes (post) of its direction. A
 * load may pass stores in the buffer. A read across pushes the posted writes of its own direction in front of it, and its completion
 * does not pass those that the other side has posted before (PCI Express base specification, 2.4.1).
 */
chan sb[2] = [SB] of { byte, byte };
chan post[2] = [POST] of { byte, byte };

proctype processor(byte s; bool push)
{
	byte w, v;
end:	do
	:: atomic { nempty(sb[s]) && nfull(post[s]) -> sb[s]?w,v;
		if
		:: w != BELL && home(w) == s -> mem[w] = v
		:: else -> post[s]!w,v
		fi;
		w = 0; v = 0 }
	od
}

proctype bus(byte s)
{
	byte w, v;
end:	do
	:: atomic { post[s]?w,v;
		if
		:: w == BELL -> bell[1 - s] = true
		:: w == BACK -> back[1 - s] = true
		:: else -> mem[w] = v
		fi;
		w = 0; v = 0 }
#ifdef OVERTAKE
	:: atomic { post[s]??[BELL,0] -> post[s]??BELL,0; bell[1 - s] = true }
#endif
	od
}

#define store(s, w, v) sb[s]!w,v

inline load(s, w, x)
{
	if
	:: atomic { home(w) == s -> x = mem[w] }
	:: home(w) != s -> across(s, w, x)
	fi
}

inline across(s, w, x)
{
	atomic { empty(post[s]) && nfull(post[1 - s]) -> x = mem[w];
#ifndef RELAXED
		post[1 - s]!BACK,0
	}
	atomic { back[s]; back[s] = false
#endif
	}
}

inline fence(s) { empty(sb[s]) }

/* Barrier C, the other side's suppression word, and the doorbell: NeedKick and NeedCall. */
inline tell(s, w, new, old, x)
{
#ifndef NO_FENCE_C
	fence(s);
#endif
	load(s, w, x);
	if
	:: atomic { (event && minus(minus(new, x), 1) < minus(new, old) || !event && x == 0) -> x = 0; store(s, BELL, 0) }
	:: atomic { else -> x = 0 }
	fi
}

/* The first half of ArmCall and ArmKick: the suppression word v is written to w, unless it stands there, and settled. */
inline arm(s, w, v, word, settled, x)
{
	if
	:: atomic { word != v -> word = v; settled = false; store(s, w, v) }
	:: else
	fi;
	if
	:: !settled ->
#ifndef NO_FENCE_D
		fence(s);
#endif
#ifndef NO_READBACK
		/* With window the word is the driver's own, or the read of the index that follows goes the same way. */
		if
		:: push && empty(sb[s]) -> across(s, w, x); x = 0
		:: push && nempty(sb[s])	/* without the barrier: from the store buffer */
		:: !push
		fi;
#endif
		settled = true
	:: else
	fi
}

/* DisarmCall and DisarmKick: with the event index there is nothing to write. */
inline disarm(s, w, word, settled)
{
	if
	:: atomic { !event && word != 1 -> word = 1; settled = false; store(s, w, 1) }
	:: else
	fi
}

proctype driver(bool push, event)
{
	byte avail, used, seen, n, x, v;
	byte word;		/* what UE was set to */
	bool settled, stopped;

	disarm(AGENT, UE, word, settled);
	do
	:: true ->
		/* Reap. */
		load(AGENT, U, used);
		if
		:: atomic { !stopped && minus(avail, used) < N ->
			/* Add a batch, publish, kick. */
			if
			:: n = 1
			:: minus(avail, used) + 2 <= N -> n = 2
			fi;
			avail = after(avail, n);
			store(AGENT, A, avail) };
			tell(AGENT, AE, avail, after(avail, M - n), x);
			n = 0
		:: atomic { minus(avail, used) > 0 ->
			/* Sleep until one, or two, are back: ArmCallAfter. */
			if
			:: n = 1
			:: event && minus(avail, used) >= 2 -> n = 2
			fi;
			v = (event -> after(used, n - 1) : 0) };
			arm(AGENT, UE, v, word, settled, x);
			v = 0;
#ifdef NO_RECHECK
			seen = used;
#else
			load(AGENT, U, seen);
#endif
			if
			:: atomic { minus(seen, used) >= n -> seen = 0; n = 0 }
			:: atomic { else -> seen = 0; n = 0 };
				atomic { bell[AGENT] -> bell[AGENT] = false }; disarm(AGENT, UE, word, settled)
			fi
		:: !stopped -> stopped = true	/* no frames any more */
		:: stopped && avail == used -> break
		fi
	od
}

proctype device(bool push, event)
{
	byte avail, seen, used, n, x, v;
	byte word;		/* what AE was set to */
	bool settled;

	disarm(HOST, AE, word, settled);
	do
	:: true ->
		/* Pop. */
		load(HOST, A, avail);
		if
		:: atomic { used != avail ->
			/* Complete one, or all, publish, call. */
			if
			:: n = 1
			:: n = minus(avail, used)
			fi;
			used = after(used, n);
			store(HOST, U, used) };
			tell(HOST, UE, used, after(used, M - n), x);
			n = 0
		:: atomic { else -> v = (event -> avail : 0) };
			arm(HOST, AE, v, word, settled, x);
			v = 0;
#ifdef NO_RECHECK
			seen = avail;
#else
			load(HOST, A, seen);
#endif
			if
			:: atomic { seen != avail -> seen = 0 }
			:: atomic { else -> seen = 0 };
end:				atomic { bell[HOST] -> bell[HOST] = false }; disarm(HOST, AE, word, settled)
			fi
		fi
	od
}

init
{
	bool push, event;
	atomic {
#ifdef PUSH
		push = PUSH;
#else
		if
		:: push = false
		:: push = true
		fi;
#endif
#ifdef EVENT
		event = EVENT;
#else
		if
		:: event = false
		:: event = true
		fi;
#endif
		run processor(AGENT, push);
		run processor(HOST, push);
		run bus(AGENT);
		run bus(HOST);
		run driver(push, event);
		run device(push, event)
	}
}
