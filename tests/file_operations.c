/* Counts the system calls that change files below a folder, logs each, and kills the process before the one it is told,
 * or waits before each of them.
 *
 *     arm(folder, n, log, ask, go)    from now on and for good
 *
 * n = 0 never kills. Where ask is a pipe, not -1, a byte is written to it before each of these calls, and one is awaited
 * from go. The log, which several processes can share, gets a line for each: what it is, one or two paths, the process
 * and its number there, separated by tabs. From before that until the call is made the process holds a lock, so that
 * the lines are in the order of the calls.
 *
 * A seccomp filter lets the kernel send SIGSYS instead of making such a call, whoever asks for it: libc, or Rust and C++
 * on their own. The handler makes the call itself, with a sixth argument, which these calls ignore, by which the filter
 * lets it pass. What a rename replaces is linked into the folder FOLDER.removed first: a loss of power may bring it
 * back.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define PASS 0x5eedL
#define CALL(number, a, b, c, d, e) syscall(number, a, b, c, d, e, PASS)

static const int trapped[] = {
    SYS_openat, SYS_write, SYS_pwrite64, SYS_writev, SYS_pwritev, SYS_sendfile, SYS_copy_file_range, SYS_ftruncate,
    SYS_truncate, SYS_fallocate, SYS_fsync, SYS_fdatasync, SYS_renameat2, SYS_linkat, SYS_symlinkat, SYS_mkdirat,
    SYS_unlinkat,
#ifdef SYS_open
    SYS_open, SYS_creat, SYS_rename, SYS_link, SYS_symlink, SYS_mkdir, SYS_unlink, SYS_rmdir,
#endif
#ifdef SYS_renameat
    SYS_renameat,
#endif
};
enum { TRAPPED = sizeof trapped / sizeof *trapped };

static char folder[PATH_MAX];
static long count, fatal;
static int record, asking, going;

static int inside(const char *path) {
    size_t n = strlen(folder);
    return strncmp(path, folder, n) == 0 && (path[n] == '/' || path[n] == 0);
}

/* The absolute path of a name, with the links in its folder resolved; empty where that is not below the folder. */
static const char *locate(int at, const char *name, char out[PATH_MAX]) {
    char link[64], base[PATH_MAX], joined[2 * PATH_MAX];
    out[0] = 0;
    if (name[0] == '/') {
        snprintf(joined, sizeof joined, "%s", name);
    } else {
        snprintf(link, sizeof link, at == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", at);
        ssize_t n = readlink(link, base, sizeof base - 1);
        base[n < 0 ? 0 : n] = 0;
        snprintf(joined, sizeof joined, "%s/%s", base, name);
    }
    char *last = strrchr(joined, '/');
    *last = 0;
    if (realpath(joined[0] ? joined : "/", base) == NULL) return out;
    if (snprintf(out, PATH_MAX, "%s/%s", base, last + 1) >= PATH_MAX || !inside(out)) out[0] = 0;
    return out;
}

static const char *located(int fd, char out[PATH_MAX]) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, out, PATH_MAX - 1);
    out[n < 0 ? 0 : n] = 0;
    if (!inside(out)) out[0] = 0;
    return out;
}

static int there(const char *path) {
    struct stat st;
    return lstat(path, &st) == 0;
}

/* The point before an operation, at which the process may end. */
static int point(const char *kind, const char *one, const char *two) {
    char line[3 * PATH_MAX];
    if (++count == fatal) {
        kill(getpid(), SIGKILL);
        for (;;) pause();
    }
    flock(record, LOCK_EX);
    if (asking >= 0) {
        CALL(SYS_write, asking, "?", 1, 0, 0);
        while (read(going, line, 1) < 0 && errno == EINTR) continue;
    }
    int n = snprintf(line, sizeof line, "%s\t%s\t%s\t%d-%ld\n", kind, one, two, getpid(), count);
    CALL(SYS_write, record, line, n, 0, 0);
    return 1;
}

/* These tell whether the call is one that counts. */

static int on_file(const char *kind, const char *path) {
    return path[0] && point(kind, path, "");
}

static int on_new(const char *kind, const char *path) {
    return path[0] && !there(path) && point(kind, path, "");
}

static int on_open(int at, const char *name, int flags) {
    char path[PATH_MAX];
    if (!(flags & (O_CREAT | O_TRUNC)) || !locate(at, name, path)[0]) return 0;
    if (!there(path)) return flags & O_CREAT && point("create", path, "");
    return flags & O_TRUNC && point("write", path, "");
}

static int on_move(int from_at, const char *from, int to_at, const char *to, unsigned flags) {
    char one[PATH_MAX], two[PATH_MAX], kept[PATH_MAX + 64];
    locate(from_at, from, one);
    locate(to_at, to, two);
    if ((!one[0] && !two[0]) || !there(from_at == AT_FDCWD ? from : one)) return 0;
    point(flags & 2 ? "exchange" : "rename", one, two);
    if (flags == 0 && two[0]) {
        snprintf(kept, sizeof kept, "%s.removed/%d-%ld", folder, getpid(), count);
        CALL(SYS_linkat, AT_FDCWD, two, AT_FDCWD, kept, 0);
    }
    return 1;
}

