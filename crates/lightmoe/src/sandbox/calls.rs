//! The system calls that a program in the sandbox does without.

use libc::*;
use seccompiler::{
    BpfProgram, Error, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, apply_filter, sock_filter,
};
use std::collections::BTreeMap;

/// Calls of the kernel that libc has no names for everywhere; their numbers are the same everywhere.
const FCHMODAT2: i64 = 452;
const SETXATTRAT: i64 = 463;
const REMOVEXATTRAT: i64 = 466;
const FILE_SETATTR: i64 = 469;

/// Refused to all.
const FORBIDDEN: &[i64] = &[
    // Sockets, also those that have names in the file system.
    SYS_socket,
    SYS_io_uring_setup,
    // What is known of files besides what they hold, which Landlock leaves alone.
    SYS_fchmod,
    SYS_fchmodat,
    FCHMODAT2,
    SYS_fchown,
    SYS_fchownat,
    SYS_utimensat,
    SYS_setxattr,
    SYS_lsetxattr,
    SYS_fsetxattr,
    SETXATTRAT,
    SYS_removexattr,
    SYS_lremovexattr,
    SYS_fremovexattr,
    REMOVEXATTRAT,
    FILE_SETATTR,
    // Memory that no limit counts.
    SYS_memfd_create,
    SYS_memfd_secret,
    SYS_shmget,
    SYS_mq_open,
    // Ways into other processes, namespaces and the kernel.
    SYS_unshare,
    SYS_setns,
    SYS_mount,
    SYS_fsopen,
    SYS_open_tree,
    SYS_move_mount,
    SYS_mount_setattr,
    SYS_pivot_root,
    SYS_chroot,
    SYS_ptrace,
    SYS_process_vm_readv,
    SYS_process_vm_writev,
    SYS_pidfd_getfd,
    SYS_open_by_handle_at,
    SYS_bpf,
    SYS_perf_event_open,
    SYS_userfaultfd,
    SYS_add_key,
    SYS_request_key,
    SYS_keyctl,
];

/// Older forms of some, which newer machines do not have.
#[cfg(target_arch = "x86_64")]
const OLD: &[i64] = &[
    SYS_fork,
    SYS_vfork,
    SYS_chmod,
    SYS_chown,
    SYS_lchown,
    SYS_utime,
    SYS_utimes,
    SYS_futimesat,
];
#[cfg(not(target_arch = "x86_64"))]
const OLD: &[i64] = &[];

/// What Python asks of files that it has open. All other requests are refused: they type into a terminal,
/// set it, or set what is known of a file.
const REQUESTS: [c_uint; 7] = [
    TCGETS as c_uint,
    TIOCGWINSZ as c_uint,
    FIONREAD as c_uint,
    FIONBIO as c_uint,
    FIOCLEX as c_uint,
    FIONCLEX as c_uint,
    FICLONE as c_uint,
];

/// The bit of the numbers by which some kernels offer all calls of x86-64 once more (x32), several under
/// numbers of their own.
#[cfg(target_arch = "x86_64")]
const X32: u32 = 0x4000_0000;

/// Refuses them to this process, and with them new processes; threads may be started.
pub(super) fn forbid() -> Result<(), Error> {
    let is = |argument: u8, comparison: SeccompCmpOp, value: u64| {
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, comparison, value)
    };
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    rules.extend(FORBIDDEN.iter().chain(OLD).map(|&call| (call, Vec::new())));
    let starts_no_thread = is(0, SeccompCmpOp::MaskedEq(CLONE_THREAD as u64), 0)?;
    rules.insert(SYS_clone, vec![SeccompRule::new(vec![starts_no_thread])?]);
    // What tells the kernel to end a program with the one that started it stays as it is.
    let is_death_signal = is(0, SeccompCmpOp::Eq, PR_SET_PDEATHSIG as u64)?;
    rules.insert(SYS_prctl, vec![SeccompRule::new(vec![is_death_signal])?]);
    let others = REQUESTS.map(|request| is(1, SeccompCmpOp::Ne, u64::from(request)));
    let is_another = others.into_iter().collect::<Result<_, _>>()?;
    rules.insert(SYS_ioctl, vec![SeccompRule::new(is_another)?]);
    #[cfg(target_arch = "x86_64")]
    forbid_x32()?;
    apply(rules, EPERM)?;
    // Its arguments are out of a filter's sight; without it, libc takes the older call.
    apply(BTreeMap::from([(SYS_clone3, Vec::new())]), ENOSYS)
}

fn apply(rules: BTreeMap<i64, Vec<SeccompRule>>, error: c_int) -> Result<(), Error> {
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Allow,
        SeccompAction::Errno(error as u32),
        std::env::consts::ARCH.try_into()?,
    )?;
    let program: BpfProgram = filter.try_into()?;
    apply_filter(&program)
}

/// Refuses all numbers with the bit of x32, which the filters of seccompiler take for unknown calls.
#[cfg(target_arch = "x86_64")]
fn forbid_x32() -> Result<(), Error> {
    let instruction = |code: u32, otherwise: u8, k: u32| sock_filter {
        code: code as u16,
        jt: 0,
        jf: otherwise,
        k,
    };
    apply_filter(&[
        // The number is the first field of what a filter is shown.
        instruction(BPF_LD | BPF_W | BPF_ABS, 0, 0),
        instruction(BPF_JMP | BPF_JSET | BPF_K, 1, X32),
        instruction(BPF_RET | BPF_K, 0, SECCOMP_RET_ERRNO | EPERM as u32),
        instruction(BPF_RET | BPF_K, 0, SECCOMP_RET_ALLOW),
    ])
}
