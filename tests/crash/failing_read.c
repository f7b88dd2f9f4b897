/* Has reads of files fail with EIO; loaded with LD_PRELOAD.
 *
 * A read that goes beyond the n-th byte of a file NAME fails, under whatever path the file is, while the folder that the
 * variable FAILING_READS names has a file NAME of n bytes.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static int is_beyond(int fd, off_t end) {
    char link[32], path[4096], mark[8192];
    const char *folder = getenv("FAILING_READS");
    struct stat st;
    int saved = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = folder ? readlink(link, path, sizeof path - 1) : -1;
    path[length < 0 ? 0 : length] = 0;
    const char *name = strrchr(path, '/');
    snprintf(mark, sizeof mark, "%s%s", folder ? folder : "", name ? name : "");
    int result = name && strchr(name, 0) - name > 64 && stat(mark, &st) == 0 && end > st.st_size;
    errno = saved;
    return result;
}

static off_t length_of(const struct iovec *parts, int count) {
    off_t sum = 0;
    for (int i = 0; i < count; i++) sum += parts[i].iov_len;
    return sum;
}

#define READING(name, end, call) \
    static __typeof__(name) *real; if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name); \
    if (is_beyond(fd, end)) { errno = EIO; return -1; } \
    return call

ssize_t read(int fd, void *to, size_t size) {
    READING(read, lseek(fd, 0, SEEK_CUR) + (off_t)size, real(fd, to, size)); }
ssize_t pread(int fd, void *to, size_t size, off_t at) { READING(pread, at + (off_t)size, real(fd, to, size, at)); }
ssize_t pread64(int fd, void *to, size_t size, off64_t at) { READING(pread64, at + (off_t)size, real(fd, to, size, at)); }
#define VECTORS(name, offset) ssize_t name(int fd, const struct iovec *parts, int count, offset at) { \
    READING(name, at + length_of(parts, count), real(fd, parts, count, at)); }
VECTORS(preadv, off_t)
VECTORS(preadv64, off64_t)
#define VECTORS2(name, offset) ssize_t name(int fd, const struct iovec *parts, int count, offset at, int flags) { \
    READING(name, at + length_of(parts, count), real(fd, parts, count, at, flags)); }
VECTORS2(preadv2, off_t)
VECTORS2(preadv64v2, off64_t)
ssize_t copy_file_range(int fd, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
    READING(copy_file_range, *from + (off_t)size, real(fd, from, out, to, size, flags)); }
