/* Lets calls of the C library fail, for files below one folder: loaded with LD_PRELOAD by scripts/torture_disks.py, which switches it
 * on. It is off until `fault_arm` is called, and each process has a switch of its own. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { OPEN = 1, READ = 2, WRITE = 4, SYNC = 8, RENAME = 16, CLOSE = 32, MAP = 64, STAT = 128, LIST = 256, MAKE = 512,
       REMOVE = 1024, CUT = 2048, LOCK = 4096 };
enum { FAIL = 1, SHORT = 2, FULL = 3, CUTS = 4 };

static char folder[4096], cut_file[4096];
static size_t folder_length;
static unsigned armed_calls;
static long first, last, room;
static int armed_errno, armed_how;
static atomic_int armed;
static atomic_long seen[16], hits;
static __thread int inside;

/* Begin to count the calls, and let those from number `nth` to `until` fail. `how` FULL: let writes fail from `bytes` bytes on. */
void fault_arm(const char *prefix, unsigned calls, long nth, long until, int number, int how, long bytes, const char *file) {
    atomic_store(&armed, 0);
    snprintf(folder, sizeof folder, "%s", prefix);
    snprintf(cut_file, sizeof cut_file, "%s", file);
    folder_length = strlen(folder);
    armed_calls = calls, first = nth, last = until, room = bytes, armed_errno = number, armed_how = how;
    for (int kind = 0; kind < 16; kind++) atomic_store(&seen[kind], 0);
    atomic_store(&hits, 0);
    atomic_store(&armed, 1);
}

/* Switch off; return how many calls failed, and how many there were of each kind in `counts`. */
long fault_disarm(long *counts) {
    atomic_store(&armed, 0);
    for (int kind = 0; kind < 16; kind++) counts[kind] = atomic_load(&seen[kind]);
    return atomic_load(&hits);
}

static int below(const char *path) {
    return strncmp(path, folder, folder_length) == 0 && (path[folder_length] == '/' || path[folder_length] == 0);
}

static int name_of(int fd, char *path, size_t size) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, size - 1);
    path[length > 0 ? length : 0] = 0;
    return length > 0;
}

static int is_meant(const char *path, int dirfd) {
    char place[4096];
    if (path == NULL) return dirfd >= 0 && name_of(dirfd, place, sizeof place) && below(place);
    if (path[0] == '/') return below(path);
    return dirfd != AT_FDCWD && name_of(dirfd, place, sizeof place) && below(place);
}

/* Return how this call is to fail, 0 if it isn't. `path` NULL: the call is of the descriptor. */
static int fails(unsigned call, const char *path, int fd) {
    if (!atomic_load(&armed) || inside) return 0;
    int before = errno, how = 0;
    inside = 1;
    if (is_meant(path, fd)) {
        long number = atomic_fetch_add(&seen[__builtin_ctz(call)], 1) + 1;
        if ((armed_calls & call) && (armed_how == FULL || (number >= first && number <= last))) how = armed_how;
        if (how && how != FULL) atomic_fetch_add(&hits, 1);
        if (how == CUTS) {
            struct stat status;
            if (stat(cut_file, &status) == 0 && truncate(cut_file, status.st_size / 2) != 0) abort();
            how = 0;
        }
    }
    inside = 0;
    errno = before;
    if (how == FAIL) errno = armed_errno;
    return how;
}

/* Return how many of `count` bytes a read or write may have; -1 with errno if it fails. */
static ssize_t allowed(unsigned call, int fd, size_t count) {
    int how = fails(call, NULL, fd);
    if (how == FAIL) return -1;
    if (how == SHORT) return count > 1 ? (ssize_t)(count / 2) : (ssize_t)count;
    if (how != FULL) return count;
    long left = __sync_fetch_and_sub(&room, (long)count);
    if (left >= (long)count) return count;
    atomic_fetch_add(&hits, 1);
    if (left > 0) return left;
    errno = armed_errno;
    return -1;
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define MODE int mode = 0; if (flags & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, int); va_end(rest); }

#define OPENS(name) int name(const char *path, int flags, ...) { \
    REAL(name); MODE return fails(OPEN, path, AT_FDCWD) ? -1 : real(path, flags, mode); }
#define OPENATS(name) int name(int fd, const char *path, int flags, ...) { \
    REAL(name); MODE return fails(OPEN, path, fd) ? -1 : real(fd, path, flags, mode); }
#define FOPENS(name) FILE *name(const char *path, const char *mode) { \
    REAL(name); return fails(OPEN, path, AT_FDCWD) ? NULL : real(path, mode); }
OPENS(open) OPENS(open64) OPENATS(openat) OPENATS(openat64) FOPENS(fopen) FOPENS(fopen64)

#define TRANSFERS(kind, name, type) ssize_t name(int fd, type data, size_t count) { \
    REAL(name); ssize_t most = allowed(kind, fd, count); return most < 0 ? -1 : real(fd, data, most); }
#define PLACED(kind, name, type, place) ssize_t name(int fd, type data, size_t count, place offset) { \
    REAL(name); ssize_t most = allowed(kind, fd, count); return most < 0 ? -1 : real(fd, data, most, offset); }
TRANSFERS(READ, read, void *) TRANSFERS(WRITE, write, const void *)
PLACED(READ, pread, void *, off_t) PLACED(READ, pread64, void *, off64_t)
PLACED(WRITE, pwrite, const void *, off_t) PLACED(WRITE, pwrite64, const void *, off64_t)

