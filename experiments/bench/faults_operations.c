/* Counts the storage operations of a process, and dies before the n-th one.

   Loaded with LD_PRELOAD, so that it sees what Python, SQLite, TensorStore and
   Orbax ask of the C library. Nothing is counted before `faults_arm`. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX], call[64], place[64];
static size_t length;
static atomic_int armed;
static atomic_long count, limit;
static int list = -1;

/* Dies before the n-th operation below a path, or, if a call and a part of a
   path are given, before the n-th such call on such a path. */
void faults_arm(const char *path, long n, int fd, const char *what,
                const char *part) {
  strncpy(root, path, sizeof root - 1);
  strncpy(call, what, sizeof call - 1);
  strncpy(place, part, sizeof place - 1);
  length = strlen(root);
  atomic_store(&count, 0);
  atomic_store(&limit, n);
  list = fd;
  atomic_store(&armed, 1);
}

void faults_disarm(void) { atomic_store(&armed, 0); }

static ssize_t (*real_write)(int, const void *, size_t);

static void step(const char *what, const char *path) {
  if (strncmp(path, root, length) != 0) return;
  int meant = !*call || (!strcmp(what, call) && strstr(path + length, place));
  long n = meant ? atomic_fetch_add(&count, 1) : -2;
  if (list >= 0) {
    /* The one it dies of is marked: others may still be listed after it. */
    char line[PATH_MAX + 64];
    int size = snprintf(line, sizeof line, "%s%s %s\n",
                        n == atomic_load(&limit) ? "!" : "", what,
                        path + length);
    if (!real_write) real_write = dlsym(RTLD_NEXT, "write");
    real_write(list, line, size);
  }
  if (n == atomic_load(&limit)) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
  }
}

static void step_fd(const char *what, int fd) {
  char name[64], path[PATH_MAX];
  if (!atomic_load(&armed) || fd == list) return;
  snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
  ssize_t size = readlink(name, path, sizeof path - 1);
  if (size <= 0) return;
  path[size] = 0;
  step(what, path);
}

static void step_at(const char *what, int folder, const char *path) {
  char name[64], whole[2 * PATH_MAX];
  if (!atomic_load(&armed) || !path) return;
  if (path[0] == '/' || folder == AT_FDCWD) {
    step(what, path);
    return;
  }
  snprintf(name, sizeof name, "/proc/self/fd/%d", folder);
  ssize_t size = readlink(name, whole, PATH_MAX - 1);
  if (size <= 0) return;
  snprintf(whole + size, sizeof whole - size, "/%s", path);
  step(what, whole);
}

#define REAL(name) \
  static __typeof__(&name) real; \
  if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define WRITES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))

#define OPEN(name) \
  int name(const char *path, int flags, ...) { \
    REAL(name); \
    va_list rest; \
    va_start(rest, flags); \
    mode_t mode = va_arg(rest, mode_t); \
    va_end(rest); \
    if (WRITES(flags)) step_at("open", AT_FDCWD, path); \
    return real(path, flags, mode); \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
  int name(int folder, const char *path, int flags, ...) { \
    REAL(name); \
    va_list rest; \
    va_start(rest, flags); \
    mode_t mode = va_arg(rest, mode_t); \
    va_end(rest); \
    if (WRITES(flags)) step_at("open", folder, path); \
    return real(folder, path, flags, mode); \
  }
OPENAT(openat)
OPENAT(openat64)

#define ON_PATH(name, what, type, parameters, arguments, folder, path) \
  type name parameters { \
    REAL(name); \
    step_at(what, folder, path); \
    return real arguments; \
  }
ON_PATH(mkdir, "mkdir", int, (const char *p, mode_t m), (p, m), AT_FDCWD, p)
ON_PATH(mkdirat, "mkdir", int, (int d, const char *p, mode_t m), (d, p, m), d, p)
ON_PATH(rmdir, "rmdir", int, (const char *p), (p), AT_FDCWD, p)
ON_PATH(unlink, "unlink", int, (const char *p), (p), AT_FDCWD, p)
ON_PATH(unlinkat, "unlink", int, (int d, const char *p, int f), (d, p, f), d, p)
ON_PATH(rename, "rename", int, (const char *p, const char *q), (p, q), AT_FDCWD, q)
ON_PATH(renameat, "rename", int, (int d, const char *p, int e, const char *q), (d, p, e, q), e, q)
ON_PATH(renameat2, "rename", int, (int d, const char *p, int e, const char *q, unsigned f), (d, p, e, q, f), e, q)
ON_PATH(link, "link", int, (const char *p, const char *q), (p, q), AT_FDCWD, q)
ON_PATH(truncate, "truncate", int, (const char *p, off_t n), (p, n), AT_FDCWD, p)
ON_PATH(utimensat, "touch", int, (int d, const char *p, const struct timespec *t, int f), (d, p, t, f), d, p)

#define ON_FD(name, what, type, parameters, arguments) \
  type name parameters { \
    REAL(name); \
    step_fd(what, fd); \
    return real arguments; \
  }
ON_FD(write, "write", ssize_t, (int fd, const void *b, size_t n), (fd, b, n))
ON_FD(writev, "write", ssize_t, (int fd, const struct iovec *v, int n), (fd, v, n))
ON_FD(pwrite, "write", ssize_t, (int fd, const void *b, size_t n, off_t o), (fd, b, n, o))
ON_FD(pwrite64, "write", ssize_t, (int fd, const void *b, size_t n, off64_t o), (fd, b, n, o))
ON_FD(pwritev, "write", ssize_t, (int fd, const struct iovec *v, int n, off_t o), (fd, v, n, o))
ON_FD(ftruncate, "truncate", int, (int fd, off_t n), (fd, n))
ON_FD(ftruncate64, "truncate", int, (int fd, off64_t n), (fd, n))
ON_FD(fsync, "sync", int, (int fd), (fd))
ON_FD(fdatasync, "sync", int, (int fd), (fd))
