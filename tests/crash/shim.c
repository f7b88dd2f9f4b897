/* Kills its process at the n-th call that changes a file system, or has calls fail; loaded with LD_PRELOAD.
 *
 * shim_arm(n, when) starts counting: the n-th mutating call of the process dies before (when = 0), after (1), or, for a
 * write, after half of its bytes (2). shim_fail(n, error, sticky, kinds) has the n-th call of these kinds fail instead,
 * or, when sticky, each from there on; an error of 0 is a write that takes half of its bytes. shim_count() tells how
 * many calls there were. Writes to sockets and pipes do not count.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { BEFORE, AFTER, MIDDLE, FAIL, STICKY };
enum { CREATES = 1, WRITES = 2, NAMES = 4, REMOVALS = 8, ATTRIBUTES = 16, SYNCS = 32, OPENS = 64, READS = 128 };
#define CHANGES (CREATES | WRITES | NAMES | REMOVALS | ATTRIBUTES | SYNCS)

static atomic_long calls;
static atomic_long target = -1;
static atomic_int moment;
static atomic_int failure;
static atomic_int counted = CHANGES;

void shim_arm(long n, int when) { target = -1; moment = when; counted = CHANGES; calls = 0; target = n; }
void shim_fail(long n, int error, int sticky, int kinds) {
    target = -1; moment = sticky ? STICKY : FAIL; failure = error; counted = kinds; calls = 0; target = n; }
long shim_count(void) { return calls; }

static void die(void) { kill(getpid(), SIGKILL); for (;;) pause(); }

/* True when this call is the one to die in, or to fail. */
static int hit(int kind) {
    if (target < 0 || !(counted & kind)) return 0;
    long number = atomic_fetch_add(&calls, 1) + 1;
    return moment == STICKY ? number >= target : number == target;
}

/* What the program writes to its own output is no file of anybody's. */
static int is_file(int fd) {
    struct stat st;
    int saved = errno, result = fd > 2 && fstat(fd, &st) == 0 && S_ISREG(st.st_mode);
    errno = saved;
    return result;
}

/* Python's own modules, which it reads whenever it likes. */
static int is_code(const char *path) { return strstr(path, "/python3") || strstr(path, ".py") || strstr(path, ".so"); }
static int is_read(int fd) {
    char link[32], path[4096];
    int saved = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    errno = saved;
    path[size < 0 ? 0 : size] = 0;
    return is_file(fd) && !is_code(path);
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define FAILS(now) ((now) && moment >= FAIL && failure)
#define AROUND(kind, call) do { int now = hit(kind); if (now && moment == BEFORE) die(); \
    if (FAILS(now)) { errno = failure; return -1; } \
    __typeof__(call) result = (call); if (now && moment < FAIL) die(); return result; } while (0)
/* A write of `size` bytes; `part(n)` writes n of them. */
#define WRITING(size, part) do { int now = hit(WRITES); if (now && moment == BEFORE) die(); \
    if (FAILS(now)) { errno = failure; return -1; } \
    if (now && moment >= FAIL && size > 1) return part(size / 2); \
    if (now && moment == MIDDLE && size > 1) { part(size / 2); die(); } \
    ssize_t result = part(size); if (now && moment < FAIL) die(); return result; } while (0)

#define OPENED(path, flags) (flags & (O_CREAT | O_TRUNC) ? CREATES | OPENS : is_code(path) ? 0 : OPENS)
#define MODE(flags) mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { va_list a; va_start(a, flags); mode = va_arg(a, mode_t); va_end(a); }
#define OPEN(name) int name(const char *path, int flags, ...) { MODE(flags) REAL(name); \
    AROUND(OPENED(path, flags), real(path, flags, mode)); }
OPEN(open)
OPEN(open64)
#define OPENAT(name) int name(int dir, const char *path, int flags, ...) { MODE(flags) REAL(name); \
    AROUND(OPENED(path, flags), real(dir, path, flags, mode)); }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int fd, const void *buffer, size_t size) {
    REAL(write);
    if (target < 0 || !is_file(fd)) return real(fd, buffer, size);
#define PART(n) real(fd, buffer, n)
    WRITING(size, PART);
#undef PART
}

#define PWRITE(name, offset_type) ssize_t name(int fd, const void *buffer, size_t size, offset_type at) { \
    REAL(name); if (target < 0 || !is_file(fd)) return real(fd, buffer, size, at); WRITING(size, PART); }
