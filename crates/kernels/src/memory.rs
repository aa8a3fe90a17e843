//! How the process allocates: a training step frees and asks again for the same large buffers.

/// Makes the C library keep freed memory instead of returning it to the system.
///
/// Otherwise every activation and gradient of some megabytes is mapped, cleared by the kernel page
/// by page, and unmapped again, which costs as much as the arithmetic of a small model. Call it
/// once at the start of a program; the process then holds on to its peak of memory. It does
/// nothing where the C library is not glibc.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: `mallopt` takes plain integers and may be called at any time.
    unsafe {
        // No single allocation is mapped on its own, and the heap never shrinks. Versions of glibc
        // that limit the first to 32 MiB refuse the second call and keep the first.
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
    }
}
