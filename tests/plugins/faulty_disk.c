/* For LD_PRELOAD: makes the k-th write, fsync or rename below a directory fail, as a full or broken disk does. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITE = 0, FSYNC = 1, RENAME = 2 };

static char below[PATH_MAX];
static int operation = -1, number, lasting;
static long kth, seen;

/* From now on: the k-th operation of this kind below `path` fails with `error_number`; with `stays`, all later ones too.
   k = 0 only counts. */
void fault_arm(const char *path, int kind, long k, int error_number, int stays) {
    snprintf(below, sizeof below, "%s/", path);
    operation = kind, kth = k, number = error_number, lasting = stays, seen = 0;
}

long fault_seen(void) { return seen; }

static int inside(const char *path) { return strncmp(path, below, strlen(below)) == 0; }

static int inside_descriptor(int descriptor) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 2);
    if (length <= 0) return 0;
    path[length] = '/', path[length + 1] = 0; /* the directory itself counts */
    return inside(path);
}

static int fails(int kind, int concerned) {
    if (operation != kind || !concerned) return 0;
    seen++;
    if (kth == 0 || (lasting ? seen < kth : seen != kth)) return 0;
    errno = number;
    return 1;
}

#define REAL(type, name, ...) ((type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t n) {
    if (fails(WRITE, operation == WRITE && inside_descriptor(fd))) return -1;
    return REAL(ssize_t, write, int, const void *, size_t)(fd, data, n);
}

ssize_t pwrite(int fd, const void *data, size_t n, off_t at) {
    if (fails(WRITE, operation == WRITE && inside_descriptor(fd))) return -1;
    return REAL(ssize_t, pwrite, int, const void *, size_t, off_t)(fd, data, n, at);
}

ssize_t pwrite64(int fd, const void *data, size_t n, off64_t at) {
    if (fails(WRITE, operation == WRITE && inside_descriptor(fd))) return -1;
    return REAL(ssize_t, pwrite64, int, const void *, size_t, off64_t)(fd, data, n, at);
}

int fsync(int fd) {
    if (fails(FSYNC, operation == FSYNC && inside_descriptor(fd))) return -1;
    return REAL(int, fsync, int)(fd);
}

int fdatasync(int fd) {
    if (fails(FSYNC, operation == FSYNC && inside_descriptor(fd))) return -1;
    return REAL(int, fdatasync, int)(fd);
}

int rename(const char *from, const char *to) {
    if (fails(RENAME, operation == RENAME && inside(to))) return -1;
    return REAL(int, rename, const char *, const char *)(from, to);
}

int renameat(int from_fd, const char *from, int to_fd, const char *to) {
    if (fails(RENAME, operation == RENAME && inside(to))) return -1;
    return REAL(int, renameat, int, const char *, int, const char *)(from_fd, from, to_fd, to);
}