#define PART(n) real(fd, buffer, n, at)
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)
#undef PART

ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(writev);
    if (target < 0 || !is_file(fd)) return real(fd, parts, count);
    AROUND(WRITES, real(fd, parts, count));
}

ssize_t copy_file_range(int in, off64_t *a, int out, off64_t *b, size_t size, unsigned flags) {
    REAL(copy_file_range);
#define PART(n) real(in, a, out, b, n, flags)
    WRITING(size, PART);
#undef PART
}

#define READING(call) do { \
    if (target < 0 || !(counted & READS) || !is_read(fd)) { return call; } \
    AROUND(READS, call); } while (0)
ssize_t read(int fd, void *buffer, size_t size) { REAL(read); READING(real(fd, buffer, size)); }
ssize_t pread(int fd, void *buffer, size_t size, off_t at) { REAL(pread); READING(real(fd, buffer, size, at)); }
ssize_t pread64(int fd, void *buffer, size_t size, off64_t at) { REAL(pread64); READING(real(fd, buffer, size, at)); }
ssize_t readv(int fd, const struct iovec *parts, int count) { REAL(readv); READING(real(fd, parts, count)); }
ssize_t preadv(int fd, const struct iovec *parts, int count, off_t at) {
    REAL(preadv); READING(real(fd, parts, count, at)); }
ssize_t preadv64(int fd, const struct iovec *parts, int count, off64_t at) {
    REAL(preadv64); READING(real(fd, parts, count, at)); }
ssize_t preadv2(int fd, const struct iovec *parts, int count, off_t at, int flags) {
    REAL(preadv2); READING(real(fd, parts, count, at, flags)); }
ssize_t preadv64v2(int fd, const struct iovec *parts, int count, off64_t at, int flags) {
    REAL(preadv64v2); READING(real(fd, parts, count, at, flags)); }

int ftruncate(int fd, off_t size) { REAL(ftruncate); AROUND(WRITES, real(fd, size)); }
int ftruncate64(int fd, off64_t size) { REAL(ftruncate64); AROUND(WRITES, real(fd, size)); }
int fsync(int fd) { REAL(fsync); AROUND(SYNCS, real(fd)); }
int fdatasync(int fd) { REAL(fdatasync); AROUND(SYNCS, real(fd)); }
int fchmod(int fd, mode_t mode) { REAL(fchmod); AROUND(ATTRIBUTES, real(fd, mode)); }
int fchmodat(int dir, const char *path, mode_t mode, int flags) { REAL(fchmodat); AROUND(ATTRIBUTES, real(dir, path, mode, flags)); }
int chmod(const char *path, mode_t mode) { REAL(chmod); AROUND(ATTRIBUTES, real(path, mode)); }
int futimens(int fd, const struct timespec t[2]) { REAL(futimens); AROUND(ATTRIBUTES, real(fd, t)); }
int utimensat(int dir, const char *path, const struct timespec t[2], int flags) {
    REAL(utimensat); AROUND(ATTRIBUTES, real(dir, path, t, flags)); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); AROUND(NAMES, real(path, mode)); }
int mkdirat(int dir, const char *path, mode_t mode) { REAL(mkdirat); AROUND(NAMES, real(dir, path, mode)); }
int rmdir(const char *path) { REAL(rmdir); AROUND(REMOVALS, real(path)); }
int unlink(const char *path) { REAL(unlink); AROUND(REMOVALS, real(path)); }
int unlinkat(int dir, const char *path, int flags) { REAL(unlinkat); AROUND(REMOVALS, real(dir, path, flags)); }
int rename(const char *from, const char *to) { REAL(rename); AROUND(NAMES, real(from, to)); }
int renameat(int a, const char *from, int b, const char *to) { REAL(renameat); AROUND(NAMES, real(a, from, b, to)); }
int link(const char *from, const char *to) { REAL(link); AROUND(NAMES, real(from, to)); }
int linkat(int a, const char *from, int b, const char *to, int flags) { REAL(linkat); AROUND(NAMES, real(a, from, b, to, flags)); }
int symlink(const char *to, const char *path) { REAL(symlink); AROUND(NAMES, real(to, path)); }
int symlinkat(const char *to, int dir, const char *path) { REAL(symlinkat); AROUND(NAMES, real(to, dir, path)); }