static ssize_t vector(unsigned call, int fd, const struct iovec *parts, int count, long offset) {
    size_t numbytes = 0;
    for (int part = 0; part < count; part++) numbytes += parts[part].iov_len;
    ssize_t most = allowed(call, fd, numbytes);
    if (most < 0) return -1;
    if (most == (ssize_t)numbytes) return -2;
    size_t length = (size_t)most < parts[0].iov_len ? (size_t)most : parts[0].iov_len;
    inside = 1;
    ssize_t done = call == READ ? (offset < 0 ? read(fd, parts[0].iov_base, length) : pread(fd, parts[0].iov_base, length, offset))
                                : (offset < 0 ? write(fd, parts[0].iov_base, length) : pwrite(fd, parts[0].iov_base, length, offset));
    inside = 0;
    return done;
}
#define VECTORS(kind, name) ssize_t name(int fd, const struct iovec *parts, int count) { \
    REAL(name); ssize_t done = vector(kind, fd, parts, count, -1); return done == -2 ? real(fd, parts, count) : done; }
#define PLACED_VECTORS(kind, name, place) ssize_t name(int fd, const struct iovec *parts, int count, place offset) { \
    REAL(name); ssize_t done = vector(kind, fd, parts, count, offset); return done == -2 ? real(fd, parts, count, offset) : done; }
VECTORS(READ, readv) VECTORS(WRITE, writev) PLACED_VECTORS(READ, preadv, off_t) PLACED_VECTORS(READ, preadv64, off64_t)
PLACED_VECTORS(WRITE, pwritev, off_t) PLACED_VECTORS(WRITE, pwritev64, off64_t)

size_t fread(void *data, size_t size, size_t count, FILE *file) {
    REAL(fread);
    ssize_t most = allowed(READ, fileno(file), size * count);
    return most < 0 ? 0 : real(data, size, most / (size ? size : 1), file);
}
ssize_t sendfile(int out, int in, off_t *offset, size_t count) {
    REAL(sendfile);
    ssize_t most = allowed(WRITE, out, count);
    return most < 0 ? -1 : real(out, in, offset, most);
}
ssize_t sendfile64(int out, int in, off64_t *offset, size_t count) {
    REAL(sendfile64);
    ssize_t most = allowed(WRITE, out, count);
    return most < 0 ? -1 : real(out, in, offset, most);
}

#define OF_DESCRIPTOR(kind, name) int name(int fd) { REAL(name); return fails(kind, NULL, fd) ? -1 : real(fd); }
OF_DESCRIPTOR(SYNC, fsync) OF_DESCRIPTOR(SYNC, fdatasync)
int close(int fd) {
    REAL(close);
    int how = fails(CLOSE, NULL, fd), number = errno, done = real(fd);
    if (how) errno = number;
    return how ? -1 : done;
}
int flock(int fd, int operation) { REAL(flock); return fails(LOCK, NULL, fd) ? -1 : real(fd, operation); }

int rename(const char *old, const char *new) {
    REAL(rename);
    return fails(RENAME, old, AT_FDCWD) ? -1 : real(old, new);
}
int renameat(int fd, const char *old, int other, const char *new) {
    REAL(renameat);
    return fails(RENAME, old, fd) ? -1 : real(fd, old, other, new);
}
int renameat2(int fd, const char *old, int other, const char *new, unsigned flags) {
    REAL(renameat2);
    return fails(RENAME, old, fd) ? -1 : real(fd, old, other, new, flags);
}

#define MAPS(name, place) void *name(void *at, size_t length, int access, int flags, int fd, place offset) { \
    REAL(name); return fd >= 0 && fails(MAP, NULL, fd) ? MAP_FAILED : real(at, length, access, flags, fd, offset); }
MAPS(mmap, off_t) MAPS(mmap64, off64_t)

#define STATS(name, type) int name(const char *path, struct type *status) { \
    REAL(name); return fails(STAT, path, AT_FDCWD) ? -1 : real(path, status); }
#define FSTATS(name, type) int name(int fd, struct type *status) { REAL(name); return fails(STAT, NULL, fd) ? -1 : real(fd, status); }
STATS(stat, stat) STATS(stat64, stat64) STATS(lstat, stat) STATS(lstat64, stat64) FSTATS(fstat, stat) FSTATS(fstat64, stat64)

DIR *opendir(const char *path) { REAL(opendir); return fails(LIST, path, AT_FDCWD) ? NULL : real(path); }
struct dirent *readdir(DIR *list) { REAL(readdir); return fails(LIST, NULL, dirfd(list)) ? NULL : real(list); }
struct dirent64 *readdir64(DIR *list) { REAL(readdir64); return fails(LIST, NULL, dirfd(list)) ? NULL : real(list); }

int mkdir(const char *path, mode_t mode) { REAL(mkdir); return fails(MAKE, path, AT_FDCWD) ? -1 : real(path, mode); }
int mkdirat(int fd, const char *path, mode_t mode) { REAL(mkdirat); return fails(MAKE, path, fd) ? -1 : real(fd, path, mode); }
int unlink(const char *path) { REAL(unlink); return fails(REMOVE, path, AT_FDCWD) ? -1 : real(path); }
int rmdir(const char *path) { REAL(rmdir); return fails(REMOVE, path, AT_FDCWD) ? -1 : real(path); }
int unlinkat(int fd, const char *path, int flags) { REAL(unlinkat); return fails(REMOVE, path, fd) ? -1 : real(fd, path, flags); }
int ftruncate(int fd, off_t length) { REAL(ftruncate); return fails(CUT, NULL, fd) ? -1 : real(fd, length); }
int ftruncate64(int fd, off64_t length) { REAL(ftruncate64); return fails(CUT, NULL, fd) ? -1 : real(fd, length); }

static atomic_long clock_shift;
/* Let the process see a clock that is wrong by so many seconds. */
void fault_clock(long seconds) { atomic_store(&clock_shift, seconds); }
int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(clock_gettime);
    int done = real(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += atomic_load(&clock_shift);
    return done;
}
