"""System calls that shut a process in: Linux namespaces, a root of its own, a system call filter. Standard library
only.

Everything here acts on the calling process and raises `OSError` naming the step that the system refused. The order is
that of `rewards.sandbox_runner`. Needs no privileges where user namespaces are allowed; root gives its own up first.
"""

import ctypes
import os
import platform
import resource
import stat
import struct
from collections.abc import Sequence

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x20000000,
                                                  0x40000000)
NOBODY = 65534
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE, MS_REMOUNT = 1, 2, 4, 4096, 16384, 1 << 18, 32
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 22, 36, 38
SYS_MOUNT_SETATTR = 442  # the same on all machines; Linux 5.12. A limit on processes by user namespace: 5.14
AT_RECURSIVE = 0x8000
SCRATCH = "/scratch"

_libc = ctypes.CDLL(None, use_errno=True) if platform.system() == "Linux" else None


def _call(step: str, function: str, *args: object) -> None:
    if _libc is None:
        raise OSError(f"{step}: only Linux has namespaces")
    if getattr(_libc, function)(*args) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{step}: {os.strerror(code)}")


def die_with_parent() -> None:
    _call("prctl", "prctl", PR_SET_PDEATHSIG, 9, 0, 0, 0)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ended: in a container nobody else may wait for them."""
    _call("prctl", "prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def enter_namespaces() -> None:
    """Own mounts, processes, network (without any device that is up), IPC and host name. Without privileges all of it
    under an own user namespace, in which this process may do what follows."""
    flags = NEWNS | NEWUTS | NEWIPC | NEWPID | NEWNET
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        _call("unshare", "unshare", flags)
        return
    _call("unshare (user namespace)", "unshare", flags | NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as f:
            f.write(text)


def build_root(folder: str, visible: Sequence[str], scratch_bytes: int) -> None:
    """Make `folder` the root: `visible` files and folders of the old one read-only at their own paths, four devices,
    and an empty scratch folder in memory, the one place that can be written. No /proc, no /sys, no /etc."""
    _call("mount (private)", "mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    _call("mount (root)", "mount", b"tmpfs", folder.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, b"size=1m,mode=755")
    bound: list[str] = []
    for path in sorted(visible):
        if not any(path == b or path.startswith(f"{b}/") for b in bound):
            bound += [path] * _show(folder, path)
    for path in ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"):
        _show(folder, path)
    os.mkdir(folder + SCRATCH)
    if not os.path.lexists(f"{folder}/tmp"):  # something visible may lie there
        os.symlink(SCRATCH, f"{folder}/tmp")
    _call("mount (scratch)", "mount", b"tmpfs", (folder + SCRATCH).encode(), b"tmpfs", MS_NOSUID | MS_NODEV,
          f"size={scratch_bytes},nr_inodes=4096,mode=1777".encode())
    os.chdir(folder)
    _call("pivot_root", "pivot_root", b".", b".")
    _call("umount", "umount2", b".", MNT_DETACH)
    os.chdir("/")
    _call("mount (read-only root)", "mount", None, b"/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV,
          None)


def _show(folder: str, path: str) -> bool:
    """Bind `path` under `folder`, read-only with everything mounted below it. False where it is a link: a copy of the
    link stands there, and what it leads to must be shown itself."""
    target = folder + path
    os.makedirs(os.path.dirname(target), exist_ok=True)
    kind = os.lstat(path).st_mode
    if stat.S_ISLNK(kind):
        os.symlink(os.readlink(path), target)
        return False
    if stat.S_ISDIR(kind):
        os.mkdir(target)
    else:
        open(target, "w").close()
    _call(f"mount ({path})", "mount", path.encode(), target.encode(), None, MS_BIND | MS_REC, None)
    if not stat.S_ISCHR(kind):
        attributes = struct.pack("4Q", MS_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)
        _call(f"mount_setattr ({path})", "syscall", SYS_MOUNT_SETATTR, -100, target.encode(), AT_RECURSIVE, attributes,
              len(attributes))
    return True


def drop_privileges() -> None:
    """Become nobody where this is root, in a user namespace of its own: processes are counted in it alone, so that
    their limit binds, and no identity is mapped into it."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    _call("unshare (user namespace)", "unshare", NEWUSER)
    _call("no_new_privs", "prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def limit(*, cpu: float, memory: int, file: int, processes: int | None, files: int = 64) -> None:
    """Resource limits of this process and what it starts. `processes` counts threads."""
    seconds = max(1, int(-(-cpu // 1)))
    bounds = {resource.RLIMIT_CPU: (seconds, seconds + 1), resource.RLIMIT_AS: (memory, memory),
              resource.RLIMIT_FSIZE: (file, file), resource.RLIMIT_NOFILE: (files, files),
              resource.RLIMIT_CORE: (0, 0), resource.RLIMIT_MEMLOCK: (0, 0)}
    if hasattr(resource, "RLIMIT_MSGQUEUE"):
        bounds[resource.RLIMIT_MSGQUEUE] = (0, 0)
    if processes is not None:
        bounds[resource.RLIMIT_NPROC] = (processes, processes)
    for what, bound in bounds.items():
        resource.setrlimit(what, bound)


# System calls by machine: those that are never needed here and open ways to the kernel or to other processes.
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_REFUSED = {
    "x86_64": (101, 155, 165, 166, 175, 246, 248, 249, 250, 272, 298, 308, 310, 311, 313, 321, 323),
    "aarch64": (117, 41, 40, 39, 105, 104, 217, 218, 219, 97, 241, 268, 270, 271, 273, 280, 282),
}  # ptrace pivot_root mount umount2 init_module kexec_load add_key request_key keyctl unshare perf_event_open setns
#    process_vm_readv process_vm_writev finit_module bpf userfaultfd
_REFUSED_EVERYWHERE = (*range(425, 434), 442)  # io_uring (3), open_tree to fspick, mount_setattr
_SOCKET, _CLONE, _CLONE3 = {"x86_64": 41, "aarch64": 198}, {"x86_64": 56, "aarch64": 220}, 435
_LOAD, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = _ERRNO | 1, _ERRNO | 38


def filter_calls() -> None:
    """Refuse system calls for mounting, namespaces, tracing and kernel modules, and every socket but local ones (a
    network namespace does not hold all families: vsock)."""
    machine = platform.machine()
    if machine not in _AUDIT:
        raise OSError(f"no system call filter for {machine}; there is one for {', '.join(_AUDIT)}")
    new = NEWNS | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET
    program = [(_LOAD, 0, 0, 4), (_JEQ, 1, 0, _AUDIT[machine]), (_RET, 0, 0, _KILL), (_LOAD, 0, 0, 0),
               (_JGE, 0, 1, 0x40000000), (_RET, 0, 0, _EPERM)]  # x32
    for number in (*_REFUSED[machine], *_REFUSED_EVERYWHERE):
        program += [(_JEQ, 0, 1, number), (_RET, 0, 0, _EPERM)]
    program += [(_JEQ, 0, 1, _CLONE3), (_RET, 0, 0, _ENOSYS)]  # libc falls back to clone, whose flags can be read
    # the first argument's low word is at offset 16
    program += [(_JEQ, 0, 4, _SOCKET[machine]), (_LOAD, 0, 0, 16), (_JEQ, 1, 0, 1), (_RET, 0, 0, _EPERM),
                (_RET, 0, 0, _ALLOW)]
    program += [(_JEQ, 0, 4, _CLONE[machine]), (_LOAD, 0, 0, 16), (_JSET, 0, 1, new), (_RET, 0, 0, _EPERM),
                (_RET, 0, 0, _ALLOW), (_RET, 0, 0, _ALLOW)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    _call("seccomp", "prctl", PR_SET_SECCOMP, 2, header, 0, 0)
