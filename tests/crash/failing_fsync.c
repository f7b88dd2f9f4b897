/* Makes the n-th fsync or fdatasync of its process fail with EIO, once; loaded with LD_PRELOAD.
 *
 * failing_arm(n) starts counting; failing_count() tells how many there were, and failing_path() of which file the one
 * was that failed. As on Linux, the pages of the file count
 * as clean afterwards: the next fsync of the same descriptor says yes.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdio.h>
#include <unistd.h>

static atomic_long calls;
static atomic_long target = -1;
static char path[PATH_MAX];

void failing_arm(long n) { target = n; calls = 0; }
long failing_count(void) { return calls; }
const char *failing_path(void) { return path; }

static void remember(int fd) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    path[length < 0 ? 0 : length] = 0;
}

#define FAILING(name) int name(int fd) { \
    static int (*real)(int); if (!real) real = (int (*)(int))dlsym(RTLD_NEXT, #name); \
    if (target >= 0 && atomic_fetch_add(&calls, 1) + 1 == target) { remember(fd); errno = EIO; return -1; } \
    return real(fd); }
FAILING(fsync)
FAILING(fdatasync)
