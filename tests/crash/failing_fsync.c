/* Makes the n-th fsync or fdatasync of its process fail with EIO, once; loaded with LD_PRELOAD.
 *
 * failing_arm(n) starts counting; failing_count() tells how many there were. As on Linux, the pages of the file count
 * as clean afterwards: the next fsync of the same descriptor says yes.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <unistd.h>

static atomic_long calls;
static atomic_long target = -1;

void failing_arm(long n) { target = n; calls = 0; }
long failing_count(void) { return calls; }

#define FAILING(name) int name(int fd) { \
    static int (*real)(int); if (!real) real = (int (*)(int))dlsym(RTLD_NEXT, #name); \
    if (target >= 0 && atomic_fetch_add(&calls, 1) + 1 == target) { errno = EIO; return -1; } \
    return real(fd); }
FAILING(fsync)
FAILING(fdatasync)
