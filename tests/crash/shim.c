/* Kills its process at the n-th call that changes a file system; loaded with LD_PRELOAD.
 *
 * shim_arm(n, when) starts counting: the n-th mutating call of the process dies before (when = 0), after (1), or, for a
 * write, after half of its bytes (2). shim_count() tells how many there were. Writes to sockets and pipes do not count.
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
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static atomic_long calls;
static atomic_long target = -1;
static atomic_int moment;

void shim_arm(long n, int when) { moment = when; target = n; calls = 0; }
long shim_count(void) { return calls; }

static void die(void) { kill(getpid(), SIGKILL); for (;;) pause(); }

/* True when this call is the one to die in. */
static int hit(void) { return target >= 0 && atomic_fetch_add(&calls, 1) + 1 == target; }

static int is_file(int fd) {
    struct stat st;
    int saved = errno, result = fstat(fd, &st) == 0 && S_ISREG(st.st_mode);
    errno = saved;
    return result;
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define AROUND(call) do { int now = hit(); if (now && moment == 0) die(); \
    __typeof__(call) result = (call); if (now) die(); return result; } while (0)

#define OPEN(name) int name(const char *path, int flags, ...) { \
    mode_t mode = 0; if (flags & (O_CREAT | O_TMPFILE)) { va_list a; va_start(a, flags); mode = va_arg(a, mode_t); va_end(a); } \
    REAL(name); if (!(flags & (O_CREAT | O_TRUNC))) return real(path, flags, mode); AROUND(real(path, flags, mode)); }
OPEN(open)
OPEN(open64)
#define OPENAT(name) int name(int dir, const char *path, int flags, ...) { \
    mode_t mode = 0; if (flags & (O_CREAT | O_TMPFILE)) { va_list a; va_start(a, flags); mode = va_arg(a, mode_t); va_end(a); } \
    REAL(name); if (!(flags & (O_CREAT | O_TRUNC))) return real(dir, path, flags, mode); AROUND(real(dir, path, flags, mode)); }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int fd, const void *buffer, size_t size) {
    REAL(write);
    if (target < 0 || !is_file(fd)) return real(fd, buffer, size);
    int now = hit();
    if (now && moment == 0) die();
    if (now && moment == 2 && size > 1) { real(fd, buffer, size / 2); die(); }
    ssize_t result = real(fd, buffer, size);
    if (now) die();
    return result;
}

#define PWRITE(name, offset_type) ssize_t name(int fd, const void *buffer, size_t size, offset_type at) { \
    REAL(name); if (target < 0 || !is_file(fd)) return real(fd, buffer, size, at); \
    int now = hit(); if (now && moment == 0) die(); \
    if (now && moment == 2 && size > 1) { real(fd, buffer, size / 2, at); die(); } \
    ssize_t result = real(fd, buffer, size, at); if (now) die(); return result; }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(writev);
    if (target < 0 || !is_file(fd)) return real(fd, parts, count);
    AROUND(real(fd, parts, count));
}

ssize_t copy_file_range(int in, off64_t *a, int out, off64_t *b, size_t size, unsigned flags) {
    REAL(copy_file_range); AROUND(real(in, a, out, b, size, flags)); }
int ftruncate(int fd, off_t size) { REAL(ftruncate); AROUND(real(fd, size)); }
int ftruncate64(int fd, off64_t size) { REAL(ftruncate64); AROUND(real(fd, size)); }
int fsync(int fd) { REAL(fsync); AROUND(real(fd)); }
int fdatasync(int fd) { REAL(fdatasync); AROUND(real(fd)); }
int fchmod(int fd, mode_t mode) { REAL(fchmod); AROUND(real(fd, mode)); }
int fchmodat(int dir, const char *path, mode_t mode, int flags) { REAL(fchmodat); AROUND(real(dir, path, mode, flags)); }
int chmod(const char *path, mode_t mode) { REAL(chmod); AROUND(real(path, mode)); }
int futimens(int fd, const struct timespec t[2]) { REAL(futimens); AROUND(real(fd, t)); }
int utimensat(int dir, const char *path, const struct timespec t[2], int flags) {
    REAL(utimensat); AROUND(real(dir, path, t, flags)); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); AROUND(real(path, mode)); }
int mkdirat(int dir, const char *path, mode_t mode) { REAL(mkdirat); AROUND(real(dir, path, mode)); }
int rmdir(const char *path) { REAL(rmdir); AROUND(real(path)); }
int unlink(const char *path) { REAL(unlink); AROUND(real(path)); }
int unlinkat(int dir, const char *path, int flags) { REAL(unlinkat); AROUND(real(dir, path, flags)); }
int rename(const char *from, const char *to) { REAL(rename); AROUND(real(from, to)); }
int renameat(int a, const char *from, int b, const char *to) { REAL(renameat); AROUND(real(a, from, b, to)); }
int link(const char *from, const char *to) { REAL(link); AROUND(real(from, to)); }
int linkat(int a, const char *from, int b, const char *to, int flags) { REAL(linkat); AROUND(real(a, from, b, to, flags)); }
int symlink(const char *to, const char *path) { REAL(symlink); AROUND(real(to, path)); }
int symlinkat(const char *to, int dir, const char *path) { REAL(symlinkat); AROUND(real(to, dir, path)); }
