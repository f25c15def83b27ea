// A disk as slow as a test wants, for one folder: preloaded into the server, it makes reading take its time.
//
// SLOW_DISK_FOLDER  files below it are slow
// SLOW_DISK_RATE    a file of 8 bytes: a double, bytes per second; 0: as fast as the disk is; below 0: it hangs
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

static volatile double *rate;
static const char *folder;
__attribute__((constructor)) static void begin(void) {
  // A copy: a process that sets its title writes over its environment.
  folder = getenv("SLOW_DISK_FOLDER") ? strdup(getenv("SLOW_DISK_FOLDER")) : 0;
  const char *path = getenv("SLOW_DISK_RATE");
  int file = path ? open(path, O_RDONLY) : -1;
  if (folder && file >= 0) rate = mmap(0, sizeof(double), PROT_READ, MAP_SHARED, file, 0);
  if (rate == MAP_FAILED) abort();
}

static int is_slow(int descriptor) {
  char link[64], path[4096];
  if (!rate) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, sizeof path - 1);
  return length > 0 && (path[length] = 0, strncmp(path, folder, strlen(folder)) == 0);
}

static ssize_t slowly(ssize_t done) {
  double owed_s = 0, step_s = 0.01;
  while (*rate < 0 || (*rate > 0 && done > 0 && owed_s < done / *rate)) {
    usleep(step_s * 1e6);
    owed_s += step_s;
  }
  return done;
}

// A slow disk's reads are short, so that a hang begins soon.
static size_t shorter(size_t count) { return count > 65536 ? 65536 : count; }

ssize_t read(int descriptor, void *buffer, size_t count) {
  static ssize_t (*real)(int, void *, size_t);
  if (!real) real = (ssize_t (*)(int, void *, size_t))dlsym(RTLD_NEXT, "read");
  if (!is_slow(descriptor)) return real(descriptor, buffer, count);
  return slowly(real(descriptor, buffer, shorter(count)));
}

// What os.preadv of Python calls.
ssize_t preadv2(int descriptor, const struct iovec *parts, int num_parts, off_t offset, int flags) {
  static ssize_t (*real)(int, const struct iovec *, int, off_t, int);
  if (!real) real = (ssize_t (*)(int, const struct iovec *, int, off_t, int))dlsym(RTLD_NEXT, "preadv2");
  if (!is_slow(descriptor)) return real(descriptor, parts, num_parts, offset, flags);
  struct iovec first = {parts[0].iov_base, shorter(parts[0].iov_len)};
  return slowly(real(descriptor, &first, 1, offset, flags));
}

ssize_t preadv64v2(int descriptor, const struct iovec *parts, int num_parts, off_t offset, int flags) {
  return preadv2(descriptor, parts, num_parts, offset, flags);
}

ssize_t preadv(int descriptor, const struct iovec *parts, int num_parts, off_t offset) {
  return preadv2(descriptor, parts, num_parts, offset, 0);
}

ssize_t preadv64(int descriptor, const struct iovec *parts, int num_parts, off_t offset) {
  return preadv2(descriptor, parts, num_parts, offset, 0);
}
