"""Which system calls a locked-down worker may make, and their numbers on the machines we know.

A call that is not listed fails with "not permitted", or, from number 424 on, with "no such call", so that a C library
that tries a new one falls back on the old. The aarch64 numbers are the kernel's generic ones.
"""

ALLOWED = """
read write futex mmap munmap mprotect brk madvise mremap close lseek fstat newfstatat readv writev pread64
pwrite64 preadv pwritev stat lstat statx access faccessat faccessat2 readlink readlinkat getdents getdents64
getcwd chdir fchdir statfs fstatfs umask dup dup2 dup3 pipe pipe2 poll ppoll select pselect6 epoll_create
epoll_create1 epoll_ctl epoll_wait epoll_pwait eventfd eventfd2 sendfile copy_file_range fadvise64 flock fsync
fdatasync msync rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack
restart_syscall pause alarm getitimer setitimer timer_create timer_settime timer_gettime timer_getoverrun
timer_delete timerfd_create timerfd_settime timerfd_gettime nanosleep clock_gettime clock_getres clock_nanosleep
gettimeofday time times getrandom getpid getppid gettid getuid geteuid getgid getegid getresuid getresgid
getgroups getpgrp getpgid getsid getpriority getrusage getrlimit sysinfo uname getcpu sched_yield
sched_getaffinity sched_getparam sched_getscheduler sched_get_priority_max sched_get_priority_min
set_robust_list set_tid_address rseq wait4 waitid close_range exit exit_group
""".split()
"""Most frequent first: the filter is read from the top. No call here makes a process, a socket or shared memory, runs a
program, or reaches another process."""

WRITING = """
rename renameat renameat2 mkdir mkdirat rmdir unlink unlinkat link linkat symlink symlinkat chmod fchmod
fchmodat truncate ftruncate fallocate creat utime utimes futimesat utimensat
""".split()
"""Allowed only where everything that can be written is private memory."""


def _numbers(text: str) -> dict[str, int]:
    return {name: int(number) for name, _, number in (entry.partition("=") for entry in text.split())}


NUMBERS = {
    "x86_64": _numbers("""
access=21 alarm=37 brk=12 chdir=80 chmod=90 clock_getres=229 clock_gettime=228 clock_nanosleep=230 clone=56
clone3=435 close=3 close_range=436 copy_file_range=326 creat=85 dup=32 dup2=33 dup3=292 epoll_create=213
epoll_create1=291 epoll_ctl=233 epoll_pwait=281 epoll_wait=232 eventfd=284 eventfd2=290 exit=60 exit_group=231
faccessat=269 faccessat2=439 fadvise64=221 fallocate=285 fchdir=81 fchmod=91 fchmodat=268 fcntl=72 fdatasync=75
flock=73 fstat=5 fstatfs=138 fsync=74 ftruncate=77 futex=202 futimesat=261 getcpu=309
getcwd=79 getdents=78 getdents64=217 getegid=108 geteuid=107 getgid=104 getgroups=115 getitimer=36 getpgid=121
getpgrp=111 getpid=39 getppid=110 getpriority=140 getrandom=318 getresgid=120 getresuid=118 getrlimit=97
getrusage=98 getsid=124 gettid=186 gettimeofday=96 getuid=102 ioctl=16 kill=62 link=86 linkat=265 lseek=8
lstat=6 madvise=28 mkdir=83 mkdirat=258 mmap=9 mprotect=10 mremap=25 msync=26 munmap=11
nanosleep=35 newfstatat=262 open=2 openat=257 pause=34 pipe=22 pipe2=293 poll=7 ppoll=271 prctl=157 pread64=17
preadv=295 prlimit64=302 pselect6=270 pwrite64=18 pwritev=296 read=0 readlink=89 readlinkat=267 readv=19
rename=82 renameat=264 renameat2=316 restart_syscall=219 rmdir=84 rseq=334 rt_sigaction=13 rt_sigpending=127
rt_sigprocmask=14 rt_sigreturn=15 rt_sigsuspend=130 rt_sigtimedwait=128 sched_get_priority_max=146
sched_get_priority_min=147 sched_getaffinity=204 sched_getparam=143 sched_getscheduler=145 sched_yield=24
select=23 sendfile=40 set_robust_list=273 set_tid_address=218 setitimer=38 sigaltstack=131 stat=4 statfs=137
statx=332 symlink=88 symlinkat=266 sysinfo=99 tgkill=234 time=201 timer_create=222 timer_delete=226
timer_getoverrun=225 timer_gettime=224 timer_settime=223 timerfd_create=283 timerfd_gettime=287
timerfd_settime=286 times=100 truncate=76 umask=95 uname=63 unlink=87 unlinkat=263 utime=132 utimensat=280
utimes=235 wait4=61 waitid=247 write=1 writev=20
"""),
    "aarch64": _numbers("""
brk=214 chdir=49 clock_getres=114 clock_gettime=113 clock_nanosleep=115 clone=220 clone3=435 close=57
close_range=436 copy_file_range=285 dup=23 dup3=24 epoll_create1=20 epoll_ctl=21 epoll_pwait=22 eventfd2=19
exit=93 exit_group=94 faccessat=48 faccessat2=439 fadvise64=223 fallocate=47 fchdir=50 fchmod=52 fchmodat=53
fcntl=25 fdatasync=83 flock=32 fstat=80 fstatfs=44 fsync=82 ftruncate=46 futex=98 getcpu=168
getcwd=17 getdents64=61 getegid=177 geteuid=175 getgid=176 getgroups=158 getitimer=102 getpgid=155 getpid=172
getppid=173 getpriority=141 getrandom=278 getresgid=150 getresuid=148 getrlimit=163 getrusage=165 getsid=156
gettid=178 gettimeofday=169 getuid=174 ioctl=29 kill=129 linkat=37 lseek=62 madvise=233
mkdirat=34 mmap=222 mprotect=226 mremap=216 msync=227 munmap=215 nanosleep=101 newfstatat=79 openat=56 pipe2=59
ppoll=73 prctl=167 pread64=67 preadv=69 prlimit64=261 pselect6=72 pwrite64=68 pwritev=70 read=63 readlinkat=78
readv=65 renameat=38 renameat2=276 restart_syscall=128 rseq=293 rt_sigaction=134 rt_sigpending=136
rt_sigprocmask=135 rt_sigreturn=139 rt_sigsuspend=133 rt_sigtimedwait=137 sched_get_priority_max=125
sched_get_priority_min=126 sched_getaffinity=123 sched_getparam=121 sched_getscheduler=120 sched_yield=124
sendfile=71 set_robust_list=99 set_tid_address=96 setitimer=103 sigaltstack=132 statfs=43 statx=291 symlinkat=36
sysinfo=179 tgkill=131 timer_create=107 timer_delete=111 timer_getoverrun=109 timer_gettime=108
timer_settime=110 timerfd_create=85 timerfd_gettime=87 timerfd_settime=86 times=153 truncate=45 umask=166
uname=160 unlinkat=35 utimensat=88 wait4=260 waitid=95 write=64 writev=66
"""),
}  # fmt: skip
"""Generated from the kernel's headers; a machine lacks the calls that its kernel replaced."""

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
