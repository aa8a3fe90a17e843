//! The system calls that a program in the sandbox does without.

use libc::*;
use seccompiler::{
    BpfProgram, Error, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, apply_filter,
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

/// Refuses them to this process, and with them new processes; threads may be started.
pub(super) fn forbid() -> Result<(), Error> {
    let flag = |argument: u8, flag: c_int, value: c_int| {
        let masked = SeccompCmpOp::MaskedEq(flag as u64);
        let condition =
            SeccompCondition::new(argument, SeccompCmpArgLen::Dword, masked, value as u64)?;
        SeccompRule::new(vec![condition])
    };
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    rules.extend(FORBIDDEN.iter().chain(OLD).map(|&call| (call, Vec::new())));
    rules.insert(SYS_clone, vec![flag(0, CLONE_THREAD, 0)?]);
    // What tells the kernel to end a program with the one that started it stays as it is.
    let is_death_signal = SeccompCondition::new(
        0,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::Eq,
        PR_SET_PDEATHSIG as u64,
    )?;
    rules.insert(SYS_prctl, vec![SeccompRule::new(vec![is_death_signal])?]);
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
