"""Choices of performance and of patience, each with its reason. No result depends on them.

Modules read them as ``tunables.X``, so that a test changes one place.
"""

from __future__ import annotations

# Memory

MEMORY_NUMBYTES = 256 << 20
"""Bytes that a transfer may use beyond the buffers that it fills."""

LEAST_MEMORY_NUMBYTES = 1024
"""Least memory that a config may give: with less, parts have a few elements, and each costs a start of its own."""

PART_NUMBYTES = 32 << 20
"""Most bytes of memory for one block at a time: enough that a block's start costs nothing, and few enough to stay in caches."""

WRITTEN_NUMBYTES = 16 << 20
"""Bytes that one worker gathers before it writes them: large enough for sequential speed, small enough for any machine."""

COMPARED_NUMBYTES = 8 << 20
"""Bytes held of each side when values are compared: larger chunks than a few MiB are no faster."""

ROUND_NUMBYTES = 8 << 20
"""Memory of a rank for tensors that travel together. When it is full, the rank waits for them and packs the next ones."""

ROUNDED_NUMEL = 1 << 16
"""Elements that are rounded at a time: few enough to stay in caches."""

SUMMED_NUMEL = 1 << 22
"""Elements whose bits are summed at a time."""

INDICES = 4096
"""Indices of samples that are computed at a time."""

# Reading

SHARED_READ_NUMBYTES = 64 << 20
"""If ranks share fewer bytes than this, each reads them all: that costs less than exchanging them."""

ALIGNMENT_NUMBYTES = 64
"""Shared parts are cut at multiples of this, which are element boundaries of every dtype."""

PACKED_NUMBYTES = 1 << 17
"""Tensors below this size, or below a rank's part of a round, travel together: that costs less than a message for each."""

LEAST_RUN_NUMBYTES = 4096
"""Shortest run of a strided block that is read by itself where the file isn't mapped. With shorter ones the gaps are read too."""

SUMMED_NUMBYTES = 1 << 20
"""Bytes that are read and summed at a time: few enough to stay in a core's cache, and many enough that a start costs nothing."""

STEP_NUMBYTES = 4 << 20
"""Bytes of a map that are summed and then copied: few enough to stay in the processor's shared cache."""

MOST_UNREAD = 1 / 8
"""Part of an archive's record that is read for its checksum alone, if all else was read: padding, and copies on other ranks."""

FEWEST_OPEN, MOST_OPEN = 8, 4096
"""Fewest and most files that a reader keeps open. Between these it depends on how many the process may open."""

PENDING = 4
"""Pieces of work for each thread that wait or are under way: enough that none is idle, and few enough to cost no memory."""

MOST_THREADS = 8
"""Most threads of one rank; more don't make copies of memory faster."""

PIECE_NUMBYTES = 1 << 20
"""Bytes that have one checksum: few enough to stay in a cache until they are checked, and many beside their sum."""

SMALL_NUMBYTES = 4096
"""Storages up to this size are checked when their file is opened, as its pickle is, by the same reads."""

MOST_BETWEEN = 1 / 8
"""Part of what is read of a piece that may lie before it unread, and is read for the piece's checksum alone at once."""

COMPLETED_NUMBYTES = 64 << 20
"""Bytes of pieces that were read in part and are read whole for their checksums, or a 16th of what was read, if that is more."""

# Remote folders

REQUEST_NUMBYTES = 8 << 20
"""Most bytes of one request to a store: enough that its start costs little, and few enough for one of each thread in memory."""

LEAST_REQUEST_NUMBYTES = 1 << 20
"""Shortest run of a strided block that is requested by itself. With shorter ones the gaps are fetched too: a request takes as
long as a few MiB."""

BLOCK_REQUEST_NUMBYTES = 1 << 18
"""Bytes of a block that is fetched and kept when a little is read, such as an archive's directory."""

KEPT_BLOCKS = 64
"""Blocks that are kept, of all files."""

KEPT_READ_NUMBYTES = 1 << 20
"""Longest read that is made of blocks; a longer one is a request of its own."""

# Ranks

CONNECT_SECONDS = 60.0
"""Seconds that the hosts may take to connect over gloo."""

CONTROL_SECONDS = 6 * 3600.0
"""Seconds that a rank waits for what another has to tell: longer than any writer takes. A rank that ends is noticed at once."""

TOLD_PROBLEMS = 100
"""Problems of one error that a rank tells the others: a thousand ranks may have the same ones."""

# Searching

MOST_STATES = 200_000
"""Steps after which an order of parameters at stage 0 counts as ambiguous. Two groups of 400 parameters stay below."""

MOST_RENAMED = 4096
"""Most names of a side for which renamings are suggested."""

MOST_RANKS = 1 << 20
"""Most ranks of a topology that ``ucp plan`` plans: each takes some memory."""

# Writing

FILE_NUMBYTES = 4 << 30
"""Bytes of atoms in one file, unless a single atom is larger."""

DCP_CHUNK_NUMBYTES = 64 << 20
"""Bytes of a chunk of ``torch.distributed.checkpoint``, unless a row is larger. torch reads all of one for any part."""

DOCUMENT_NUMBYTES, SPEC_NUMBYTES = 1 << 29, 1 << 22
"""Most bytes of an index, a manifest or a header, and of a spec: many times those of the largest models."""

BLOCK_NUMBYTES = 4096
"""Data begins on a multiple of this size, so that chunks can be written straight to the disk, whose blocks are rarely larger."""

PAGE_NUMBYTES = 64 << 10
"""The largest of the page sizes in use. No two ranks write to one page: on a network file system each has a copy of its own."""

LEAST_SHARED_NUMBYTES = 1 << 24
"""Bytes from which a copy is divided among threads, as many as torch has for one operation."""

PROBE_NUMBYTES = 1 << 20
"""Bytes to write as a probe: more than is left on a disk where a write has just failed."""

# Waiting

LOOK_SECONDS = 0.02
"""Seconds between two looks of a waiting rank. In a store or for a lock it couldn't handle signals."""

LOOK_UP_SECONDS = 0.2
"""Seconds between two looks at threads: a signal just before Python waits for a lock is handled only when the wait ends."""

SHORTEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.01, 1.0
"""Seconds between two looks for the other ranks' files. Each pause is twice as long as the one before it."""

TOLD_SECONDS, MOST_TOLD_SECONDS = 2.0, 60.0
"""Seconds before the first line of progress in a log, and at most between two. Each pause is twice the one before it."""

VISIBLE_SECONDS = 120.0
"""Seconds that a new folder may take to be seen on another machine: NFS keeps a folder's entries for up to 60, if not told
otherwise."""

REPLACING_SECONDS = 1.0
"""Far more time than the two renames of a save take."""

LOCK_SECONDS = 10.0
"""Seconds to wait for a folder's lock, which is held for less than a second."""

JOIN_SECONDS = 300.0
"""Seconds that the ranks may take to start; nodes of a queue don't start at once."""

LEAVE_SECONDS = 10.0
"""Seconds that a failed rank, or rank 0 at the end, waits for the others to stop: the longest that one takes for a chunk."""

BEAT_SECONDS = 5.0
"""Seconds between two signs of life of a rank."""

LOST_SECONDS = 60.0
"""Seconds that a rank may be silent. Launchers notice when a process ends, but not always when a machine does."""

NOTE_AGAIN_SECONDS = (0.05, 0.2, 1.0, 5.0, 30.0)
"""Pauses of a rank that finds a file of its own incomplete, since another rank writes it too."""