static int on_link(int from_at, const char *from, int to_at, const char *to) {
    char one[PATH_MAX], two[PATH_MAX];
    locate(from_at, from, one);
    return locate(to_at, to, two)[0] && !there(two) && there(from) && point("link", one, two);
}

static int on_removal(int at, const char *name) {
    char path[PATH_MAX];
    return locate(at, name, path)[0] && there(path) && point("remove", path, "");
}

static int notice(int number, const long *a) {
    char path[PATH_MAX];
#define NAME(i) ((const char *)a[i])
    switch (number) {
    case SYS_openat: return on_open(a[0], NAME(1), a[2]);
    case SYS_write: case SYS_pwrite64: case SYS_writev: case SYS_pwritev: case SYS_sendfile: case SYS_ftruncate:
    case SYS_fallocate: return on_file("write", located(a[0], path));
    case SYS_truncate: return on_file("write", locate(AT_FDCWD, NAME(0), path));
    case SYS_fsync: case SYS_fdatasync: return on_file("fsync", located(a[0], path));
    case SYS_renameat2: return on_move(a[0], NAME(1), a[2], NAME(3), a[4]);
    case SYS_linkat: return on_link(a[0], NAME(1), a[2], NAME(3));
    case SYS_symlinkat: return on_new("create", locate(a[1], NAME(2), path));
    case SYS_mkdirat: return on_new("folder", locate(a[0], NAME(1), path));
    case SYS_unlinkat: return on_removal(a[0], NAME(1));
#ifdef SYS_open
    case SYS_open: return on_open(AT_FDCWD, NAME(0), a[1]);
    case SYS_creat: return on_open(AT_FDCWD, NAME(0), O_CREAT | O_TRUNC);
    case SYS_rename: return on_move(AT_FDCWD, NAME(0), AT_FDCWD, NAME(1), 0);
    case SYS_link: return on_link(AT_FDCWD, NAME(0), AT_FDCWD, NAME(1));
    case SYS_symlink: return on_new("create", locate(AT_FDCWD, NAME(1), path));
    case SYS_mkdir: return on_new("folder", locate(AT_FDCWD, NAME(0), path));
    case SYS_unlink: case SYS_rmdir: return on_removal(AT_FDCWD, NAME(0));
#endif
#ifdef SYS_renameat
    case SYS_renameat: return on_move(a[0], NAME(1), a[2], NAME(3), 0);
#endif
    }
    return 0;
}

static void trap(int signal, siginfo_t *info, void *context) {
    (void)signal;
    int kept = errno;
#if defined __x86_64__
    greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
    long a[] = {r[REG_RDI], r[REG_RSI], r[REG_RDX], r[REG_R10], r[REG_R8]};
    greg_t *result = &r[REG_RAX];
#elif defined __aarch64__
    unsigned long long *r = ((ucontext_t *)context)->uc_mcontext.regs;
    long a[] = {r[0], r[1], r[2], r[3], r[4]};
    unsigned long long *result = &r[0];
#else
#error "registers of this machine"
#endif
    if (info->si_syscall == SYS_copy_file_range) {
        *result = -ENOSYS; /* its sixth argument is not ignored; everyone has another way */
    } else {
        int counts = notice(info->si_syscall, a);
        long done = CALL(info->si_syscall, a[0], a[1], a[2], a[3], a[4]);
        *result = done == -1 ? -errno : done;
        if (counts) flock(record, LOCK_UN);
    }
    errno = kept;
}

int arm(const char *path, long n, const char *log, int ask, int go) {
    struct sock_filter filter[2 * TRAPPED + 16];
    int i = 0;
    filter[i++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[5]));
    filter[i++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, PASS, 0, 1);
    filter[i++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    filter[i++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
    for (int k = 0; k < TRAPPED; k++) {
        filter[i++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, trapped[k], 0, 1);
        filter[i++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP);
    }
    /* Whoever takes this handler away (Lightning puts back all it knows of) is told that it is done. */
    filter[i++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_rt_sigaction, 0, 3);
    filter[i++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[0]));
    filter[i++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SIGSYS, 0, 1);
    filter[i++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | 0);
    filter[i++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    struct sock_fprog program = {i, filter};
    struct sigaction action = {.sa_sigaction = trap, .sa_flags = SA_SIGINFO | SA_NODEFER};
    snprintf(folder, sizeof folder, "%s", path);
    fatal = n;
    asking = ask;
    going = go;
    record = open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (record < 0 || sigaction(SIGSYS, &action, NULL) || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) return errno;
    return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) ? errno : 0;
}
