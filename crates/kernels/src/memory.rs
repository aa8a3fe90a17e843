//! How the process allocates and threads: a training step frees and asks again for the same large
//! buffers, and runs hundreds of small operations.

/// Makes the C library keep freed memory instead of returning it to the system.
///
/// Otherwise every activation and gradient of some megabytes is mapped, cleared by the kernel page
/// by page, and unmapped again, which costs as much as the arithmetic of a small model. Call it
/// once at the start of a program; the process then holds on to its peak of memory until
/// [`return_freed_memory`] is called. It does nothing where the C library is not glibc.
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

/// Returns to the system what was freed and [`keep_freed_memory`] has kept, also between what is still in use.
///
/// Buffers of many sizes that come and go leave gaps, which grow from layer to layer: call it between
/// steps of work that must keep to a limit. It does nothing where the C library is not glibc.
pub fn return_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: `malloc_trim` may be called at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Tunes the process for training and inference; to be called first thing in `main`.
///
/// Besides [`keep_freed_memory`], it keeps candle's own element-wise operations on one thread, unless
/// `CANDLE_NUM_THREADS` says otherwise: their thread pool waits by spinning, which costs more than it
/// brings beside our operations, and slows everything down where cores are shared. And it makes the
/// calling thread one of rayon's, which hands no work over on one core and one part less on several;
/// other threads may use rayon only while this one waits for none of them.
pub fn tune_process() {
    keep_freed_memory();
    // An error says that there is a pool already, which works too.
    let _ = rayon::ThreadPoolBuilder::new()
        .use_current_thread()
        .build_global();
    if std::env::var_os("CANDLE_NUM_THREADS").is_none() {
        // SAFETY: called before the program starts a thread, as the contract of this function says.
        unsafe { std::env::set_var("CANDLE_NUM_THREADS", "1") };
    }
}
